# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Forward one websocket to another, with a queue for each room.

It differs from server.py in that the room is a part of the path, `/ws/{room}/producer`, and that a
dict holds a channel for each room. Run `python lessons/rooms_server.py`, and in two more terminals
`python ws_consumer_client.py --url ws://127.0.0.1:8000/ws/kitchen/consumer` and
`python ws_producer_client.py --url ws://127.0.0.1:8000/ws/kitchen/producer`. A payload never leaves
its room. Each payload goes to one consumer, at most once, as with server.py.
"""

import asyncio
import itertools
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

MAX_ROOMS = 1000
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a room
CAPACITY = 1000  # payloads in each room
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # payloads that a consumer takes in one turn, at most
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets


class Channel:
    """A bounded queue, first in, first out, whose consumers take turns."""

    def __init__(self, capacity: int) -> None:
        # The lowest number comes out first, so a payload that goes back is the next one out.
        self.queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self.numbers = itertools.count()
        # A payload takes up space until it is delivered, so there is always room to put it back.
        self.space = asyncio.Semaphore(capacity)
        self.consumers = 0  # how many take turns

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
        self.queue.put_nowait((next(self.numbers), payload))

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        self.consumers += 1
        remaining = 1  # payloads that this consumer takes before it lets the others run
        try:
            while True:
                # If get() has to wait, a new turn begins, with one payload.
                if self.queue.empty():
                    remaining = 1
                number, payload = await self.queue.get()
                try:
                    await handle(payload)
                except BaseException:
                    self.queue.put_nowait((number, payload))
                    raise
                self.space.release()
                remaining -= 1
                if remaining == 0 and not self.queue.empty():
                    # Let the others run. Nothing above pauses if all payloads can be sent at once.
                    await asyncio.sleep(0)
                    # Take only half of a fair share: the others get their shares of what is left.
                    share = self.queue.qsize() // self.consumers
                    remaining = max(1, min(BURST, share // 2))
        finally:
            self.consumers -= 1


class Room(Channel):
    """A channel that exists while somebody uses it, or while it holds a payload."""

    def __init__(self, name: str) -> None:
        super().__init__(CAPACITY)
        self.name = name
        self.users = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the room. Raise LookupError if it has been dropped."""
        if rooms.get(self.name) is not self:
            raise LookupError(f"room {self.name} was dropped: get it from `rooms` each time")
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0 and self.qsize() == 0:
                del rooms[self.name]

    async def put(self, payload: str, max_wait: float | None = None) -> None:
        """Queue a payload. Raise TimeoutError if there is no space for `max_wait` seconds."""
        with self.in_use():
            await super().put(payload, max_wait)

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each payload. If it fails or is cancelled, the payload goes back."""
        with self.in_use():
            await super().deliver(handle)


class Rooms(dict[str, Room]):
    """The rooms, by name. A room that does not exist is made when somebody asks for it."""

    def __missing__(self, name: str) -> Room:
        if len(self) >= MAX_ROOMS:
            raise LookupError(f"there are {MAX_ROOMS} rooms: try again later")
        self[name] = Room(name)
        return self[name]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield  # until every endpoint has returned
    log.info("%d payloads were still queued", sum(room.qsize() for room in rooms.values()))


app = FastAPI(lifespan=lifespan)
rooms = Rooms()


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


async def check_name(room: str) -> None:
    """Refuse the handshake with 404 if this is not a valid name for a room."""
    if not NAME.fullmatch(room):
        raise HTTPException(404, "a room's name has 1 to 64 letters, digits, '-', '_' or '.'")


def find(name: str) -> Room:
    try:
        return rooms[name]
    except LookupError as error:
        raise WebSocketException(1013, str(error)) from None


# `:path` also matches a name with a slash in it, so that check_name() can refuse it.
@app.websocket("/ws/{room:path}/producer", dependencies=[Depends(same_origin), Depends(check_name)])
async def producer(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    channel = find(room)
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with channel.in_use(), suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = validate(message.get("text"))
            try:
                await channel.put(payload, TIMEOUT)
            except TimeoutError:
                raise WebSocketException(1013, "the queue is full: try again later") from None
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)


async def send_payloads(websocket: WebSocket, channel: Channel) -> None:
    """Send payloads until the consumer leaves. One that cannot be sent goes back to the front."""
    with suppress(*GONE):
        await channel.deliver(websocket.send_text)


@app.websocket("/ws/{room:path}/consumer", dependencies=[Depends(same_origin), Depends(check_name)])
async def consumer(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    channel = find(room)
    # If the consumer does not read its payloads, uvicorn cancels this endpoint when it stops.
    with channel.in_use(), suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_payloads(websocket, channel))
            # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            sender.cancel()


@app.get("/stats")
async def stats() -> dict[str, dict[str, int] | int]:
    queued = {name: room.qsize() for name, room in rooms.items()}
    return {"rooms": queued, "capacity": CAPACITY}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})
    return PlainTextResponse("Rooms: send to /ws/ROOM/producer, receive from /ws/ROOM/consumer.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
