# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "redis[hiredis]>=6", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Many machines, restarts: ack_server.py with its queue in Redis, a Stream that is read by a consumer group.

Run `redis-server` and `uvicorn lessons.redis_server:app --workers 4`, here or on many machines with the same
REDIS_URL, and the clients as with ack_server.py. At least once: what was echoed is not lost with a consumer,
a worker or a machine, nor on restart, as long as Redis keeps it. Read `diff lessons/{ack,redis}_server.py`.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads in the queue; then producers wait
FULL_TIMEOUT = 1  # seconds that a producer waits for room
FULL_PAUSE = 0.04  # seconds between two looks for room, on average
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BATCH = 256  # payloads that one call brings to Redis or from it
MAX_PREFETCH = 1000  # payloads that a consumer may have before it acknowledges the first
SEND_TIMEOUT = 40  # seconds for which a socket may be full, as long as uvicorn waits for an answer to a ping
CLAIM_AFTER = 30  # seconds after which others get the payloads of a worker that died
GATHER = 0.005  # seconds in which acknowledgements gather, to be one call
WAIT = 1000  # milliseconds that a call waits for a payload
TIMEOUT = 5  # seconds after which Redis is taken for gone where it does not answer
RETRY = 0.2  # seconds between two tries to reach Redis
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
STREAM, CHANGED = KEYS = "queue", "queue:changed"  # the payloads; when some came, for workers that wait
GROUP, RETURNED = "workers", "returned"  # RETURNED is no worker: it has what waits to be sent again
WORKER = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
CSP = "default-src 'self' 'unsafe-inline'; script-src-attr 'none'; require-trusted-types-for 'script'; "
CSP += "frame-ancestors 'none'"  # no other site may show this page in a frame
log = logging.getLogger("uvicorn.error")  # the one that uvicorn shows, at INFO and above

# What Redis runs as a script it runs in one go: no other worker comes between the look and the deed.
PUT = """
local group, capacity = ARGV[1], ARGV[2]
redis.pcall('XGROUP', 'CREATE', KEYS[1], group, '0', 'MKSTREAM')  -- fails where it exists
local waiting = redis.call('XLEN', KEYS[1]) - redis.call('XPENDING', KEYS[1], group)[1]
local accepted = math.max(0, math.min(#ARGV - 2, capacity - waiting))
for i = 3, 2 + accepted do redis.call('XADD', KEYS[1], '*', 'payload', ARGV[i]) end
if accepted > 0 then redis.call('XADD', KEYS[2], 'MAXLEN', 1, '*', 'payloads', accepted) end
return accepted"""
TAKE = """
local group, worker, returned, most, ids, entries = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), {}, {}
for i, row in ipairs(redis.call('XPENDING', KEYS[1], group, '-', '+', most, returned)) do ids[i] = row[1] end
if #ids > 0 then entries = redis.call('XCLAIM', KEYS[1], group, worker, 0, unpack(ids)) end
if #ids == most then return entries end
local new = redis.call('XREADGROUP', 'GROUP', group, worker, 'COUNT', most - #ids, 'STREAMS', KEYS[1], '>')
for _, entry in ipairs(new and new[1][2] or {}) do table.insert(entries, entry) end
return entries"""
LEAVE = """
local group, worker = ARGV[1], ARGV[2]
if #redis.call('XPENDING', KEYS[1], group, '-', '+', 1, worker) > 0 then return end  -- they would be lost
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], group, worker)"""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    try:
        await create_group()
    except (RedisError, TimeoutError) as error:
        if multiprocessing.current_process().name in ("MainProcess", "SpawnProcess-1"):  # say it once
            address = re.sub("//.*@", "//", REDIS_URL.partition("?")[0])  # without the password
            why = str(error) or "no answer"
            log.error("no Redis at %s (%s): start redis-server, or set REDIS_URL", address, why)
        os._exit(3)  # uvicorn does not try again then; of an exception it would log the traceback
    tasks = [asyncio.create_task(repeat(step)) for step in (fetch, report, claim)]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    with suppress(WebSocketException, TimeoutError):  # where Redis is gone, others claim what we have
        async with asyncio.timeout(0.5):
            while mine := await call(redis.xpending_range(STREAM, GROUP, "-", "+", BATCH, WORKER)):
                returned.extend(entry["message_id"] for entry in mine)
                await report()
            await call(leave(KEYS, [GROUP, WORKER]))
            log.info("%d payloads were still queued", await queued())
    await redis.aclose()


class Window:
    """What a consumer has and did not acknowledge, what it may still have, and what is being sent to it."""

    def __init__(self, prefetch: int) -> None:
        self.room = prefetch
        self.unsettled: deque[str] = deque()  # ids
        self.payloads: asyncio.Queue[str] = asyncio.Queue()  # those that are not sent yet
        self.sending_since = math.inf  # seconds, by the clock of time.monotonic()


app = FastAPI(lifespan=lifespan)
once = Retry(NoBackoff(), 0)  # a payload that is sent to Redis twice would be there twice
pool = BlockingConnectionPool.from_url(  # without a timeout: its own would cost a task for each call
    REDIS_URL, max_connections=3, socket_timeout=None, decode_responses=True, protocol=2, retry=once
)
redis = Redis.from_pool(pool)
add, take, leave = (redis.register_script(script) for script in (PUT, TAKE, LEAVE))
windows: set[Window] = set()
free: deque[Window] = deque()  # those with room, in line for the next payload
line = asyncio.Lock()  # producers that wait for room
settled: list[str] = []  # ids, until Redis knows
returned: list[Any] = []  # the same; Any, because redis-py asks for a list of all that an id can be
hungry, news = asyncio.Event(), asyncio.Event()  # a consumer has room; Redis has something to be told
reachable = True
refusal = ""  # the last error that Redis answered with


async def call(answer: Awaitable[Any]) -> Any:
    """Wait for Redis. Raises WebSocketException where it does not answer, and logs the first time."""
    global reachable, refusal
    try:
        async with asyncio.timeout(TIMEOUT):  # for a connection too, where many wait for one
            result = await answer
    except ResponseError as error:  # it has no memory left, cannot write to its disk, is a cluster, ...
        # Redis puts where in our script it happened before what happened.
        why = re.sub(r".*@user_script: ?\d+: ?-?([A-Z]+ )?", "", str(error))
        if refusal != why and not why.startswith("NOGROUP"):  # Redis was emptied; repeat() makes the group
            log.error("Redis refuses a command: %s", why)
        refusal = why
        raise WebSocketException(1013, f"Redis refuses: {refusal:.90}") from None
    except (RedisError, TimeoutError) as error:
        if reachable:
            why = str(error) or "no answer"
            log.error("Redis is gone (%s): producers get 1013, consumers wait until it is back", why)
        reachable = False
        raise WebSocketException(1013, "Redis does not answer: try again later") from None
    if not reachable:
        log.info("Redis is back")
    reachable = True
    return result


async def create_group() -> None:
    try:
        async with asyncio.timeout(TIMEOUT):
            await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except ResponseError as error:
        if "BUSYGROUP" not in str(error):  # it exists
            raise


async def repeat(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await step()
        except WebSocketException:
            await asyncio.sleep(RETRY)
            with suppress(RedisError, TimeoutError):
                await create_group()  # Redis may have come back empty


async def fetch() -> None:
    """Take what the consumers can have now, and deal it out. Where there is no more, wait until there is."""
    await give_back_unknown()
    last = "0"
    while True:
        if not free:
            hungry.clear()
            await hungry.wait()
        most = min(BATCH, sum(window.room for window in islice(free, BATCH)))
        entries = await call(take(KEYS, [GROUP, WORKER, RETURNED, most]))
        for payload_id, (_, payload) in entries:
            if not free:  # those that wanted it have left
                returned.append(payload_id)
                news.set()
                continue
            window = free.popleft()
            window.unsettled.append(payload_id)
            window.payloads.put_nowait(payload)
            window.room -= 1
            if window.room:
                free.append(window)
        if len(entries) < most:
            for _, changes in await call(redis.xread({CHANGED: last}, count=1, block=WAIT)):
                last = changes[0][0]


async def give_back_unknown() -> None:
    """Give back what Redis handed over in an answer that came too late. Else it would wait for claim()."""
    await call(redis.ping())  # answered when Redis has run all that it was sent before
    known = {*settled, *returned, *(payload_id for window in windows for payload_id in window.unsettled)}
    mine = await call(redis.xpending_range(STREAM, GROUP, "-", "+", len(known) + BATCH, WORKER))
    returned.extend(entry["message_id"] for entry in mine if entry["message_id"] not in known)
    news.set()


async def report() -> None:
    """Tell Redis, for all consumers in one call, which payloads are settled and which have come back."""
    if not settled and not returned:
        news.clear()
        await news.wait()
        await asyncio.sleep(GATHER)
    done, back = settled[:], returned[:]
    async with redis.pipeline() as pipe:
        if done:
            pipe.xack(STREAM, GROUP, *done)
            pipe.xdel(STREAM, *done)
        if back:
            pipe.xclaim(STREAM, GROUP, RETURNED, 0, back, justid=True)
            pipe.xadd(CHANGED, {"payloads": len(back)}, maxlen=1, approximate=False)
        await call(pipe.execute())
    del settled[: len(done)], returned[: len(back)]


async def claim() -> None:
    """Say that this worker still has what it has, and claim what those have that say so no more."""
    await asyncio.sleep(CLAIM_AFTER / 3)
    mine: list[Any] = [payload_id for window in windows for payload_id in window.unsettled]
    if mine:
        await call(redis.xclaim(STREAM, GROUP, WORKER, 0, mine, justid=True))
    dead = redis.xautoclaim(STREAM, GROUP, RETURNED, CLAIM_AFTER * 1000, count=10_000, justid=True)
    if claimed := await call(dead):
        await call(redis.xadd(CHANGED, {"payloads": len(claimed)}, maxlen=1, approximate=False))


async def queued() -> int:
    async with redis.pipeline() as pipe:
        pipe.xlen(STREAM)
        pipe.xpending(STREAM, GROUP)
        length, pending = await call(pipe.execute())
    unsettled: int = sum(row["pending"] for row in pending["consumers"] if row["name"] != RETURNED)
    return int(length) - unsettled


async def same_origin(websocket: WebSocket) -> None:
    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")  # RFC 6455, section 10.2
    if origin not in (None, f"http://{host}", f"https://{host}"):  # browsers always send it, scripts do not
        log.warning("a page from %s may not connect to %s: open the page at that address", origin, host)
        raise WebSocketException(1008)  # before accept(), so the client sees HTTP 403


@app.exception_handler(WebSocketRequestValidationError)
async def bad_prefetch(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:
    await websocket.accept()  # else the client would see HTTP 403, and no reason
    await websocket.close(1008, f"prefetch: {error.errors()[0]['msg']}")


def check(payload: str | None) -> str:
    """Return the payload; None is a binary frame. A WebSocketException says how to close."""
    if payload is None:
        raise WebSocketException(1003, "a binary frame: send payloads as text")
    if len(payload.encode()) > MAX_PAYLOAD:
        raise WebSocketException(1009, f"a payload has at most {MAX_PAYLOAD} bytes")
    try:
        from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise WebSocketException(1007, f"not JSON: {error}") from None
    return payload


async def put(payloads: list[str]) -> int:
    """Queue the first of the payloads, as many as there is room for, at least one. Returns how many.

    Producers that find no room stand in line. Otherwise each would look for room at its own times, and one
    that always looks just after another would be refused, though room became free all the time.
    """
    if not line.locked() and (accepted := await call(add(KEYS, [GROUP, CAPACITY, *payloads]))):
        return int(accepted)
    deadline = time.monotonic() + FULL_TIMEOUT
    try:
        async with asyncio.timeout(FULL_TIMEOUT):
            await line.acquire()
    except TimeoutError:
        raise WebSocketException(1013, "the queue is full: try again later") from None
    try:
        while not (accepted := await call(add(KEYS, [GROUP, CAPACITY, *payloads]))):
            if time.monotonic() > deadline:
                raise WebSocketException(1013, "the queue is full: try again later")
            await asyncio.sleep(random.uniform(0.5, 1.5) * FULL_PAUSE)  # not in step with another worker
        return int(accepted)
    finally:
        line.release()


async def receive(websocket: WebSocket, payloads: list[str]) -> bool:
    """Wait for a payload, and add all that have come already. False where the producer has left."""
    message = await websocket.receive()
    with suppress(TimeoutError):
        async with asyncio.timeout(0):  # ends the first receive() that would have to wait
            while message["type"] == "websocket.receive":
                payloads.append(check(message.get("text")))
                if len(payloads) == BATCH:
                    return True
                message = await websocket.receive()
            return False
    return True


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    payloads: list[str] = []
    connected = True
    try:
        while connected:
            try:
                connected = await receive(websocket, payloads)
            finally:  # a payload that is refused does not harm those before it
                while payloads:
                    for _ in range(await put(payloads)):
                        with suppress(WebSocketDisconnect, RuntimeError):  # it left, but what it sent counts
                            await websocket.send_text(payloads.pop(0))
    except WebSocketException as refusal:
        log.warning("producer %s closed with %d: %s", websocket.client, refusal.code, refusal.reason)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(FULL_TIMEOUT):  # a client that does not read can't be told
                await websocket.close(refusal.code, refusal.reason)
    except asyncio.CancelledError:  # by --timeout-graceful-shutdown; uvicorn would log a traceback
        log.warning("producer %s was cut off: it does not read its receipts", websocket.client)


async def send_payloads(websocket: WebSocket, window: Window) -> None:
    while True:
        payload = await window.payloads.get()
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
        settled.append(window.unsettled.popleft())
        news.set()
        window.room += 1
        if window.room == 1:
            free.append(window)
            hungry.set()
    return None


@app.websocket("/ws/consumer", dependencies=[Depends(same_origin)])
async def consumer(websocket: WebSocket, prefetch: Annotated[int, Query(ge=1, le=MAX_PREFETCH)] = 1) -> None:
    await websocket.accept()
    window, refusal = Window(prefetch), None
    windows.add(window)
    free.append(window)
    hungry.set()
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
        windows.remove(window)
        with suppress(ValueError):
            free.remove(window)
        returned.extend(window.unsettled)
        news.set()
    if refusal:
        log.warning("consumer %s closed with 1008: %s", websocket.client, refusal)
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(FULL_TIMEOUT):  # a client that does not read can't be told
                await websocket.close(1008, refusal)


@app.get("/stats")
async def stats() -> dict[str, int | bool]:
    try:
        return {"queued": await queued(), "capacity": CAPACITY, "acks": True}
    except WebSocketException as error:
        raise HTTPException(503, error.reason) from None


@app.get("/")
async def index() -> Response:
    page = Path(__file__).parent.parent / "web/index.html"
    if page.exists():
        return FileResponse(page, headers={"Content-Security-Policy": CSP})
    return PlainTextResponse("A queue between websockets: send to /ws/producer, receive from /ws/consumer.")


if __name__ == "__main__":
    # Compression would cost 2 to 5 times the CPU, for clients that offer it, as browsers do.
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=1, ws_per_message_deflate=False)
