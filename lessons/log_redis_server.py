# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.140.12", "redis[hiredis]>=6", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Keep what was sent across restarts, for all workers and machines: log_server.py over Redis.

It differs from log_server.py in the class Storage and its configuration. Run `redis-server`, then
`uvicorn lessons.log_redis_server:app --workers 4`, and connect as with log_server.py. A consumer
that resumes at any worker, also after a restart, gets each event once, in order, and is told if
events are gone, as long as Redis keeps what it has confirmed.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import uvicorn
from anyio import BrokenResourceError
from fastapi import Depends, FastAPI, Header, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic_core import from_json
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

KEEP = 1000  # events of each stream
MAX_STREAMS = 1000
EXPIRE = 300  # seconds that an unused stream is kept
WORD_EVERY = 0.05  # seconds between two words of a job
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a stream
TIMEOUT = 1  # seconds to wait for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BURST = 32  # events that a consumer gets in a row before the others get a turn
TOO_MANY = "there are too many streams: try again later"
FRAME = '{"offset": %d, "payload": %s}'  # of an event
BAD_AFTER = "`after` must be EPOCH:OFFSET or 0"
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
# Raised by calls to Redis: OSError, or RuntimeError from uvloop, if the connection has just closed.
FAILED = (RedisError, OSError, RuntimeError)
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
REDIS_TIMEOUT = 5  # seconds to wait for an answer from Redis
RETRY = 0.2  # seconds before the next attempt to reach Redis
HEARTBEAT = 3  # seconds after which a worker says again which streams and jobs it has
JOB_TIMEOUT = 10  # seconds without a heartbeat after which a job has failed
# Redis Cluster keeps all keys with the same {tag} on one node, so that a script may use them all.
STREAM = "{log}:stream:"  # and the stream's name
STREAMS = "{log}:streams"  # a hash of what the script below knows about each stream
CHANGED = "{log}:changed"  # a Stream that tells all workers which streams have changed
JOBS = "{log}:jobs"  # a sorted set: until when each job is known to run
# Append an event, end the stream, or do nothing, and return what the stream holds. The id of an
# event is its epoch and its offset. Nothing else runs in Redis while a script runs.
WRITE = """
local stream, streams, changed = KEYS[1], KEYS[2], KEYS[3]
local name, keep, most, expire, kind, value = unpack(ARGV)
local saved = redis.call('EXISTS', stream) == 1 and redis.call('HGET', streams, stream)
local state
if saved then
    state = cjson.decode(saved)
else
    for _, other in ipairs(redis.call('HKEYS', streams)) do
        if redis.call('EXISTS', other) == 0 then  -- it has expired
            redis.call('HDEL', streams, other)
        end
    end
    if redis.call('HLEN', streams) >= tonumber(most) then
        return false
    end
    local time = redis.call('TIME')
    state = {name = name, epoch = time[1] .. string.format('%06d', time[2]), next = 1}
    redis.call('XADD', stream, 'MAXLEN', 0, state.epoch .. '-0', 'payload', '')  -- stays empty
end
if kind == 'event' and not state['end'] then
    redis.call('XADD', stream, 'MAXLEN', keep, state.epoch .. '-' .. state.next, 'payload', value)
    state.next = state.next + 1
elseif kind == 'end' and not state['end'] then
    state['end'] = value
end
state.first = state.next - redis.call('XLEN', stream)
local news = cjson.encode(state)
redis.call('EXPIRE', stream, expire)
if news ~= saved then
    redis.call('HSET', streams, stream, news)
    redis.call('XADD', changed, 'MAXLEN', 1000, '*', 'state', news)
end
return news
"""
# Renew the jobs of a worker, and return the jobs that nobody has renewed for too long. All workers
# use the clock of Redis.
RENEW = """
local jobs, timeout = KEYS[1], ARGV[1]
local now = redis.call('TIME')[1]
for i = 2, #ARGV do
    redis.call('ZADD', jobs, now + timeout, ARGV[i])
end
return redis.call('ZRANGEBYSCORE', jobs, 0, now)
"""


class Refusal(Exception):
    """Has a close code for a websocket, a status for an HTTP request, and a reason for both."""


class Event(NamedTuple):
    offset: int
    payload: str
    frame: str  # for websockets; made once, not once for each consumer


class Stream:
    """The events of a stream, and the consumers that wait for the next one."""

    def __init__(self, name: str, epoch: str) -> None:
        self.name = name
        self.epoch = epoch  # tells this stream from a later one of the same name
        self.events: deque[Event] = deque(maxlen=KEEP)
        self.first = 1  # the oldest offset that is kept
        self.next = 1  # the next offset to be assigned
        self.end: str | None = None
        self.changed = asyncio.Event()
        self.users = 0
        self.used_at = time.monotonic()

    def notify(self) -> None:
        """Wake all consumers that wait. A consumer that comes later waits for the next change."""
        self.changed.set()
        self.changed.clear()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the stream for as long as somebody reads or writes it. An unused stream expires."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.used_at = time.monotonic()

    def resume(self, after: str | None) -> tuple[int, dict[str, Any]]:
        """Return a consumer's next offset, and the first frame that it gets.

        `after` is EPOCH:OFFSET, or 0 for all events, or None for new events only.
        """
        epoch = self.epoch
        start = self.next
        if after == "0":
            start = 1
        elif after is not None:
            epoch, _, offset = after.rpartition(":")
            try:
                start = int(offset) + 1
            except ValueError:
                raise Refusal(1008, 400, BAD_AFTER) from None
        recovered = epoch == self.epoch and self.first <= start <= self.next
        if not recovered:
            start = self.first
        status: dict[str, Any] = {"epoch": self.epoch, "first": self.first, "next": self.next}
        return start, {**status, "recovered": recovered}


class Storage:
    """Keeps the streams in Redis, and the jobs of this process that write to them."""

    def __init__(self) -> None:
        # The streams that this process uses, each with the events that it read last.
        self.streams: dict[str, Stream] = {}
        self.jobs: dict[str, asyncio.Task[None]] = {}
        # One consumer of a stream reads from Redis at a time, and the others use what it read.
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # Each call takes one, in order. With a BlockingConnectionPool, some may time out.
        self.connections = asyncio.Semaphore(8)
        self.reachable = True
        try:
            # redis-py would repeat a command if the connection breaks: an event could come twice.
            self.redis = Redis.from_url(
                REDIS_URL,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,  # call() has a timeout
                protocol=2,  # with 3, xread() returns a dict
                decode_responses=True,
            )
        except ValueError as error:
            log.error("REDIS_URL is not the address of a Redis: %s", error)
            sys.exit(3)  # tells uvicorn not to start this worker again
        self.write_script = self.redis.register_script(WRITE)
        self.renew_script = self.redis.register_script(RENEW)

    async def call(self, command: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Call Redis. Refuse the client if Redis refuses or does not answer."""
        try:
            async with asyncio.timeout(REDIS_TIMEOUT), self.connections:
                result = await command(*args, **kwargs)
        except ResponseError as error:
            # The message of a script's error begins with the place in the script.
            why = re.sub(r".*@user_script: ?\d+: ?-?([A-Z]+ )?", "", str(error))
            raise Refusal(1013, 503, f"Redis refuses: {why:.90}") from None
        except FAILED as error:
            if self.reachable:
                why = str(error) or "no answer"
                log.error("Redis is gone (%s): producers get 1013, consumers wait", why)
            self.reachable = False
            raise Refusal(1013, 503, "Redis does not answer: try again later") from None
        if not self.reachable:
            log.info("Redis is back")
        self.reachable = True
        return result

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[None]:
        """Connect to Redis, or end the server if it has just been started."""
        try:
            async with asyncio.timeout(REDIS_TIMEOUT):
                await self.redis.ping()
        except FAILED as error:
            # The first worker ends the server. One that replaces a dead worker waits for Redis.
            if multiprocessing.current_process().name in ("MainProcess", "SpawnProcess-1"):
                address = re.sub("//.*@", "//", REDIS_URL.partition("?")[0])  # without a password
                why = str(error) or "no answer"
                log.error("no Redis at %s (%s): start redis-server, or set REDIS_URL", address, why)
                # uvicorn ends after exit code 3. An exception would log a traceback.
                os._exit(3)
            self.reachable = False
        tasks = [asyncio.create_task(self.keep_running(loop)) for loop in (self.watch, self.renew)]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self.redis.aclose()

    async def keep_running(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop. Whenever Redis fails, start it again."""
        while True:
            with suppress(Refusal):
                await loop()
            await asyncio.sleep(RETRY)

    async def watch(self) -> None:
        """Take in what any worker changes in any stream."""
        last = "0"
        while True:
            for _, changes in await self.call(self.redis.xread, {CHANGED: last}, block=1000):
                for number, change in changes:
                    last = number
                    state = json.loads(change["state"])
                    if state["name"] in self.streams:
                        self.update(state)

    async def renew(self) -> None:
        """Keep the streams and the jobs of this worker, and end the jobs of dead workers."""
        # After a long time without Redis, all jobs look dead. Let other workers renew theirs first.
        await self.renew_jobs()
        while True:
            for stream in list(self.streams.values()):
                if stream.users > 0:
                    await self.write(stream.name)
            await asyncio.sleep(HEARTBEAT)
            for name in await self.renew_jobs():
                await self.end_job(name, "failed")

    async def renew_jobs(self) -> Any:
        """Say that the jobs of this worker are running. Return the jobs of dead workers."""
        return await self.call(self.renew_script, [JOBS], [JOB_TIMEOUT, *self.jobs])

    async def write(self, name: str, kind: str = "", value: str = "") -> dict[str, Any]:
        """Append an event, end the stream, or do nothing. Return what the stream holds.

        Return {} if the stream does not exist, and there are too many others to make it.
        """
        # A stream in use expires only if no worker has renewed it for EXPIRE seconds.
        arguments: list[Any] = [name, KEEP, MAX_STREAMS, EXPIRE + HEARTBEAT, kind, value]
        known = self.streams.get(name)
        before = (known.epoch, known.next) if known else ("", 0)
        keys = [STREAM + name, STREAMS, CHANGED]
        news = await self.call(self.write_script, keys, arguments)
        state: dict[str, Any] = json.loads(news or "{}")
        # Epochs and offsets only grow, unless Redis has lost the stream or its newest events.
        if known and (not state or (state["epoch"], state["next"]) < before):
            self.drop(known)
        if state:
            self.update(state)
        return state

    def drop(self, stream: Stream) -> None:
        """Close the consumers of a stream that Redis has lost."""
        if self.streams.get(stream.name) is stream:
            del self.streams[stream.name]
        stream.end = None  # they did not get all events before it
        stream.notify()

    def update(self, state: dict[str, Any]) -> None:
        """Note what a stream holds, and wake its consumers. If it has ended, stop its job."""
        name, epoch = state["name"], state["epoch"]
        stream = self.streams.get(name)
        if stream is None or stream.epoch < epoch:
            if stream is not None:
                self.drop(stream)
            stream = self.streams[name] = Stream(name, epoch)
        # Answers on two connections may come in another order.
        if stream.epoch > epoch or stream.next > state["next"]:
            return
        changed = stream.next < state["next"] or stream.end != state.get("end")
        stream.first = state["first"]
        stream.next = state["next"]
        stream.end = state.get("end", stream.end)
        if changed:
            stream.notify()
        if stream.end and name in self.jobs:
            self.jobs[name].cancel()

    async def open(self, name: str) -> Stream:
        """Return the stream, and make it if it does not exist."""
        oldest = time.monotonic() - EXPIRE
        for stream in list(self.streams.values()):
            if stream.users == 0 and stream.used_at < oldest:
                del self.streams[stream.name]
                self.locks.pop(stream.name, None)
        if not await self.write(name):
            raise Refusal(1013, 503, TOO_MANY)
        self.streams[name].used_at = time.monotonic()
        return self.streams[name]

    async def append(self, stream: Stream, payload: str) -> bool:
        """Add an event. Return False if the stream has ended."""
        state = await self.write(stream.name, "event", payload)
        if not state:
            raise Refusal(1013, 503, TOO_MANY)
        return "end" not in state

    async def read(self, stream: Stream, offset: int) -> AsyncIterator[Event | int]:
        """Yield all events from `offset` on, and each new one, until the stream or the server ends.

        If events were dropped before the consumer could read them, yield how many.
        """
        while not stopping.is_set() and self.streams.get(stream.name) is stream:
            if event := self.find(stream, offset):
                yield event
                offset += 1
            elif offset < stream.next:
                missed = await self.fetch(stream, offset)
                if missed > 0:
                    yield missed
                    offset += missed
            elif stream.end:
                return
            else:
                await stream.changed.wait()

    def find(self, stream: Stream, offset: int) -> Event | None:
        """Return an event if it was fetched a moment ago, or None."""
        if stream.events:
            index = offset - stream.events[0].offset
            if 0 <= index < len(stream.events):
                return stream.events[index]
        return None

    async def fetch(self, stream: Stream, offset: int) -> int:
        """Read the next events from Redis, once for all consumers. Return how many are missing.

        If Redis is gone, wait a moment.
        """
        async with self.locks[stream.name]:
            if self.find(stream, offset):
                return 0
            # An id without an offset stands for all ids of this epoch.
            first, last = f"{stream.epoch}-{offset}", stream.epoch
            key = STREAM + stream.name
            try:
                found = await self.call(self.redis.xrange, key, first, last, count=BURST)
                if not found:
                    # Redis has lost the stream. write() ends the consumers.
                    await self.write(stream.name)
                    return 0
            except Refusal:
                await asyncio.sleep(RETRY)
                return 0
            stream.events.clear()
            for entry, fields in found:
                number = int(entry.partition("-")[2])
                frame = FRAME % (number, fields["payload"])
                stream.events.append(Event(number, fields["payload"], frame))
            return stream.events[0].offset - offset

    async def start_job(self, stream: Stream, job: Coroutine[Any, Any, None]) -> None:
        self.jobs[stream.name] = asyncio.create_task(job)
        await self.renew_jobs()

    async def stop_job(self, name: str) -> bool:
        """Stop a job, whichever worker runs it. Return False if there is no such job."""
        if await self.call(self.redis.zscore, JOBS, name) is None:
            return False
        await self.end_job(name, "stopped")
        return True

    async def finish(self, stream: Stream, end: str) -> None:
        """End the stream of a job."""
        # From here on, nothing stops this task.
        del self.jobs[stream.name]
        # If Redis is gone, the job has failed: see renew().
        with suppress(Refusal):
            await self.end_job(stream.name, end)

    async def end_job(self, name: str, end: str) -> None:
        """Write the end of a stream, which stops its job. Only the first end counts."""
        await self.write(name, "end", end)
        await self.call(self.redis.zrem, JOBS, name)

    async def stats(self) -> dict[str, int]:
        """Count the events of each stream."""
        saved = await self.call(self.redis.hgetall, STREAMS)
        async with self.redis.pipeline(transaction=False) as pipe:
            for key in saved:
                pipe.exists(key)
            exist = await self.call(pipe.execute)
        counts = {}
        for text, exists in zip(saved.values(), exist, strict=True):
            state = json.loads(text)
            if exists:
                counts[state["name"]] = state["next"] - state["first"]
        return counts


def stop() -> None:
    """Let all consumers end."""
    stopping.set()
    for stream in storage.streams.values():
        stream.notify()


def listen_to_signals() -> None:
    """Call stop() when uvicorn is told to stop. Nothing else tells an HTTP response to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # This is uvicorn's handler, which must run, too.
        handler = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, handler: Any = handler) -> None:
            loop.call_soon_threadsafe(stop)
            handler(number, frame)

        if callable(handler):
            signal.signal(number, handle)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if threading.current_thread() is threading.main_thread():  # only there is it allowed
        listen_to_signals()
    async with storage.connect():
        with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
            yield  # until every endpoint has returned
        jobs = list(storage.jobs.values())
        for job in jobs:
            job.cancel()
        if jobs:
            await asyncio.wait(jobs, timeout=TIMEOUT)


app = FastAPI(lifespan=lifespan)
storage = Storage()
stopping = asyncio.Event()


class ClientsMayLeave:
    """Middleware that keeps an HTTP client from causing a traceback.

    If the client leaves while it sends its request, Starlette raises ClientDisconnect. If it leaves
    while it gets events, FastAPI raises BrokenResourceError (fastapi/fastapi#15725). If it does not
    read, uvicorn cancels the response when it stops.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except* (ClientDisconnect, BrokenResourceError, asyncio.CancelledError):
            pass


app.add_middleware(ClientsMayLeave)


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


@app.exception_handler(Refusal)
async def refuse(connection: Request | WebSocket, refusal: Refusal) -> Response | None:
    code, status, reason = refusal.args
    if isinstance(connection, WebSocket):
        await close(connection, WebSocketException(code, reason))
        return None
    return JSONResponse({"detail": reason}, status)


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


async def check_name(stream: str) -> None:
    """Refuse the request with 404 if this is no name for a stream."""
    if not NAME.fullmatch(stream):
        raise HTTPException(404, "a stream's name has 1 to 64 letters, digits, '-', '_' or '.'")


CHECKS = [Depends(same_origin), Depends(check_name)]


# `:path` also matches a name with a slash in it, so that check_name() can refuse it.
@app.websocket("/ws/{stream:path}/producer", dependencies=CHECKS)
async def producer(websocket: WebSocket, stream: str) -> None:
    await websocket.accept()
    target = await storage.open(stream)
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with target.in_use(), suppress(asyncio.CancelledError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            payload = validate(message.get("text"))
            if not await storage.append(target, payload):
                raise WebSocketException(1008, "this stream has ended")
            # The receipt. The event is kept, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)
            # A fast producer does not pause above. Let the consumers read before events drop out.
            if target.next % BURST == 0:
                await asyncio.sleep(0)


async def send_events(websocket: WebSocket, stream: Stream, start: int) -> None:
    """Send events until the consumer leaves, or the stream ends."""
    sent = 0
    with suppress(*GONE):
        async for item in storage.read(stream, start):
            if isinstance(item, Event):
                await websocket.send_text(item.frame)
            else:
                await websocket.send_text(json.dumps({"missed": item}))
            sent += 1
            # While there are events, nothing above pauses: let the other consumers run.
            if sent % BURST == 0:
                await asyncio.sleep(0)
        if stream.end and not stopping.is_set():
            await websocket.send_text(json.dumps({"end": stream.end}))
            await websocket.close(1000)
        else:
            # The server is stopping, or its storage has lost this stream.
            await websocket.close(1012)


@app.websocket("/ws/{stream:path}/consumer", dependencies=CHECKS)
async def consumer(websocket: WebSocket, stream: str, after: str | None = None) -> None:
    await websocket.accept()
    source = await storage.open(stream)
    start, status = source.resume(after)
    # If the consumer does not read its events, uvicorn cancels this endpoint when it stops.
    with source.in_use(), suppress(asyncio.CancelledError, *GONE):
        await websocket.send_json(status)
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_events(websocket, source, start))
            # Only receive() tells us that the consumer has left, or that uvicorn is stopping.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
            sender.cancel()


async def find_for_http(
    stream: str,
    after: str | None = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[tuple[Stream, int, dict[str, Any]]]:
    """Find what an EventSource asks for. If it reconnects, it sends the id of its last event."""
    source = await storage.open(stream)
    # Not in events(): if the client leaves amid events, FastAPI does not close that generator.
    with source.in_use():
        yield source, *source.resume(last_event_id or after)


@app.get("/streams/{stream:path}", response_class=EventSourceResponse, dependencies=CHECKS)
async def events(
    found: Annotated[tuple[Stream, int, dict[str, Any]], Depends(find_for_http)],
) -> AsyncIterator[ServerSentEvent]:
    stream, start, status = found
    # With an id, so that a browser can resume even if it has not seen a single event.
    yield ServerSentEvent(event="start", data=status, id=f"{stream.epoch}:{start - 1}")
    async for item in storage.read(stream, start):
        if isinstance(item, Event):
            yield ServerSentEvent(raw_data=item.payload, id=f"{stream.epoch}:{item.offset}")
        else:
            yield ServerSentEvent(event="missed", data=item)
    if stream.end and not stopping.is_set():
        yield ServerSentEvent(event="end", data=stream.end)


async def body(request: Request) -> Any:
    """Return the JSON of a request, whatever its Content-Type is."""
    received = b""
    async for chunk in request.stream():
        received += chunk
        if len(received) > MAX_PAYLOAD:
            raise HTTPException(413, f"a request has at most {MAX_PAYLOAD} bytes")
    try:
        return from_json(received, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {error}") from None


async def write_words(stream: Stream, request: Any) -> None:
    """Stand in for a language model: write one word after another."""
    text = request if isinstance(request, str) else json.dumps(request)
    for word in f"You asked: {text}".split():
        await storage.append(stream, json.dumps(word))
        await asyncio.sleep(WORD_EVERY)


async def run_job(stream: Stream, request: Any) -> None:
    """Write to the stream. Then end it, and say how the job ended."""
    end = "done"
    with stream.in_use():
        try:
            await write_words(stream, request)
        except asyncio.CancelledError:
            # Nobody else waits for this task, so the cancellation ends here.
            end = "stopped"
        except Exception as error:  # noqa: BLE001
            log.error("%s failed: %r", stream.name, error)
            end = "failed"
        await storage.finish(stream, end)


@app.post("/jobs", dependencies=[Depends(same_origin)])
async def start_job(request: Annotated[Any, Depends(body)]) -> dict[str, str]:
    stream = await storage.open(f"job-{secrets.token_hex(4)}")
    # The job is a task of the server, so it goes on when its consumers leave.
    await storage.start_job(stream, run_job(stream, request))
    return {"stream": stream.name}


@app.delete("/jobs/{name}", dependencies=[Depends(same_origin)])
async def stop_job(name: str) -> dict[str, str]:
    if not await storage.stop_job(name):
        raise HTTPException(404, "there is no such job, or it has ended")
    return {"stream": name}


@app.get("/stats")
async def stats() -> dict[str, Any]:
    return {"streams": await storage.stats(), "keep": KEEP}


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/log.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})
    return PlainTextResponse("A log: send to /ws/STREAM/producer, read from /ws/STREAM/consumer.")


if __name__ == "__main__":
    # Raise the limit, or a client with large cookies gets no answer. Compression costs much CPU.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "1000000")
    options = ["--timeout-graceful-shutdown=1", "--ws-per-message-deflate=false", *sys.argv[1:]]
    uvicorn.main(["__main__:app", *options])
