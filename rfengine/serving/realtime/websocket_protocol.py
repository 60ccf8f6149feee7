"""uvicorn's WebSocket, made to hold no memory and no socket for a client that does not read."""

from __future__ import annotations

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

_INVALID_DATA = 1007  # close code of RFC 6455
_LEAVE_S = 2.0  # in which a client takes at least
_LEAST_TAKEN = 2048  # of the last bytes


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Pings are answered while answers can be written, a connection whose last bytes are not taken is broken
    off, and text that is no UTF-8 closes the connection without a traceback in the log."""

    def handle_ping(self) -> None:
        """The answer lies in `conn` already; a client that reads no answer gets none (RFC 6455, 5.5.3)."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def send_receive_event_to_app(self) -> None:
        """A whole message has come."""
        try:
            if self.curr_msg_data_type == "text":
                b"".join(self.frames).decode()
        except UnicodeDecodeError:
            self.frames = []
            self.conn.send_close(_INVALID_DATA)
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    async def send(self, message: ASGISendEvent) -> None:
        """Send, or raise ClientDisconnected once the connection is closed from this side."""
        await self.writable.wait()
        if self.close_sent and self.initial_response is None:
            raise ClientDisconnected
        await super().send(message)

    async def run_asgi(self) -> None:
        """Serve the connection; what a client leaves lying after its end is thrown away."""
        await super().run_asgi()
        self._await_last_bytes()

    def _await_last_bytes(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left:
            self.loop.call_later(_LEAVE_S, self._break_off_unless_taken, left)

    def _break_off_unless_taken(self, before: int) -> None:
        if self.disconnected:
            return
        if before - self.transport.get_write_buffer_size() < _LEAST_TAKEN:
            self.transport.abort()
        else:
            self._await_last_bytes()
