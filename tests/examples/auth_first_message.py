"""auth_server.py, for clients that send their token as the first message, as its page shows it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import HTTPException, WebSocket, WebSocketException
from fastapi.security import SecurityScopes

from lessons import auth_server

TOKEN_TIMEOUT = 5  # seconds to wait for the first message


async def first_message(websocket: WebSocket, needed: SecurityScopes) -> AsyncIterator[None]:
    """Accept the connection, check the token in its first message, and run the endpoint."""
    await auth_server.same_origin(websocket)
    await websocket.accept("bearer")
    reason = f"no token came within {TOKEN_TIMEOUT} s"
    try:
        async with asyncio.timeout(TOKEN_TIMEOUT) as timer:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketException(1001, "the connection ended before a token came")
            claims = auth_server.check(message.get("text") or "", needed)
            reason = "the token has expired"
            timer.reschedule(asyncio.get_running_loop().time() + int(claims["exp"]) - time.time())
            yield
    except HTTPException as error:
        # The handshake is over, so only a close code can refuse the token.
        raise WebSocketException(1008, error.detail) from None
    finally:
        if timer.expired():
            raise WebSocketException(1008, reason)


async def session(websocket: WebSocket, needed: SecurityScopes) -> AsyncIterator[None]:
    """Wait for the first message if the handshake has no token, but the subprotocol `bearer`."""
    dependency = auth_server.session
    if websocket.scope["subprotocols"] == ["bearer"] and "authorization" not in websocket.headers:
        dependency = first_message
    async with asynccontextmanager(dependency)(websocket, needed):
        yield


app = auth_server.app
app.dependency_overrides[auth_server.session] = session
