# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Put a websocket in front of another: a gateway that forwards /ws/... to one upstream server.

Run `uvicorn server:app --port 8001`, `python lessons/gateway_server.py`, and the clients as with
server.py. A slow side makes the other side wait, and when one side ends, so does the other.
Delivery is at most once: if a connection breaks, messages that the gateway has not written yet are
lost.
"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

# Raise the limit, or a client with large cookies gets no answer. websockets reads it on import.
os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")

import uvicorn
from fastapi import Depends, FastAPI, Response, WebSocket, WebSocketDisconnect, WebSocketException
from starlette.types import Message
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.uri import parse_uri

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

UPSTREAM = os.environ.get("UPSTREAM", "ws://127.0.0.1:8001").rstrip("/")  # with or without a path
HEADERS = ("authorization", "cookie", "x-request-id")  # that the upstream gets from the client
TIMEOUT = 1  # seconds to wait for a close frame to be sent
OPEN_TIMEOUT = 5  # seconds to wait for the upstream's handshake
STALL_TIMEOUT = 40  # seconds to wait for a side that does not read
MAX_MESSAGE = 16 * 1024 * 1024  # bytes from the upstream; uvicorn has the same limit for clients
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
# Raised by connect(). The last two mean that the upstream's answer makes no sense.
UNREACHABLE = (
    OSError,
    ConnectionClosed,
    InvalidHandshake,
    InvalidURI,
    ValueError,
    AssertionError,
)
# Not sent by anyone: they stand for a close frame without a code, and for no close frame.
NO_CODE = 1005
NO_CLOSE_FRAME = 1006
address = parse_uri(UPSTREAM)
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield


app = FastAPI(lifespan=lifespan)


async def same_origin(websocket: WebSocket) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = websocket.headers.get("origin")
    host = websocket.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        raise WebSocketException(1008, reason)


@app.exception_handler(WebSocketException)
async def close(websocket: WebSocket, error: WebSocketException) -> None:
    """Close the connection with the code and the reason of the exception, and log them."""
    host, port = websocket.client or ("unknown", 0)
    log.warning("%s:%d closed with %d: %s", host, port, error.code, error.reason)
    with suppress(*GONE, TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(TIMEOUT):
            await websocket.close(error.code, error.reason)


class Connect(connect):
    """Connect, but follow no redirect: raise InvalidStatus instead."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


async def open_upstream(websocket: WebSocket) -> ClientConnection:
    """Connect to the client's path and query at the upstream. Raise what connect() raises."""
    path = websocket.scope["raw_path"].decode().removeprefix("/")
    query = websocket.scope["query_string"].decode()
    client = websocket.client.host if websocket.client else "unknown"
    headers = [(name, value) for name, value in websocket.headers.items() if name in HEADERS]
    return await Connect(
        f"{UPSTREAM}/{path}?{query}",
        # With a host and a port, connect() goes nowhere else, whatever path the client sends.
        host=address.host,
        port=address.port,
        proxy=None,
        additional_headers=[*headers, ("x-forwarded-for", client)],
        subprotocols=websocket.scope["subprotocols"] or None,
        compression=None,
        max_size=MAX_MESSAGE,
        # Read one message ahead. If the client is slow, the upstream has to wait.
        max_queue=1,
        open_timeout=OPEN_TIMEOUT,
        close_timeout=1,
    )


async def send(websocket: WebSocket, message: Message) -> None:
    """Send to the client, unless it has left. Raise TimeoutError if it does not read."""
    with suppress(*GONE):
        async with asyncio.timeout(STALL_TIMEOUT):
            await websocket.send(message)


async def to_client(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward messages until the upstream ends, then close the client's connection."""
    with suppress(ConnectionClosed):
        async for message in upstream:
            kind = "text" if isinstance(message, str) else "bytes"
            await send(websocket, {"type": "websocket.send", kind: message})
    code = upstream.close_code
    reason = upstream.close_reason
    if code == NO_CODE:
        code = 1000
    elif code == NO_CLOSE_FRAME:
        code = 1014  # a bad gateway
        reason = "the upstream went away"
    await send(websocket, {"type": "websocket.close", "code": code, "reason": reason})


async def to_upstream(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward messages until the client ends, then close the upstream's connection."""
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        text = message.get("text")
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await upstream.send(message["bytes"] if text is None else text)
        except (ConnectionClosed, TimeoutError):
            # This ends to_client(), which closes the client, so receive() returns a disconnect.
            upstream.transport.abort()
    code = message["code"]
    reason = message.get("reason") or ""
    if code in (NO_CODE, NO_CLOSE_FRAME):
        # Not 1001, because ack_server.py takes that for a goodbye, and the client may have crashed.
        code = 1011
        reason = "the client went away"
    await upstream.close(code, reason)


async def relay(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward both ways until either side has ended and has ended the other side."""
    try:
        await websocket.accept(upstream.subprotocol)
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(to_client(websocket, upstream))
            await to_upstream(websocket, upstream)
            sender.cancel()
    # If a side does not read, uvicorn cancels this endpoint when it stops.
    except* (TimeoutError, asyncio.CancelledError):
        host, port = websocket.client or ("unknown", 0)
        log.warning("%s:%d was cut off: it does not read, or the upstream does not", host, port)
    finally:
        # The upstream may not have answered the close frame.
        upstream.transport.abort()
        # websockets does not stop its pings if the connection was lost before they began.
        if upstream.keepalive_task:
            upstream.keepalive_task.cancel()


async def refuse(websocket: WebSocket, status: int, reason: str) -> None:
    """Answer the client's handshake with an HTTP status."""
    await websocket.send_denial_response(Response(reason, status))
    # Uvicorn logs an error if the endpoint returns before the connection is closed.
    await asyncio.sleep(0)


@app.websocket("/ws/{path:path}", dependencies=[Depends(same_origin)])
async def forward(websocket: WebSocket, path: str) -> None:
    if ".." in path.split("/"):
        raise WebSocketException(1008, "a path with .. could lead out of the upstream's path")
    await websocket.receive()  # the handshake
    opening = asyncio.create_task(open_upstream(websocket))
    # A client must not send anything before it is accepted, but it may leave.
    leaving = asyncio.create_task(websocket.receive())
    await asyncio.wait([opening, leaving], return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not opening.done():
        opening.cancel()
        return
    try:
        upstream = opening.result()
    except InvalidStatus as error:
        # Pass on the upstream's own answer, such as 401. In place of a redirect, answer 502.
        status = error.response.status_code
        reason = error.response.body.decode(errors="replace")
        return await refuse(websocket, status if status >= 400 else 502, reason)
    except UNREACHABLE as error:
        log.warning("%s cannot be reached: %s", UPSTREAM, error)
        status = 504 if isinstance(error, TimeoutError) else 502
        return await refuse(websocket, status, "the upstream cannot be reached")
    await relay(websocket, upstream)


if __name__ == "__main__":
    # Compression costs much CPU.
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
