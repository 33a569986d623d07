# /// script
# requires-python = ">=3.11"
# dependencies = ["uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Keep one client from harming the others: uvicorn's websocket protocol without its worst faults.

Use it with any app, in one of three ways:

    uvicorn server:app --ws lessons.robust_protocol:Protocol
    UVICORN_WS=lessons.robust_protocol:Protocol uvicorn server:app
    uvicorn.run(app, ws=Protocol)

Without it, one client that sends a large handshake makes Ctrl+C crash: other clients get no close
frame, and the app's lifespan is cancelled at its `yield`. The class overrides methods of uvicorn's
`WebSocketsSansIOProtocol`, which is what `--ws auto` means. Delivery guarantees stay as they are.
"""

import logging
import sys

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import OPEN

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CLOSE_TIMEOUT = 1  # seconds in which a client may answer a close frame
MAX_UNREAD = 1024 * 1024  # bytes that may wait for a client before its pings get no pongs
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above


class Protocol(WebSocketsSansIOProtocol):
    """Answer every client, and end every connection with a close frame that the client can read."""

    def data_received(self, data: bytes) -> None:
        # After a protocol error, discard what the client still sends.
        if self.conn.parser_exc:
            return
        # A client must wait for the answer to its handshake (RFC 6455, section 4.1). If it sends
        # junk before that, uvicorn logs a traceback, so close the connection if it sends anything.
        if self.handshake_initiated and not self.handshake_complete:
            self.transport.abort()
            return
        super().data_received(data)
        # The handshake is too large: its request line or one of its headers has more than 8,192
        # bytes, or it has more than 128 headers. websockets has prepared the answer, HTTP 414 or
        # 431 (python-websockets/websockets#1732), but uvicorn does not send it. The client would
        # wait forever. Until it leaves, uvicorn's shutdown() would raise AssertionError.
        if self.conn.handshake_exc and not self.close_sent:
            self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_connect(self, event: Request) -> None:
        # Uvicorn applies --limit-concurrency to HTTP requests, but not to websockets.
        limit = self.config.limit_concurrency
        if limit is None or len(self.tasks) < limit:
            super().handle_connect(event)
        else:
            log.warning("client %s refused: there are %d others", self.client, limit)
            self.conn.send_response(self.conn.reject(503, "too many connections: try again later"))
            self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_ping(self) -> None:
        # Uvicorn writes a pong for every ping, even if the client reads none, until memory is full.
        # A server need not answer each ping (RFC 6455, section 5.5.3).
        if self.transport.get_write_buffer_size() < MAX_UNREAD:
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def send_receive_event_to_app(self) -> None:
        # Uvicorn logs a traceback for text that is not UTF-8, and gives the client no reason.
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError as error:
                self.conn.fail(1007, f"not UTF-8: {error.reason} at byte {error.start}")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Close the connection after a protocol error, such as a message over --ws-max-size."""
        closed = self.conn.close_sent
        assert closed
        code, reason = closed.code, closed.reason
        log.warning("client %s closed with %d: %s", self.client, code, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.linger()

    def shutdown(self) -> None:
        """Close the connection with 1012, because the server is stopping."""
        if self.conn.state is OPEN:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1012})
            self.conn.send_close(1012)
            self.linger()
        else:
            # The client has sent a close frame, and the answer waits until the client reads.
            # Uvicorn would send a second close frame, for which websockets raises InvalidState.
            self.close_sent = self.close_sent or self.handshake_complete
            super().shutdown()

    def linger(self) -> None:
        """Send the close frame. Close the connection at the client's answer or after CLOSE_TIMEOUT.

        Uvicorn closes it at once. If the client is sending, the operating system then sends a TCP
        reset, and the client sees 1006 in place of the close code and the reason.
        """
        self.stop_keepalive()
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(CLOSE_TIMEOUT, self.transport.close)
