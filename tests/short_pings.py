"""A protocol class for `--ws tests.short_pings:Protocol`: $PING seconds in place of uvicorn's 20 and 20.

Clients on the same machine keep the 20 seconds, so that a slow machine does not end their connections.
"""

import asyncio
import os

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class Protocol(WebSocketsSansIOProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client and self.client[0] != "127.0.0.1":
            self.ping_interval = self.ping_timeout = float(os.environ["PING"])
