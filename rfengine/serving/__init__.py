"""The server: realtime sessions over a WebSocket, video jobs over HTTP, and a page that plays them."""
