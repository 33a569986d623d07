# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115", "uvicorn>=0.53", "websockets>=16.0"]
# ///
"""A websocket in front of another: an API gateway that forwards /ws/... to one upstream server.

Run `uvicorn server:app --port 8001`, `UPSTREAM=ws://127.0.0.1:8001 python lessons/gateway_server.py`, and the
clients as with server.py, which then talk to the gateway. It keeps nothing: what was on its way is lost with it,
and what a slow side does not take stays with the other side, as if there were no gateway between.
"""

import asyncio
import logging
import os
from contextlib import suppress

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import PlainTextResponse
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

UPSTREAM = os.environ.get("UPSTREAM", "ws://127.0.0.1:8001")  # a path in it goes before the client's
HEADERS = ["authorization", "cookie", "x-request-id"]  # of the client's, that go to the upstream
OPEN_TIMEOUT = 5  # seconds that the upstream may take for the handshake
CLOSE_TIMEOUT = 1  # seconds that it may take to answer a close frame
MAX_MESSAGE = 16 * 1024 * 1024  # bytes from the upstream; uvicorn's --ws-max-size says the same for clients
AHEAD = 4  # messages of the upstream that wait for a slow client, before it must wait itself
GOING_AWAY, BAD_GATEWAY = (
    1001,
    1014,
)  # close codes in the IANA's registry, which RFC 6455, section 11.7, opened
UNSENDABLE = {1005, 1006, 1015}  # they say that no close frame came, and must not be sent: section 7.4.1
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above
app = FastAPI()


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect, only one that this server served", origin)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


async def open_upstream(websocket: WebSocket) -> ClientConnection:
    """Connect to the same path and query of the upstream. Raises what connect() raises."""
    query = websocket.url.query
    # Path and query only ever follow UPSTREAM's host, encoded as they came: they cannot name another.
    path = websocket.scope["raw_path"].decode() + ("?" + query if query else "")
    wanted = [Subprotocol(name) for name in websocket.scope["subprotocols"]]
    headers = [(name, value) for name, value in websocket.headers.items() if name in HEADERS]
    return await connect(
        UPSTREAM.rstrip("/") + path, subprotocols=wanted or None, additional_headers=headers, max_queue=AHEAD,
        max_size=MAX_MESSAGE, open_timeout=OPEN_TIMEOUT, close_timeout=CLOSE_TIMEOUT, compression=None, proxy=None,
    )  # fmt: skip


async def to_client(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward until the upstream ends, then close the client."""
    with suppress(WebSocketDisconnect, RuntimeError):  # it left, as relay() hears
        with suppress(ConnectionClosed):
            while True:
                message = await upstream.recv()
                if isinstance(message, str):
                    await websocket.send_text(message)  # waits while the client is slow
                else:
                    await websocket.send_bytes(message)
        code, reason = upstream.close_code, upstream.close_reason or ""
        if code is None or code in UNSENDABLE:
            code, reason = BAD_GATEWAY, "the upstream went away"
        await websocket.close(code, reason)  # relay()'s receive() returns then


async def relay(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Forward both ways at once, until either side ends and has ended the other."""
    await websocket.accept(upstream.subprotocol)
    sender = asyncio.create_task(to_client(websocket, upstream))
    try:
        while (message := await websocket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            with suppress(ConnectionClosed):  # to_client() is about to close the client
                await upstream.send(message["bytes"] if text is None else text)  # waits while it is slow
        code, reason = message["code"], message.get("reason") or ""
        if code in UNSENDABLE:
            code, reason = GOING_AWAY, "the client went away"
        sender.cancel()
        await upstream.close(code, reason)
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("client %s was cut off", websocket.client)
    finally:
        sender.cancel()
        upstream.transport.abort()  # where it has not answered the close frame


@app.websocket("/ws/{path:path}", dependencies=[Depends(same_origin)])
async def forward(websocket: WebSocket) -> None:
    try:
        upstream = await open_upstream(websocket)
    except InvalidStatus as refusal:  # the upstream's own answer, such as 401 or 403
        status, why = refusal.response.status_code, "the upstream refused"
    except TimeoutError:
        status, why = 504, f"the upstream did not answer within {OPEN_TIMEOUT} s"
    except (OSError, InvalidHandshake) as error:
        status, why = 502, f"the upstream cannot be reached: {error}"
    else:
        return await relay(websocket, upstream)
    log.warning("client %s got %d: %s", websocket.client, status, why)
    await websocket.send_denial_response(PlainTextResponse(why, status))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1)
