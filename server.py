# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Forward one websocket to another: producers fill an asyncio.Queue, consumers drain it.

Run `python server.py`, then `python ws_consumer_client.py` and `python ws_producer_client.py` in two more
terminals: a payload every second. Start more consumers, and they take turns: it is no broadcast. At most
once: what was echoed to its producer reaches one consumer, unless that one dies or the server stops.
"""

import asyncio
import itertools
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads in the queue; then producers wait
FULL_TIMEOUT = 1  # seconds that a producer waits for room
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes from a backlog before it is the next one's turn
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield  # what follows runs when every endpoint has returned: too late to end one, in time to count
    log.info("%d payloads were still queued", queue.qsize())


app = FastAPI(lifespan=lifespan)
queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
numbers = itertools.count()  # lowest first, so that a payload that comes back goes to the front
room = asyncio.Semaphore(CAPACITY)  # a payload holds a place until it is sent
turn = asyncio.Lock()  # idle consumers stand in line for it, so that a payload wakes only the first


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


async def put(payload: str | None) -> None:
    """Check and queue a payload; None is a binary frame. A WebSocketException says how to close."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
        if room.locked():  # only then: a timer for every payload would cost a tenth of the speed
            async with asyncio.timeout(FULL_TIMEOUT):
                await room.acquire()
        else:
            await room.acquire()
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    except TimeoutError:
        raise WebSocketException(1013, "the queue is full: try again later") from None
    queue.put_nowait((next(numbers), payload))


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await put(message.get("text"))
            with suppress(WebSocketDisconnect, RuntimeError):  # it left, but what it sent counts
                await websocket.send_text(message["text"])
    except WebSocketException as refusal:
        log.warning("producer %s closed with %d: %s", websocket.client, refusal.code, refusal.reason)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(FULL_TIMEOUT):  # a client that does not read can't be told
                await websocket.close(refusal.code, refusal.reason)
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("producer %s was cut off: it does not read its receipts", websocket.client)


async def send_payloads(websocket: WebSocket) -> None:
    for sent in itertools.count():
        if sent % BURST and not queue.empty():
            number, payload = queue.get_nowait()
        else:
            async with turn:
                number, payload = await queue.get()
        try:
            await websocket.send_text(payload)
        except (WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
            return queue.put_nowait((number, payload))  # not written: uvicorn waits first, then writes
        room.release()


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket) -> None:
    await websocket.accept()
    with suppress(asyncio.CancelledError):  # see producer()
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket))
            while (await websocket.receive())["type"] == "websocket.receive":
                pass  # what it says is ignored, but only receive() tells that it left or the server stops
            sender.cancel()


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    return {"queued": queue.qsize(), "capacity": CAPACITY, "acks": False}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("A queue between websockets: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
