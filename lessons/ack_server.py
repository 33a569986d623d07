# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Nothing lost with a consumer that dies: server.py, with acknowledgements.

Run `python lessons/ack_server.py`, then `python ws_consumer_client.py --ack` and the producer.
A consumer answers each payload with `ack` once it is done with it. When its connection ends, however it ends,
all that it has not acknowledged goes to the next consumer. At least once: a payload whose `ack` is lost
comes again. Lost when the server stops. Read `diff server.py lessons/ack_server.py`.
"""

import asyncio
import itertools
import logging
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Query, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads in the queue; then producers wait
FULL_TIMEOUT = 1  # seconds that a producer waits for room
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes from a backlog before it is the next one's turn
MAX_PREFETCH = 1000  # payloads that a consumer may have before it acknowledges the first
SEND_TIMEOUT = 40  # seconds for which a socket may be full, as long as uvicorn waits for an answer to a ping
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield  # what follows runs when every endpoint has returned: too late to end one, in time to count
    log.info("%d payloads were still queued", queue.qsize())


app = FastAPI(lifespan=lifespan)
Entry = tuple[int, str, bool]  # a payload's number, the payload, and whether it holds a place
queue: asyncio.PriorityQueue[Entry] = asyncio.PriorityQueue()
numbers = itertools.count()  # lowest first, so that a payload that comes back goes to the front
room = asyncio.Semaphore(CAPACITY)  # a payload holds a place until it is sent; one that comes back has none
turn = asyncio.Lock()  # idle consumers stand in line for it, so that a payload wakes only the first


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


@app.exception_handler(WebSocketRequestValidationError)
async def bad_prefetch(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:
    await websocket.accept()  # else the client would see HTTP 403, and no reason
    await websocket.close(1008, f"prefetch: {error.errors()[0]['msg']}")


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
    queue.put_nowait((next(numbers), payload, True))


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


class Window:
    """What a consumer may have, what it has and did not acknowledge, and what is being sent to it."""

    def __init__(self, prefetch: int) -> None:
        self.room = asyncio.Semaphore(prefetch)
        self.unsettled: deque[Entry] = deque()
        self.sending_since = math.inf  # seconds, by the clock of time.monotonic()


async def send_payloads(websocket: WebSocket, window: Window) -> None:
    for sent in itertools.count():
        await window.room.acquire()
        if sent % BURST and not queue.empty():
            number, payload, placed = queue.get_nowait()
        else:
            async with turn:
                number, payload, placed = await queue.get()
        window.unsettled.append((number, payload, False))  # before it is written, or it could be lost between
        if placed:
            room.release()
        window.sending_since = time.monotonic()
        try:
            await websocket.send_text(payload)
        except (WebSocketDisconnect, RuntimeError):
            return  # it left, as settle() hears too
        window.sending_since = math.inf


async def watch(window: Window) -> None:
    """Raise TimeoutError when its socket was full for SEND_TIMEOUT: uvicorn's pings wait there too."""
    while time.monotonic() - window.sending_since < SEND_TIMEOUT:
        await asyncio.sleep(SEND_TIMEOUT / 10)
    raise TimeoutError


async def settle(websocket: WebSocket, window: Window) -> str | None:
    """Take acknowledgements until the consumer leaves. Returns what it did wrong, if anything."""
    while (message := await websocket.receive())["type"] == "websocket.receive":
        if message.get("text") != "ack":
            return "a consumer says ack, and nothing else"
        if not window.unsettled:
            return "an ack, and every payload was acknowledged already"
        window.unsettled.popleft()
        window.room.release()
    return None


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket, prefetch: Annotated[int, Query(ge=1, le=MAX_PREFETCH)] = 1) -> None:
    await websocket.accept()
    window, refusal = Window(prefetch), None
    try:
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(send_payloads(websocket, window)), group.create_task(watch(window))]
            refusal = await settle(websocket, window)
            for helper in helpers:
                helper.cancel()
    except* TimeoutError:  # needs Python 3.11
        log.warning("consumer %s is given up: it has not read for %d s", websocket.client, SEND_TIMEOUT)
    except* asyncio.CancelledError:  # see producer()
        pass
    finally:
        for entry in window.unsettled:
            queue.put_nowait(entry)
    if refusal:
        log.warning("consumer %s closed with 1008: %s", websocket.client, refusal)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(FULL_TIMEOUT):  # a client that does not read can't be told
                await websocket.close(1008, refusal)


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    return {"queued": queue.qsize(), "capacity": CAPACITY, "acks": True}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("A queue between websockets: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
