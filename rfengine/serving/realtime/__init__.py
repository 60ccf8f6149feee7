"""Sessions over a WebSocket: the protocol, its endpoint, and where the video goes."""
