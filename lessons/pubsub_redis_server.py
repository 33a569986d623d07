# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "paho-mqtt>=2", "pydantic>=2.9",
#                 "redis[hiredis]>=6", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Give every subscriber a copy, in all workers and on all machines: pubsub_server.py over Redis.

It differs from pubsub_server.py in the class Broker and its configuration. Run `redis-server`,
`uvicorn lessons.pubsub_redis_server:app --workers 4`, and the clients of pubsub_server.py: a
message reaches the subscribers of every process. Delivery is at most once. If Redis goes away,
messages stay in their process; when it is back, subscribers are told that they missed some.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from paho.mqtt.matcher import MQTTMatcher
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_jsonable_python
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

BUFFER = 1000  # messages that wait for a slow subscriber
WHEN_SLOW: Literal["drop oldest", "disconnect"] = "drop oldest"  # if the buffer is full
TIMEOUT = 10  # seconds to wait for a close frame to be sent
BURST = 32  # messages that are published in a row before they are sent
MAX_MESSAGE = 1024 * 1024  # bytes of UTF-8
MAX_TOPIC = 65_535  # bytes of UTF-8, as in MQTT
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; frame-ancestors 'none'; "
CSP += "require-trusted-types-for 'script'"
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
CHANNEL = "pubsub"  # in Redis, one for all topics
OUTBOX = 1000  # messages on their way to Redis; if there are more, publishers wait
RETRY = 0.5  # seconds before the next attempt to reach Redis
REDIS_TIMEOUT = 5  # seconds after which a Redis that does not answer counts as gone
# Raised by calls to Redis. uvloop raises RuntimeError if the connection has just been closed.
FAILED = (RedisError, OSError, RuntimeError)


class Subscribe(BaseModel):
    type: Literal["subscribe", "unsubscribe"]
    topic: str | Annotated[list[str], Field(max_length=1000)]


class Publish(BaseModel):
    type: Literal["publish"]
    topic: str
    data: Any


class Send(BaseModel):
    type: Literal["send"]
    to: str | list[str]
    data: Any


Command = Annotated[Subscribe | Publish | Send, Field(discriminator="type")]
COMMAND = TypeAdapter[Subscribe | Publish | Send](Command)
# What an envelope begins with: the process that sent it, the topic, and the ids.
Head = tuple[str, str | None, list[str] | None]
HEAD = TypeAdapter[Head](Head)


class Broker:
    """Connects this process to the others, over one channel of Redis Pub/Sub."""

    def __init__(self, url: str) -> None:
        # With protocol 3, the first message after Redis was away is lost.
        options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
        options["socket_timeout"] = REDIS_TIMEOUT
        self.redis = Redis.from_url(url, **options)
        self.outbox: asyncio.Queue[str] = asyncio.Queue(OUTBOX)
        self.connected = asyncio.Event()
        self.tried = asyncio.Event()

    @asynccontextmanager
    async def connect(self, handle: Callable[[str | None], Awaitable[None]]) -> AsyncIterator[None]:
        """Call `handle` with each envelope of any process, and with None if some may be lost."""
        async with self.redis, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.forward()), group.create_task(self.subscribe(handle))]
            # Wait for Redis, or the first messages would stay in their process.
            with suppress(TimeoutError):
                async with asyncio.timeout(REDIS_TIMEOUT):
                    await self.tried.wait()
            yield
            for task in tasks:
                task.cancel()

    async def send(self, envelope: str) -> None:
        """Bring an envelope to all processes."""
        if self.connected.is_set():
            await self.outbox.put(envelope)

    async def forward(self) -> None:
        """Send to Redis what is in the outbox, all of it in one call. Keep nothing that fails."""
        envelopes: list[str] = []
        while True:
            if not envelopes:
                envelopes.append(await self.outbox.get())
            while not self.outbox.empty():
                envelopes.append(self.outbox.get_nowait())
            try:
                async with self.redis.pipeline(transaction=False) as pipe:
                    for envelope in envelopes:
                        pipe.publish(CHANNEL, envelope)
                    await pipe.execute()
                envelopes = []
            except FAILED:
                # If Redis is gone, subscribe() notices it too, and logs it.
                envelopes = [self.lost()]
                await asyncio.sleep(RETRY)

    def lost(self) -> str:
        """Return an envelope that tells the subscribers of the other processes of a gap."""
        return json.dumps([PROCESS, None, None]) + "\n" + encode({"type": "dropped", "count": None})

    async def subscribe(self, handle: Callable[[str | None], Awaitable[None]]) -> None:
        """Handle what comes from Redis. If Redis is gone, say so once, and try until it is back."""
        gone = False
        while True:
            try:
                async with self.redis.pubsub() as pubsub:
                    await pubsub.subscribe(CHANNEL)
                    pinged = False
                    while True:
                        message = await pubsub.get_message(timeout=REDIS_TIMEOUT)
                        if message is None and pinged:
                            raise TimeoutError("no answer")
                        pinged = message is None
                        if message is None:
                            # Ask on this connection: others may still work. The pong is a message.
                            await pubsub.ping()
                        elif message["type"] == "message":
                            await self.open(message["data"], handle)
                        elif message["type"] == "subscribe":
                            if gone:
                                log.info("Redis is back")
                                await handle(None)
                                await self.outbox.put(self.lost())
                            gone = False
                            self.connected.set()
                            self.tried.set()
            except FAILED as error:
                self.connected.clear()
                self.tried.set()
                if not gone:
                    log.error("Redis is gone (%s): messages stay in their process", error)
                gone = True
                await asyncio.sleep(RETRY)

    async def open(self, data: bytes, handle: Callable[[str | None], Awaitable[None]]) -> None:
        """Handle an envelope. Other programs may use the channel, too."""
        try:
            await handle(data.decode())
        except ValueError:
            log.error("the channel %s brought something that is not ours: %.80r", CHANNEL, data)


class Subscriber:
    """What a connection has subscribed to, and the messages that wait to be sent to it."""

    unsent = 0  # messages since a sender last ran, for any subscriber

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.filters: set[str] = set()
        self.buffer: deque[str] = deque()
        self.filled = asyncio.Event()
        self.dropped = 0
        self.limit = asyncio.timeout(None)  # runs out when the subscriber must be disconnected

    def subscribe(self, topic: str) -> None:
        filters.setdefault(topic, {})[self] = None
        matcher[topic] = filters[topic]
        self.filters.add(topic)

    def unsubscribe(self, topic: str) -> None:
        if topic in self.filters:
            self.filters.remove(topic)
            del filters[topic][self]
            if not filters[topic]:
                del filters[topic], matcher[topic]

    def leave(self) -> None:
        """Get no more messages."""
        subscribers.pop(self.id, None)
        for topic in list(self.filters):
            self.unsubscribe(topic)

    def put(self, message: str) -> None:
        """Add a message to the buffer. This never waits: a slow subscriber delays nobody else."""
        if len(self.buffer) == BUFFER:
            self.buffer.popleft()
            self.dropped += 1
            if WHEN_SLOW == "disconnect":
                self.leave()
                self.limit.reschedule(0)
        self.buffer.append(message)
        self.filled.set()

    async def deliver(self, handle: Callable[[str], Awaitable[object]]) -> None:
        """Call `handle` with each message. If some were dropped, say how many before the next."""
        while await self.filled.wait():
            Subscriber.unsent = 0
            while self.buffer:
                message = self.buffer.popleft()
                if self.dropped:
                    notice = encode({"type": "dropped", "count": self.dropped})
                    self.dropped = 0
                    await handle(notice)
                await handle(message)
            self.filled.clear()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with broker.connect(receive):
        with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
            yield


app = FastAPI(lifespan=lifespan)
try:
    broker = Broker(REDIS_URL)
except ValueError as error:
    log.error("REDIS_URL is not the address of a Redis: %s", error)
    sys.exit(3)  # tells uvicorn not to start this worker again
PROCESS = secrets.token_hex(8)
subscribers: dict[str, Subscriber] = {}  # by id
# The subscribers of each filter. A dict keeps their order, and iterating over it is faster.
filters: dict[str, dict[Subscriber, None]] = {}
# The same as a tree with a level for each `/`, so that filters for other topics cost nothing.
matcher = MQTTMatcher()


def encode(message: dict[str, Any]) -> str:
    """Return the message as JSON. Raise ValueError if that is impossible, as for 1e999."""
    text = json.dumps(
        message,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
        default=to_jsonable_python,
    )
    text.encode()  # raises ValueError for half a surrogate pair
    return text


def check(topic: str | list[str], wildcards: bool) -> list[str]:
    """Return a list of topics or, with `wildcards`, filters. Raise ValueError if one is neither."""
    topics = [topic] if isinstance(topic, str) else topic
    for one in topics:
        levels = one.split("/")
        if not one or len(one.encode()) > MAX_TOPIC or len(levels) > 200 or "\0" in one:
            raise ValueError(f"a topic has 1 to {MAX_TOPIC} bytes, up to 200 levels, and no NUL")
        if not wildcards and ("+" in one or "#" in one):
            raise ValueError("a topic to publish to has no wildcards, + or #")
        if any("+" in level and level != "+" for level in levels):
            raise ValueError("the wildcard + is a whole level, as in a/+/c")
        if any("#" in level and level != "#" for level in levels) or "#" in levels[:-1]:
            raise ValueError("the wildcard # is the whole last level, as in a/#")
    return topics


def matching(topic: str) -> dict[Subscriber, None]:
    """Return the subscribers with a filter that matches, each one once."""
    found: dict[Subscriber, None] = {}
    for group in matcher.iter_match(topic):
        found |= group
    return found


async def fan_out(topic: str | None, to: list[str] | None, message: str) -> int:
    """Give a message to a topic's subscribers, or to these ids, or to all. Return how many."""
    if topic is not None:
        reached = list(matching(topic))
    elif to is not None:
        reached = [subscribers[name] for name in dict.fromkeys(to) if name in subscribers]
    else:
        reached = list(subscribers.values())
    for subscriber in reached:
        subscriber.put(message)
    await let_senders_run()
    return len(reached)


async def let_senders_run() -> None:
    """Pause once in a while, so that fast publishers do not fill the buffers of fast readers."""
    Subscriber.unsent += 1
    if Subscriber.unsent >= BURST:
        await asyncio.sleep(0)


async def receive(envelope: str | None) -> None:
    """Fan out what the broker brings from another process. None: messages may be missing."""
    if envelope is None:
        await fan_out(None, None, encode({"type": "dropped", "count": None}))
        return
    head, message = envelope.split("\n", 1)
    process, topic, to = HEAD.validate_json(head)
    if process != PROCESS:
        await fan_out(topic, to, message)


async def spread(topic: str | None, to: list[str] | None, data: Any, sender: str | None) -> int:
    """Fan out a message in all processes. Return how many subscribers this process reached."""
    message = encode({"type": "message", "topic": topic, "data": data, "from": sender})
    reached = await fan_out(topic, to, message)
    await broker.send(json.dumps([PROCESS, topic, to]) + "\n" + message)
    return reached


async def publish(topic: str | list[str], data: Any, sender: str | None = None) -> int:
    """Publish from anywhere in this program. Raise ValueError if the topic or the data is bad."""
    return sum([await spread(one, None, data, sender) for one in check(topic, wildcards=False)])


async def send(to: list[str] | None, data: Any, sender: str | None = None) -> int:
    """Send to the connections with these ids, or to all."""
    return await spread(None, to, data, sender)


async def listen(topic: str | list[str], callback: Callable[[Any], Awaitable[object]]) -> None:
    """Subscribe from this program: await `callback` with each message, until cancelled."""

    async def handle(message: str) -> None:
        try:
            await callback(from_json(message))
        except Exception:
            log.exception("a callback for %s failed", topic)

    async with joined() as subscriber:
        for one in check(topic, wildcards=True):
            subscriber.subscribe(one)
        await subscriber.deliver(handle)


@asynccontextmanager
async def joined() -> AsyncIterator[Subscriber]:
    """Add a subscriber. Raise TimeoutError when it is too slow and WHEN_SLOW is "disconnect"."""
    subscriber = Subscriber()
    subscribers[subscriber.id] = subscriber
    try:
        async with subscriber.limit:
            yield subscriber
    finally:
        subscriber.leave()


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


async def run_command(subscriber: Subscriber, text: str | None) -> None:
    """Do what a client says. Raise ValueError if it makes no sense. None is a binary frame."""
    if text is None:
        raise ValueError("a binary frame: send JSON as text")
    if len(text.encode()) > MAX_MESSAGE:
        raise ValueError(f"a message has at most {MAX_MESSAGE} bytes")
    match COMMAND.validate_json(text):
        case Publish(topic=topic, data=data):
            await publish(topic, data, subscriber.id)
        case Send(to=to, data=data):
            await send([to] if isinstance(to, str) else to, data, subscriber.id)
        case Subscribe(type=command, topic=topics):
            for topic in check(topics, wildcards=True):
                if command == "subscribe":
                    subscriber.subscribe(topic)
                else:
                    subscriber.unsubscribe(topic)
            await answer(subscriber, type=f"{command}d", topic=topics)


async def handle_frame(subscriber: Subscriber, text: str | None) -> None:
    """Run a command. If it is wrong, answer with an error: the connection stays open."""
    try:
        await run_command(subscriber, text)
    except ValidationError as error:
        wrong = error.errors()[0]
        reason = ": ".join([*map(str, wrong["loc"]), wrong["msg"]])
        await answer(subscriber, type="error", reason=reason)
    except ValueError as error:
        await answer(subscriber, type="error", reason=str(error))


async def answer(subscriber: Subscriber, **message: Any) -> None:
    subscriber.put(encode(message))
    await let_senders_run()


async def send_messages(websocket: WebSocket, subscriber: Subscriber) -> None:
    """Send messages until the client leaves."""
    with suppress(*GONE):
        await subscriber.deliver(websocket.send_text)


async def serve(websocket: WebSocket) -> None:
    async with joined() as subscriber, asyncio.TaskGroup() as group:
        sender = group.create_task(send_messages(websocket, subscriber))
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        await answer(subscriber, type="welcome", id=subscriber.id, **place)
        for topic in websocket.query_params.getlist("topic"):
            await handle_frame(subscriber, json.dumps({"type": "subscribe", "topic": topic}))
        # Only receive() tells us that the client has left, or that uvicorn is stopping.
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            await handle_frame(subscriber, message.get("text"))
        sender.cancel()


@app.websocket("/ws", dependencies=[Depends(same_origin)])
async def connect(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the client does not read its messages, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        try:
            await serve(websocket)
        except TimeoutError:
            raise WebSocketException(1013, f"too slow: {BUFFER} messages waited") from None


async def refuse_when_stopping() -> AsyncIterator[None]:
    """Refuse a request that still waits when the server stops: uvicorn cancels it."""
    try:
        yield
    except asyncio.CancelledError:
        raise HTTPException(503, "the server is stopping") from None


# What both routes to publish depend on.
POST = [Depends(same_origin), Depends(refuse_when_stopping)]


async def body(request: Request) -> Any:
    """Return the JSON of a request, whatever its Content-Type: `curl -d` needs no header."""
    received = b""
    try:
        async for chunk in request.stream():
            received += chunk
            if len(received) > MAX_MESSAGE:
                raise HTTPException(413, f"a message has at most {MAX_MESSAGE} bytes")
        return from_json(received, allow_inf_nan=False)
    except ClientDisconnect:
        raise HTTPException(400, "the client left before it had sent all") from None
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {error}") from None


@app.post("/publish/{topic:path}", dependencies=POST)
async def publish_by_http(topic: str, data: Annotated[Any, Depends(body)]) -> dict[str, int]:
    try:
        return {"reached": await publish(topic, data)}
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


@app.post("/broadcast", dependencies=POST)
async def broadcast_by_http(data: Annotated[Any, Depends(body)]) -> dict[str, int]:
    try:
        return {"reached": await send(None, data)}
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


@app.get("/stats")
async def stats() -> dict[str, int]:
    """Count the subscribers of this process. A load balancer may ask here whether it is ready."""
    return {"subscribers": len(subscribers)}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/chat.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("Publish and subscribe over one websocket, /ws.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
