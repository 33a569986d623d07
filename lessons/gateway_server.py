# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""A websocket in front of another: an API gateway that forwards /ws/... to one upstream server.

Run `uvicorn server:app --port 8001`, `python lessons/gateway_server.py`, and the clients as with server.py.
A slow side makes the other wait, and when either ends, the other ends alike. At most once: what the gateway
has read from one side, and not yet written to the other, is lost with the connection.
"""

import asyncio
import logging
import os
import sys
from contextlib import suppress

import uvicorn
from fastapi import Depends, FastAPI, Response, WebSocket, WebSocketDisconnect, WebSocketException
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.uri import parse_uri

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

UPSTREAM = os.environ.get("UPSTREAM", "ws://127.0.0.1:8001").rstrip("/")  # with or without a path
HEADERS = {"authorization", "cookie", "x-request-id"}  # of the client's, that the upstream gets
OPEN_TIMEOUT = 5  # seconds that the upstream may take for the handshake
STALL_TIMEOUT = 40  # seconds for which a side may take nothing; uvicorn's pings wait as long for an answer
MAX_MESSAGE = 16 * 1024 * 1024  # bytes, from the upstream; uvicorn's --ws-max-size is the same for clients
UNREACHABLE = OSError, ConnectionClosed, InvalidHandshake, InvalidURI, ValueError, AssertionError  # connect's
UNSENDABLE = {1005, 1006}  # a close frame without a code, and none at all: RFC 6455, section 7.4.1
address = parse_uri(UPSTREAM)
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above
app = FastAPI()


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


async def open_upstream(websocket: WebSocket) -> ClientConnection:
    """Connect to the client's path and query at the upstream. Raises what connect() raises."""
    path, query = websocket.scope["raw_path"].decode(), websocket.scope["query_string"].decode()
    headers = [(name, value) for name, value in websocket.headers.items() if name in HEADERS]
    headers.append(("x-forwarded-for", websocket.client.host if websocket.client else "unknown"))
    return await connect(
        f"{UPSTREAM}/{path.removeprefix('/')}?{query}", host=address.host, port=address.port,  # no other host
        additional_headers=headers, subprotocols=websocket.scope["subprotocols"] or None, compression=None,
        max_size=MAX_MESSAGE, max_queue=1, open_timeout=OPEN_TIMEOUT, close_timeout=1, proxy=None,
    )  # fmt: skip


async def send(websocket: WebSocket, message: dict[str, object]) -> None:
    """Send to the client, or do nothing where it left. TimeoutError where it does not read."""
    with suppress(WebSocketDisconnect, RuntimeError):
        async with asyncio.timeout(STALL_TIMEOUT):
            await websocket.send(message)  # waits while the client is slow


async def to_client(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward until the upstream ends, then close the client."""
    with suppress(ConnectionClosed):
        async for message in upstream:
            kind = "text" if isinstance(message, str) else "bytes"
            await send(websocket, {"type": "websocket.send", kind: message})
    code, reason = upstream.close_code, upstream.close_reason
    if code in UNSENDABLE:
        code, reason = (1000, "") if code == 1005 else (1014, "the upstream went away")  # a bad gateway
    await send(websocket, {"type": "websocket.close", "code": code, "reason": reason})


async def to_upstream(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward until the client ends, then close the upstream."""
    while (message := await websocket.receive())["type"] == "websocket.receive":
        try:
            async with asyncio.timeout(STALL_TIMEOUT):  # waits while the upstream is slow
                await upstream.send(message["text"] if message.get("text") is not None else message["bytes"])
        except (ConnectionClosed, TimeoutError):
            upstream.transport.abort()  # to_client() sees its end, and closes the client; receive() tells
    code, reason = message["code"], message.get("reason") or ""
    if code in UNSENDABLE:
        code, reason = 1001, "the client went away"
    await upstream.close(code, reason)


async def relay(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward both ways at once, until either side has ended and has ended the other."""
    try:
        await websocket.accept(upstream.subprotocol)
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(to_client(websocket, upstream))
            await to_upstream(websocket, upstream)
            sender.cancel()
    except* (TimeoutError, asyncio.CancelledError):  # the latter by --timeout-graceful-shutdown
        log.warning("client %s was cut off: it does not read, or the upstream does not", websocket.client)
    finally:
        upstream.transport.abort()  # where it has not answered the close frame


@app.websocket("/ws/{path:path}", dependencies=[Depends(same_origin)])
async def forward(websocket: WebSocket, path: str) -> None:
    if ".." in path.split("/"):
        raise WebSocketException(1008)  # it could lead out of UPSTREAM's path
    await websocket.receive()  # the handshake
    opening = asyncio.create_task(open_upstream(websocket))
    leaving = asyncio.create_task(websocket.receive())  # it can say nothing yet, but it may leave
    await asyncio.wait([opening, leaving], return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if opening.cancel():
        return  # it was not done: the client left
    try:
        upstream = opening.result()
    except InvalidStatus as refusal:  # the upstream's own answer, such as 401 or 403
        status, why = refusal.response.status_code, refusal.response.body.decode(errors="replace")
    except UNREACHABLE as error:
        log.warning("%s cannot be reached: %s", UPSTREAM, error)
        status, why = 504 if isinstance(error, TimeoutError) else 502, "the upstream cannot be reached"
    else:
        return await relay(websocket, upstream)
    await websocket.send_denial_response(Response(why, status if status >= 400 else 502))
    await asyncio.sleep(0)  # uvicorn logs an error where we return before the connection is closed


if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
