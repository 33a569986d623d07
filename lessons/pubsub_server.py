# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "paho-mqtt>=2", "redis[hiredis]>=6", "uvicorn>=0.53",
#                 "websockets>=17.0"]
# ///
"""Every subscriber gets a copy: chat rooms, notifications, dashboards. Topics as in MQTT 5; memory or Redis.

Run `python lessons/pubsub_server.py`, `python lessons/pubsub_client.py subscribe 'sensors/#'`, and to publish
`python lessons/pubsub_client.py publish sensors/1 21.5`. With a REDIS_URL, all workers (`uvicorn
lessons.pubsub_server:app --workers 4`) and machines are one. At most once: who is away or slow misses some.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from paho.mqtt.matcher import MQTTMatcher
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

BUFFER = 1000  # messages that wait for a slow subscriber
WHEN_SLOW: Literal["drop oldest", "drop newest", "disconnect"] = "drop oldest"
MAX_MESSAGE = 1024 * 1024  # bytes of UTF-8
MAX_TOPIC, MAX_LEVELS = 65_535, 200  # bytes of UTF-8 (MQTT 5, section 4.7.3); levels are matched recursively
MAX_TOPICS = 1000  # in one subscribe or unsubscribe
REDIS_URL = os.environ.get("REDIS_URL")
CHANNEL = "pubsub"  # in Redis, one for all topics
OUTBOX = 1000  # messages on their way to Redis; then publishers wait
RETRY = 0.5  # seconds between two tries to reach Redis
TIMEOUT = 5  # seconds after which Redis is taken for gone where it does not answer
WORKER = secrets.token_hex(8)
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above
Frame = dict[str, str]  # encoded once, and sent to all


class Subscribe(BaseModel):
    type: Literal["subscribe", "unsubscribe"]
    topic: str | Annotated[list[str], Field(max_length=MAX_TOPICS)]


class Publish(BaseModel):
    type: Literal["publish"]
    topic: str
    data: Any


class Send(BaseModel):
    type: Literal["send"]
    to: str | list[str]
    data: Any


COMMAND = TypeAdapter[Subscribe | Publish | Send](
    Annotated[Subscribe | Publish | Send, Field(discriminator="type")]
)


def frame(message: dict[str, Any]) -> Frame:
    """Encode a message, once for all who get it. Raises ValueError for what has no JSON, as 1e999."""
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text.encode()  # raises for half a surrogate pair here, rather than in what sends to the subscribers
    return {"type": "websocket.send", "text": text}


class Subscriber:
    """A connection, what it subscribed to, and what waits to be sent to it."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.id = secrets.token_hex(8)
        self.filters: set[str] = set()
        self.buffer: deque[Frame] = deque()
        self.busy = False  # whether it is in `ready`, or a task sends to it
        self.dropped = 0

    def deliver(self, message: Frame) -> None:
        """Have it sent. This never waits: where the buffer is full, a message is dropped, and counted."""
        if len(self.buffer) == BUFFER or (self.dropped and WHEN_SLOW != "drop oldest"):
            self.dropped += 1
            if WHEN_SLOW == "disconnect":
                # Now, because send() may wait a long time for a subscriber that has stopped reading.
                forget(self)
                self.buffer.clear()
            if WHEN_SLOW != "drop oldest":
                return
            self.buffer.popleft()
        self.buffer.append(message)
        if not self.busy:
            self.busy = True
            ready.append(self)

    async def send(self) -> None:
        """Send what waits. Where messages are missing, say how many, in their place."""
        while self.buffer:
            message = self.buffer.popleft()
            if self.dropped and WHEN_SLOW == "drop oldest":  # before this one, and not while the notice waits
                await self.say_dropped()
            await self.websocket.send(message)
            if self.dropped and WHEN_SLOW == "disconnect":
                return await self.websocket.close(1013, f"too slow: {BUFFER} messages waited")
            if self.dropped and WHEN_SLOW == "drop newest" and not self.buffer:
                await self.say_dropped()

    async def say_dropped(self) -> None:
        notice, self.dropped = frame({"type": "dropped", "count": self.dropped}), 0
        await self.websocket.send(notice)


ready: deque[Subscriber] = deque()  # for whom something waits
senders: set[asyncio.Task[None]] = set()


def start_sender() -> None:
    """Send to all who are ready, in a task; where that has to wait for a full socket, in another."""
    if ready:
        task = asyncio.create_task(send_all())
        senders.add(task)  # the event loop keeps no reference
        task.add_done_callback(senders.discard)
        asyncio.get_running_loop().call_soon(start_sender)  # by then the task has ended, or waits


async def send_all() -> None:
    while ready:
        subscriber = ready.popleft()
        try:
            await subscriber.send()
        except (WebSocketDisconnect, RuntimeError):
            subscriber.buffer.clear()  # it left, as its endpoint hears
        subscriber.busy = False


subscribers: dict[str, Subscriber] = {}
filters: dict[str, dict[Subscriber, None]] = {}  # who subscribed; in order, as a set costs cache misses
matcher = MQTTMatcher()  # the same as a tree of levels, so that other topics cost a message nothing


def check(topic: str, wildcards: bool) -> None:
    """Raise ValueError for what is no topic name, with `wildcards` no topic filter (MQTT 5, section 4.7)."""
    levels = topic.split("/")
    if not topic or "\0" in topic or len(topic.encode()) > MAX_TOPIC or len(levels) > MAX_LEVELS:
        raise ValueError(f"a topic has 1 to {MAX_TOPIC} bytes, up to {MAX_LEVELS} levels, and no NUL")
    if not wildcards and ("+" in topic or "#" in topic):
        raise ValueError("a topic to publish to has no wildcards, + or #")
    if any("+" in level and level != "+" for level in levels):
        raise ValueError("the wildcard + is a whole level, as in a/+/c")
    if any("#" in level and level != "#" for level in levels) or "#" in levels[:-1]:
        raise ValueError("the wildcard # is the whole last level, as in a/#")


def subscribe(subscriber: Subscriber, topic: str) -> None:
    if topic not in filters:
        filters[topic] = matcher[topic] = {}
    filters[topic][subscriber] = None
    subscriber.filters.add(topic)


def unsubscribe(subscriber: Subscriber, topic: str) -> None:
    if topic in subscriber.filters:
        subscriber.filters.remove(topic)
        del filters[topic][subscriber]
        if not filters[topic]:
            del filters[topic], matcher[topic]


def forget(subscriber: Subscriber) -> None:
    """Deliver nothing more to it."""
    subscribers.pop(subscriber.id, None)
    for topic in list(subscriber.filters):
        unsubscribe(subscriber, topic)


def matching(topic: str) -> dict[Subscriber, None]:
    """The subscribers with a filter that matches; each once, however many of its filters do."""
    found: dict[Subscriber, None] = {}
    for those in matcher.iter_match(topic):
        found |= those
    return found


def deliver(topic: str | None, to: list[str] | None, message: Frame) -> int:
    """Deliver to this process's subscribers: a topic's, or those with these ids, or all. Returns how many."""
    if topic is not None:
        reached = matching(topic)
    elif to is not None:
        reached = {subscribers[name]: None for name in to if name in subscribers}
    else:
        reached = dict.fromkeys(subscribers.values())
    for subscriber in reached:
        subscriber.deliver(message)
    start_sender()
    return len(reached)


async def tell(subscriber: Subscriber, message: Frame) -> None:
    subscriber.deliver(message)
    start_sender()
    await asyncio.sleep(0)  # a turn for the sender: a fast client must not fill its own buffer


async def spread(topic: str | None, to: list[str] | None, message: Frame) -> int:
    """Deliver here and in the other processes. Returns how many subscribers it reached here."""
    reached = deliver(topic, to, message)
    if connected.is_set():
        await outbox.put(json.dumps([WORKER, topic, to]) + "\n" + message["text"])
    await asyncio.sleep(0)  # a turn for those that send: a fast publisher must not fill their buffers alone
    return reached


async def publish(topic: str, data: Any, sender: str | None = None) -> int:
    """Publish from anywhere in this program. Returns how many subscribers it reached in this process.

    Raises ValueError for a topic with wildcards, or data that is not JSON.
    """
    check(topic, wildcards=False)
    return await spread(topic, None, frame({"type": "message", "topic": topic, "data": data, "from": sender}))


async def send(to: list[str] | None, data: Any, sender: str | None = None) -> int:
    """Send to the connections with these ids, None for all. Returns how many it reached in this process."""
    return await spread(None, to, frame({"type": "message", "topic": None, "data": data, "from": sender}))


outbox: asyncio.Queue[str] = asyncio.Queue(OUTBOX)
connected, tried = asyncio.Event(), asyncio.Event()  # to Redis


async def forward(redis: Redis) -> None:
    """Bring messages to Redis, all that wait in one call. What cannot be brought is not kept."""
    while True:
        envelopes = [await outbox.get()]
        while not outbox.empty():
            envelopes.append(outbox.get_nowait())
        with suppress(RedisError):  # listen() hears of it too
            async with redis.pipeline(transaction=False) as pipe:
                for envelope in envelopes:
                    pipe.publish(CHANNEL, envelope)
                await pipe.execute()


async def listen(redis: Redis) -> None:
    """Deliver what other processes publish. Where Redis goes away, say so once, and try until it is back."""
    said = False
    while True:
        try:
            async with redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(CHANNEL)
                if said:
                    log.info("Redis is back")
                said = False
                connected.set()
                tried.set()
                while True:
                    if envelope := await pubsub.get_message(timeout=TIMEOUT):
                        route, text = envelope["data"].split("\n", 1)
                        worker, topic, to = json.loads(route)
                        if worker != WORKER:
                            deliver(topic, to, {"type": "websocket.send", "text": text})
                            await asyncio.sleep(0)  # as in spread()
                    else:
                        await redis.ping()  # raises where Redis is not just silent
        except (TypeError, ValueError) as error:
            log.error("what came through the channel %s is none of our messages: %s", CHANNEL, error)
        except RedisError as error:
            connected.clear()
            if not said:
                log.error("Redis is gone (%s): until it is back, messages stay in their process", error)
            said = True
            tried.set()
            await asyncio.sleep(RETRY)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if not REDIS_URL:
        yield
        return
    redis = Redis.from_url(
        REDIS_URL, decode_responses=True, protocol=2, socket_timeout=TIMEOUT, health_check_interval=TIMEOUT,
        retry=Retry(NoBackoff(), 0),
    )  # fmt: skip
    async with redis:
        tasks = [asyncio.create_task(forward(redis)), asyncio.create_task(listen(redis))]
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await tried.wait()  # or the first messages would stay here
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


app = FastAPI(lifespan=lifespan)


async def same_origin(connection: HTTPConnection) -> None:
    origin, host = connection.headers.get("origin"), connection.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        if connection.scope["type"] == "http":
            raise HTTPException(403, "only pages that this server served")
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


async def obey(subscriber: Subscriber, text: str | None) -> Frame | None:
    """Do what a client says; None is a binary frame. Returns the answer. Raises ValueError."""
    if text is None:
        raise ValueError("a binary frame: send JSON as text")
    if len(text.encode()) > MAX_MESSAGE:
        raise ValueError(f"a message has at most {MAX_MESSAGE} bytes")
    match COMMAND.validate_json(text):
        case Publish(topic=topic, data=data):
            await publish(topic, data, subscriber.id)
        case Send(to=to, data=data):
            await send([to] if isinstance(to, str) else to, data, subscriber.id)
        case Subscribe(type=command, topic=topic):
            topics = [topic] if isinstance(topic, str) else topic
            for one in topics:
                check(one, wildcards=True)
            for one in topics:
                (subscribe if command == "subscribe" else unsubscribe)(subscriber, one)
            return frame({"type": f"{command}d", "topic": topic})
    return None


async def hear(subscriber: Subscriber, text: str | None) -> None:
    """Do what a client says, and answer. What is wrong with it costs nobody the connection."""
    try:
        answer = await obey(subscriber, text)
    except ValidationError as error:
        wrong = error.errors()[0]
        answer = frame({"type": "error", "reason": ": ".join([*map(str, wrong["loc"]), wrong["msg"]])})
    except ValueError as error:
        answer = frame({"type": "error", "reason": str(error)})
    if answer:
        await tell(subscriber, answer)


@app.websocket("/ws", dependencies=[Depends(same_origin)])
async def connect(websocket: WebSocket) -> None:
    await websocket.accept()
    subscriber = Subscriber(websocket)
    subscribers[subscriber.id] = subscriber
    welcome = {"type": "welcome", "id": subscriber.id, "host": socket.gethostname(), "pid": os.getpid()}
    await tell(subscriber, frame(welcome))
    try:
        for topic in websocket.query_params.getlist("topic"):
            await hear(subscriber, json.dumps({"type": "subscribe", "topic": topic}))
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await hear(subscriber, message.get("text"))
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        pass
    finally:
        forget(subscriber)


async def body(request: Request) -> Any:
    """The JSON of a request, whatever it says that it is, so that `curl -d` needs no header."""
    received = b""
    async for chunk in request.stream():
        received += chunk
        if len(received) > MAX_MESSAGE:
            raise HTTPException(413, f"a message has at most {MAX_MESSAGE} bytes")
    try:
        return from_json(received, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {error}") from None


@app.post("/publish/{topic:path}", dependencies=[Depends(same_origin)])
async def publish_by_http(topic: str, data: Annotated[Any, Depends(body)]) -> dict[str, int]:
    try:
        return {"reached": await publish(topic, data)}
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


@app.post("/broadcast", dependencies=[Depends(same_origin)])
async def broadcast_by_http(data: Annotated[Any, Depends(body)]) -> dict[str, int]:
    try:
        return {"reached": await send(None, data)}
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/chat.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("Publish and subscribe over one websocket, /ws.")


if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
