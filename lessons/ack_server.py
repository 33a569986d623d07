# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Lose nothing when a consumer dies: server.py with acknowledgements.

Run `python lessons/ack_server.py`, and in two more terminals `python ws_consumer_client.py --ack`
and `python ws_producer_client.py`. The consumer acknowledges each payload once it is done with it.
When its connection ends, the server redelivers what it has not acknowledged. Each payload arrives
at least once: it may arrive twice, and it is lost only if the server stops. A payload on which
MAX_DELIVERIES consumers have failed is set aside: see `GET /dead`.
"""

import asyncio
import itertools
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException, WebSocketRequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json
from starlette.requests import HTTPConnection

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes in one turn, at most
MAX_DELIVERIES = 5  # consumers that may fail on a payload before it is set aside
# Close codes that are not failures: the consumer said goodbye, or uvicorn is stopping (1012). If
# the connection broke, uvicorn reports 1005, as if there had been a close frame without a code.
ON_PURPOSE = (1000, 1001, 1012)
MAX_PREFETCH = 1000  # payloads that a consumer may have before it acknowledges the first one
SEND_TIMEOUT = 40  # seconds to wait for a consumer that does not read
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
Prefetch = Annotated[int, Query(ge=1, le=MAX_PREFETCH)]
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets


class Entry(NamedTuple):
    """A payload in the queue. The lowest number comes out first."""

    number: int
    payload: str
    takes_space: bool = False
    deliveries: int = 0  # consumers that have failed on it


class Unacknowledged:
    """A consumer's unacknowledged payloads, oldest first."""

    def __init__(self, prefetch: int) -> None:
        self.entries: deque[Entry] = deque()
        self.room = asyncio.Semaphore(prefetch)
        self.sending_since = math.inf  # seconds, as time.monotonic() counts them

    def acknowledge(self) -> None:
        """Forget the oldest payload, and let the consumer have another one."""
        self.entries.popleft()
        self.room.release()

    def blame(self) -> None:
        """Count a failure of the consumer against the payload on which it was working."""
        # Acknowledgements come in order, so that is the oldest payload, if it was sent at all.
        was_sent = len(self.entries) > 1 or self.sending_since == math.inf
        if self.entries and was_sent:
            oldest = self.entries.popleft()
            self.entries.appendleft(oldest._replace(deliveries=oldest.deliveries + 1))


class Channel:
    """A bounded queue, first in, first out, that redelivers what is not acknowledged."""

    def __init__(self, capacity: int) -> None:
        # A payload that goes back keeps its number, so it is the next one out.
        self.queue: asyncio.PriorityQueue[Entry] = asyncio.PriorityQueue()
        self.numbers = itertools.count()
        # A payload takes up space until a consumer gets it. If it comes back, it takes up none,
        # because there may be none by then.
        self.space = asyncio.Semaphore(capacity)
        self.consumers = 0  # how many take turns
        self.dead: list[Entry] = []

    def qsize(self) -> int:
        """Count the payloads that wait for a consumer."""
        return self.queue.qsize()

    async def put(self, payload: str, max_wait: float | None = None) -> None:
        """Queue a payload. Raise TimeoutError if there is no space for `max_wait` seconds."""
        # Setting a timer for each payload would cost a third more, so set it only if we must wait.
        if self.space.locked():
            async with asyncio.timeout(max_wait):
                await self.space.acquire()
        else:
            await self.space.acquire()
        self.queue.put_nowait(Entry(next(self.numbers), payload, takes_space=True))

    async def deliver(
        self, handle: Callable[[str], Awaitable[object]], unacknowledged: Unacknowledged
    ) -> None:
        """Call `handle` with each payload, as long as the consumer has room for it."""
        self.consumers += 1
        remaining = 1  # payloads that this consumer takes before it lets the others run
        try:
            while True:
                await unacknowledged.room.acquire()
                # If get() has to wait, a new turn begins, with one payload.
                if self.queue.empty():
                    remaining = 1
                entry = await self.queue.get()
                # Note it first, so that it is not lost if sending fails or is cancelled.
                unacknowledged.sending_since = time.monotonic()
                unacknowledged.entries.append(entry)
                if entry.takes_space:
                    self.space.release()
                await handle(entry.payload)
                unacknowledged.sending_since = math.inf
                remaining -= 1
                if remaining == 0 and not self.queue.empty():
                    # Let the others run. Nothing above pauses if all payloads can be sent at once.
                    await asyncio.sleep(0)
                    # Take only half of a fair share: the others get their shares of what is left.
                    share = self.queue.qsize() // self.consumers
                    remaining = max(1, min(BURST, share // 2))
        finally:
            self.consumers -= 1

    def redeliver(self, unacknowledged: Unacknowledged) -> None:
        """Put unacknowledged payloads back at the front of the queue, in their old order.

        Set a payload aside if too many consumers have failed on it.
        """
        for entry in unacknowledged.entries:
            if entry.deliveries < MAX_DELIVERIES:
                self.queue.put_nowait(entry._replace(takes_space=False))
            else:
                self.dead.append(entry)
                log.warning("set aside after %d deliveries: %.80s", entry.deliveries, entry.payload)

    def retry(self) -> int:
        """Put the dead letters back into the queue, and count them."""
        dead, self.dead = self.dead, []
        for entry in dead:
            self.queue.put_nowait(Entry(entry.number, entry.payload))
        return len(dead)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield  # until every endpoint has returned
    log.info("%d payloads were still queued", channel.qsize())


app = FastAPI(lifespan=lifespan)
channel = Channel(CAPACITY)


async def same_origin(connection: HTTPConnection) -> None:
    """Refuse web pages from other sites. Browsers send an Origin header, scripts do not."""
    origin = connection.headers.get("origin")
    host = connection.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        reason = f"a page from {origin} may not connect to {host}: open the page at that address"
        if connection.scope["type"] == "http":
            raise HTTPException(403, reason)
        raise WebSocketException(1008, reason)


@app.exception_handler(WebSocketException)
async def close(websocket: WebSocket, error: WebSocketException) -> None:
    """Close the connection with the code and the reason of the exception, and log them."""
    host, port = websocket.client or ("unknown", 0)
    log.warning("%s:%d closed with %d: %s", host, port, error.code, error.reason)
    with suppress(*GONE, TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(TIMEOUT):
            await websocket.close(error.code, error.reason)


@app.exception_handler(WebSocketRequestValidationError)
async def refuse(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:
    """Tell the consumer what is wrong with its prefetch."""
    # Before it is accepted, a client that is refused sees only HTTP 403, without a reason.
    await websocket.accept()
    await close(websocket, WebSocketException(1008, f"prefetch: {error.errors()[0]['msg']}"))


def validate(payload: str | None) -> str:
    """Return the payload if it is JSON of at most MAX_PAYLOAD bytes. None is a binary frame."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    return payload


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = validate(message.get("text"))
            try:
                await channel.put(payload, TIMEOUT)
            except TimeoutError:
                raise WebSocketException(1013, "the queue is full: try again later") from None
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)


async def send_payloads(websocket: WebSocket, unacknowledged: Unacknowledged) -> None:
    """Send payloads until the consumer leaves."""
    with suppress(*GONE):
        await channel.deliver(websocket.send_text, unacknowledged)


async def watch(unacknowledged: Unacknowledged) -> None:
    """Refuse a consumer that stopped reading. Uvicorn's pings would wait behind the payloads."""
    # Setting a timer for each payload would cost a tenth more, so look from time to time.
    while time.monotonic() - unacknowledged.sending_since < SEND_TIMEOUT:
        await asyncio.sleep(SEND_TIMEOUT / 10)
    raise WebSocketException(1013, f"sending a payload took longer than {SEND_TIMEOUT} seconds")


async def receive_acks(websocket: WebSocket, unacknowledged: Unacknowledged) -> None:
    """Take acknowledgements until the consumer leaves. Count it as a failure if it crashed."""
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        if message.get("text") != "ack":
            raise WebSocketException(1008, "a consumer sends ack, and nothing else")
        if not unacknowledged.entries:
            raise WebSocketException(1008, "an ack, but there is nothing to acknowledge")
        unacknowledged.acknowledge()
    if message["code"] not in ON_PURPOSE:
        unacknowledged.blame()


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket, prefetch: Prefetch = 1) -> None:
    await websocket.accept()
    unacknowledged = Unacknowledged(prefetch)
    refusal: Exception | None = None
    # If the consumer does not read its payloads, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(send_payloads(websocket, unacknowledged))
                watcher = group.create_task(watch(unacknowledged))
                # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
                await receive_acks(websocket, unacknowledged)
                sender.cancel()
                watcher.cancel()
        except* WebSocketException as refusals:
            refusal = refusals.exceptions[0]
            unacknowledged.blame()
        finally:
            channel.redeliver(unacknowledged)
    if refusal:
        raise refusal


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    queued, dead = channel.qsize(), len(channel.dead)
    return {"queued": queued, "capacity": CAPACITY, "acks": True, "dead": dead}


@app.get("/dead", dependencies=[Depends(same_origin)])
async def dead() -> list[dict[str, Any]]:
    """List the dead letters, oldest first, at most 100."""
    oldest = channel.dead[:100]
    return [{"payload": entry.payload, "deliveries": entry.deliveries} for entry in oldest]


@app.post("/dead/retry", dependencies=[Depends(same_origin)])
async def retry() -> dict[str, int]:
    """Put the dead letters back into the queue."""
    return {"retried": channel.retry()}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})
    return PlainTextResponse("A queue: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
