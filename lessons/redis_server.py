# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.115.10", "redis[hiredis]>=6", "uvicorn>=0.53", "websockets>=17.0"]
# ///
"""Survive restarts, and span many machines: ack_server.py with its queue in a Redis Stream.

Run `redis-server`, then `uvicorn lessons.redis_server:app --workers 4`, here or on many machines
with the same REDIS_URL, and the clients as with ack_server.py. Each payload arrives at least once,
whichever consumer, worker or machine dies, as long as Redis keeps what it has confirmed.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, WebSocket, WebSocketDisconnect
from fastapi.exceptions import WebSocketException, WebSocketRequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic_core import from_json, to_json
from redis.asyncio import BlockingConnectionPool, Connection, Redis, Sentinel
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisError, ResponseError
from starlette.requests import HTTPConnection
from starlette.types import Message

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")

CAPACITY = 1000  # payloads
TIMEOUT = 1  # seconds to wait for space in the queue, and for a close frame to be sent
MAX_PAYLOAD = 1024 * 1024  # bytes of UTF-8
BATCH = 256  # payloads that one call brings to Redis or takes from it
SHARE = 8  # payloads that a producer may queue at once if others wait for space, too
MAX_DELIVERIES = 5  # consumers that may fail on a payload before it is set aside
# Close codes that are not failures: the consumer said goodbye, or uvicorn is stopping (1012). If
# the connection broke, uvicorn reports 1005, as if there had been a close frame without a code.
ON_PURPOSE = (1000, 1001, 1012)
MAX_PREFETCH = 1000  # payloads that a consumer may have before it acknowledges the first one
SEND_TIMEOUT = 40  # seconds to wait for a consumer that does not read
CLAIM_AFTER = 30  # seconds until other workers redeliver what a dead worker had
REPLICAS = 0  # replicas that must have a payload, within TIMEOUT, before its receipt is sent
REDIS_TIMEOUT = 5  # seconds to wait for an answer from Redis
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
SENTINEL_PASSWORD = os.environ.get("SENTINEL_PASSWORD")  # Redis has its own, in REDIS_URL
URLS = "redis://HOST:PORT/DB, redis+sentinel://HOST:PORT,.../NAME/DB, redis+cluster://HOST:PORT,..."
# Redis Cluster keeps all keys with the same {tag} on one node, so that a script may use both.
STREAM = "{queue}"
CHANGED = "{queue}:changed"  # wakes workers that wait for payloads
DEAD = "{queue}:dead"  # a Stream of the payloads that were set aside
GROUP = "workers"
RETURNED = "returned"  # not a worker: it owns the payloads that wait for redelivery
WORKER = secrets.token_hex(8)
GONE = (WebSocketDisconnect, RuntimeError)  # raised by sending to a client that has left
# Raised by calls to Redis: OSError, or RuntimeError from uvloop, if the connection has just closed.
FAILED = (RedisError, OSError, RuntimeError)
# Errors of a Redis that has become a replica, or of a cluster's node that no longer has the queue.
ELSEWHERE = "read only replica|MOVED|cluster is down|slot not served"
Prefetch = Annotated[int, Query(ge=1, le=MAX_PREFETCH)]
log = logging.getLogger("uvicorn.error")  # uvicorn prints what this logger gets

# Nothing else runs in Redis while a script runs, so no two workers see the same free space.
PUT = """
local stream, changed = KEYS[1], KEYS[2]
local group, capacity = ARGV[1], ARGV[2]
local created = redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
if created.err and string.find(created.err, 'READONLY') then
    return created  -- this Redis is a replica. Any other error says that the group exists
end
local waiting = redis.call('XLEN', stream) - redis.call('XPENDING', stream, group)[1]
local accepted = math.max(0, math.min(#ARGV - 2, capacity - waiting))
for i = 3, 2 + accepted do
    redis.call('XADD', stream, '*', 'payload', ARGV[i])
end
if accepted > 0 then
    redis.call('XADD', changed, 'MAXLEN', 1, '*', 'payloads', accepted)
end
return accepted
"""
COUNT = """
local stream, group, returned = KEYS[1], ARGV[1], ARGV[2]
redis.call('XDEL', stream, '0-1')  -- deletes nothing, but only a primary allows it
local pending = redis.call('XPENDING', stream, group)
local waiting = redis.call('XLEN', stream) - pending[1]
for _, consumer in ipairs(pending[4] or {}) do
    if consumer[1] == returned then
        waiting = waiting + consumer[2]
    end
end
return waiting
"""
# Payloads that came back go first. They are older than all that no worker has had. XCLAIM would
# count each redelivery, but only failures should count.
TAKE = """
local stream, group, worker = KEYS[1], ARGV[1], ARGV[2]
local returned, most = ARGV[3], tonumber(ARGV[4])
local entries, rows = {}, redis.call('XPENDING', stream, group, '-', '+', most, returned)
for _, row in ipairs(rows) do
    local id, count = row[1], row[4]
    local claimed = redis.call('XCLAIM', stream, group, worker, 0, id, 'RETRYCOUNT', count)
    table.insert(entries, claimed[1])
end
if #rows < most then
    local new = redis.call(
        'XREADGROUP', 'GROUP', group, worker, 'COUNT', most - #rows, 'STREAMS', stream, '>')
    for _, entry in ipairs(new and new[1][2] or {}) do
        table.insert(entries, entry)
    end
end
return entries
"""
# The group's own counter is 1 at the first delivery. A payload is always in exactly one of the two
# Streams. Redis allows this even when its memory is full, but it would refuse a transaction.
# A worker reports again if it got no answer. Others may have a payload by then: leave it to them.
REPORT = """
local stream, changed, dead = KEYS[1], KEYS[2], KEYS[3]
local group, worker, returned, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local report, set_aside = cjson.decode(ARGV[5]), {}
for _, id in ipairs(report.acknowledged) do
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
end
for _, id in ipairs(report.failed) do
    local row = redis.call('XPENDING', stream, group, id, id, 1, worker)[1]
    if row then
        local count = row[4]
        if count < most then
            redis.call(
                'XCLAIM', stream, group, returned, 0, id, 'RETRYCOUNT', count + 1, 'JUSTID')
        else
            local payload = redis.call('XRANGE', stream, id, id)[1][2][2]
            redis.call('XADD', dead, '*', 'payload', payload, 'deliveries', count)
            redis.call('XACK', stream, group, id)
            redis.call('XDEL', stream, id)
            table.insert(set_aside, payload)
        end
    end
end
for _, id in ipairs(report.returned) do
    if #redis.call('XPENDING', stream, group, id, id, 1, worker) > 0 then
        redis.call('XCLAIM', stream, group, returned, 0, id, 'JUSTID')
    end
end
if #report.failed + #report.returned > 0 then
    redis.call('XADD', changed, 'MAXLEN', 1, '*', 'payloads', 'returned')
end
return set_aside
"""
# If Redis was slow, others may have a payload by now: leave it to them.
RENEW = """
local stream, group, worker = KEYS[1], ARGV[1], ARGV[2]
for i = 3, #ARGV do
    local id = ARGV[i]
    if #redis.call('XPENDING', stream, group, id, id, 1, worker) > 0 then
        redis.call('XCLAIM', stream, group, worker, 0, id, 'JUSTID')
    end
end
"""
RETRY = """
local stream, changed, dead = KEYS[1], KEYS[2], KEYS[3]
local letters = redis.call('XRANGE', dead, '-', '+')
for _, letter in ipairs(letters) do
    redis.call('XADD', stream, '*', 'payload', letter[2][2])
end
redis.call('DEL', dead)
redis.call('XADD', changed, 'MAXLEN', 1, '*', 'payloads', #letters)
return #letters
"""
# If a worker is deleted, the payloads that it still has are lost.
LEAVE = """
local stream, group, worker = KEYS[1], ARGV[1], ARGV[2]
if #redis.call('XPENDING', stream, group, '-', '+', 1, worker) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, worker)
end
"""


class Unacknowledged:
    """A consumer's unacknowledged payloads, oldest first."""

    def __init__(self, prefetch: int) -> None:
        self.payloads: deque[str] = deque()  # their ids in Redis
        self.room = prefetch
        self.unsent: asyncio.Queue[str] = asyncio.Queue()
        self.sending_since = math.inf  # seconds, as time.monotonic() counts them
        self.failed: list[str] = []

    def blame(self) -> None:
        """Count a failure of the consumer against the payload on which it was working."""
        # Acknowledgements come in order, so that is the oldest payload, if it was sent at all.
        unsent = self.unsent.qsize() + (self.sending_since < math.inf)
        if len(self.payloads) > unsent:
            self.failed.append(self.payloads.popleft())


class Primary(Connection):
    """A connection to the Redis that has the queue. After a failover, that is another Redis."""

    def __init__(self, find: Callable[[], Awaitable[tuple[str, int]]], **options: Any) -> None:
        super().__init__(**options)
        self.find = find

    async def connect(self) -> None:
        if not self.is_connected:
            self.host, self.port = await self.find()
        await super().connect()  # type: ignore[no-untyped-call]


class SecurePrimary(Primary, SSLConnection):
    """The same with TLS."""


async def find_node(urls: list[str], options: dict[str, Any]) -> tuple[str, int]:
    """Ask the nodes of a Redis Cluster which of them has the queue."""
    failure: Exception = RedisError("no node is named")
    for url in urls:
        try:
            async with Redis.from_url(url, **options) as node:
                await node.exists(STREAM)
        except MovedError as elsewhere:
            return elsewhere.host, elsewhere.port
        except FAILED as error:
            failure = error
        else:
            address = urlsplit(url)
            return address.hostname or "localhost", address.port or 6379
    raise failure


def connect() -> Redis:
    """Return a client for REDIS_URL, or raise ValueError. It connects when it is first used."""
    # redis-py would repeat a command if the connection breaks: a payload could be queued twice.
    # Protocol 3, its default since 8.0, only adds notifications that nobody here reads.
    # Before 8.0.1, it leaks a connection after a WATCH (redis/redis-py#4123). We have none.
    once = Retry(NoBackoff(), 0)
    options: dict[str, Any] = {
        "max_connections": 3,
        "retry": once,
        "socket_timeout": None,  # call() has a timeout
        "protocol": 2,
        "decode_responses": True,
    }
    url = urlsplit(REDIS_URL)
    scheme, _, kind = url.scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
        return Redis.from_pool(BlockingConnectionPool.from_url(REDIS_URL, **options))
    user, _, hosts = url.netloc.rpartition("@")
    name, _, database = url.path.strip("/").partition("/")
    address = f"redis://{user}@/{database}?{url.query}"
    asking = {"retry": once, "socket_timeout": 1, "socket_connect_timeout": 1}
    if kind == "cluster":
        urls = [f"{scheme}://{user}@{host}?{url.query}" for host in hosts.split(",")]
        options["find"] = partial(find_node, urls, asking)
    elif name:
        servers = [urlsplit(f"//{host}") for host in hosts.split(",")]
        addresses = [(server.hostname, server.port or 26379) for server in servers]
        asking |= {"password": SENTINEL_PASSWORD, "ssl": scheme == "rediss"}
        given = parse_url(address).items()
        asking |= {key: value for key, value in given if key.startswith("ssl_")}
        sentinel = Sentinel(addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        options["find"] = partial(sentinel.discover_master, name)
    else:
        raise ValueError("the Sentinels' name for the primary is missing")
    primary = SecurePrimary if scheme == "rediss" else Primary
    pool = BlockingConnectionPool.from_url(address, connection_class=primary, **options)
    return Redis.from_pool(pool)


def explain(error: Exception) -> str:
    """Return why Redis failed."""
    if isinstance(error, AskError):
        return f"MOVED to {error.host}:{error.port}"
    # The message may name the place in a pipeline, and the place in a script.
    why = re.sub(r".* of pipeline caused error: \(.(.*).,\)$", r"\1", str(error))
    why = re.sub(r".*@user_script: ?\d+: ?-?([A-Z]+ )?", "", why)
    # Of each Sentinel, redis-py names all settings. Old versions include the password.
    return re.sub(r"<redis\.asyncio\.client\.Redis.*?> - ", "", why) or "no answer"


class Channel:
    """A bounded queue in Redis. It redelivers what is not acknowledged."""

    def __init__(self) -> None:
        self.reachable = True
        self.line = asyncio.Lock()  # the line in which producers wait
        self.waiting = 0  # how many producers wait in line for space
        # The consumers with room for a payload. The first in line gets the next one.
        self.with_room: deque[Unacknowledged] = deque()
        self.wake = asyncio.Event()
        # The ids of the payloads that this worker's consumers have.
        self.mine: set[str] = set()
        # Not yet reported to Redis: the ids of payloads that were acknowledged, on which a consumer
        # failed, or that were returned.
        self.acknowledged: list[str] = []
        self.failed: list[str] = []
        self.returned: list[str] = []
        self.news = asyncio.Event()

    async def call(self, answer: Awaitable[Any]) -> Any:
        """Wait for Redis. Raise WebSocketException if it refuses or does not answer."""
        try:
            async with asyncio.timeout(REDIS_TIMEOUT):
                result = await answer
        except FAILED as error:
            why = explain(error)
            if isinstance(error, ResponseError) and not re.search(ELSEWHERE, why):
                raise WebSocketException(1013, f"Redis refuses: {why:.90}") from None
            # The next calls make new connections. After a failover, they lead to another Redis.
            with suppress(*FAILED):
                await self.redis.connection_pool.disconnect(inuse_connections=False)
            if self.reachable:
                log.error("Redis is gone (%s): producers get 1013, consumers wait", why)
            self.reachable = False
            raise WebSocketException(1013, "Redis does not answer: try again later") from None
        if not self.reachable:
            log.info("Redis is back")
        self.reachable = True
        return result

    async def qsize(self) -> int:
        """Count the payloads that wait for a consumer."""
        return int(await self.call(self.redis.eval(COUNT, 1, STREAM, GROUP, RETURNED)))

    async def add(self, payloads: list[str]) -> int:
        """Queue the first of the payloads, as many as there is space for. Return how many."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.eval(PUT, 2, STREAM, CHANGED, GROUP, CAPACITY, *payloads)
            if payloads and REPLICAS:
                pipe.wait(REPLICAS, TIMEOUT * 1000)
            count, *acknowledged = await self.call(pipe.execute())
        if count and REPLICAS and acknowledged[0] < REPLICAS:
            reason = f"{acknowledged[0]} of {REPLICAS} replicas have the payload: try again later"
            raise WebSocketException(1013, reason)
        return int(count)

    async def put(self, payloads: list[str], max_wait: float) -> int:
        """Queue the first of the payloads, at least one. Return how many, or raise TimeoutError."""
        deadline = time.monotonic() + max_wait
        if not self.waiting and (count := await self.add(payloads)):
            return count
        # Producers wait in line. Otherwise one could get all the space while another gets none.
        self.waiting += 1
        try:
            async with asyncio.timeout(max_wait):
                await self.line.acquire()
            try:
                while True:
                    first = payloads[:SHARE] if self.waiting > 1 else payloads
                    # A call that is on its way must not be cancelled: it may queue the payloads.
                    if count := await self.add(first):
                        return count
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    # Look at random times, so that no worker always looks just after another one.
                    await asyncio.sleep(random.uniform(0.02, 0.06))
            finally:
                self.line.release()
        finally:
            self.waiting -= 1

    async def deliver(
        self, handle: Callable[[str], Awaitable[object]], unacknowledged: Unacknowledged
    ) -> None:
        """Call `handle` with each payload, as long as the consumer has room for it."""
        self.with_room.append(unacknowledged)
        self.wake.set()
        while True:
            payload = await unacknowledged.unsent.get()
            unacknowledged.sending_since = time.monotonic()
            await handle(payload)
            unacknowledged.sending_since = math.inf

    def acknowledge(self, unacknowledged: Unacknowledged) -> None:
        """Forget a consumer's oldest payload, and let it have another one."""
        payload_id = unacknowledged.payloads.popleft()
        # After a failover, two consumers may have the payload. Only the first ack finds it in here.
        self.mine.discard(payload_id)
        self.acknowledged.append(payload_id)
        self.news.set()
        unacknowledged.room += 1
        if unacknowledged.room == 1:
            self.with_room.append(unacknowledged)
            self.wake.set()

    def redeliver(self, unacknowledged: Unacknowledged) -> None:
        """Put unacknowledged payloads back at the front of the queue, in their old order."""
        with suppress(ValueError):
            self.with_room.remove(unacknowledged)
        self.mine.difference_update(unacknowledged.failed)
        self.failed.extend(unacknowledged.failed)
        self.give_back(unacknowledged.payloads)

    def give_back(self, payload_ids: Iterable[str]) -> None:
        self.mine.difference_update(payload_ids)
        self.returned.extend(payload_ids)
        self.news.set()

    async def dead(self) -> list[dict[str, Any]]:
        """Return the dead letters, oldest first, at most 100."""
        letters = await self.call(self.redis.xrange(DEAD, count=100))
        dead = []
        for _, letter in letters:
            deliveries = int(letter["deliveries"])
            dead.append({"payload": letter["payload"], "deliveries": deliveries})
        return dead

    async def retry(self) -> int:
        """Put the dead letters back, at the end of the queue, and count them."""
        return int(await self.call(self.redis.eval(RETRY, 3, STREAM, CHANGED, DEAD)))

    async def fetch(self) -> None:
        """Take as many payloads as the consumers have room for. If there are fewer, wait."""
        await self.give_back_unknown()
        last_change = "0"
        while True:
            if not self.with_room:
                self.wake.clear()
                await self.wake.wait()
            most = min(BATCH, sum(consumer.room for consumer in islice(self.with_room, BATCH)))
            take = self.redis.eval(TAKE, 1, STREAM, GROUP, WORKER, RETURNED, most)
            entries = await self.call(take)
            for payload_id, (_, payload) in entries:
                self.deal(payload_id, payload)
            if len(entries) < most:
                change = self.redis.xread({CHANGED: last_change}, count=1, block=1000)
                for _, changes in await self.call(change):
                    last_change = changes[0][0]

    def deal(self, payload_id: str, payload: str) -> None:
        """Give a payload to the first consumer in line. Give it back if they have all left."""
        if not self.with_room:
            self.give_back([payload_id])
            return
        self.mine.add(payload_id)
        consumer = self.with_room.popleft()
        consumer.payloads.append(payload_id)
        consumer.unsent.put_nowait(payload)
        consumer.room -= 1
        if consumer.room:
            self.with_room.append(consumer)

    async def give_back_unknown(self) -> None:
        """Give back payloads that Redis handed over in an answer that came too late."""
        known = {*self.mine, *self.acknowledged, *self.failed, *self.returned}
        # Redis answers a ping when it has run all that it was sent before.
        await self.call(self.redis.ping())
        rows = self.redis.xpending_range(STREAM, GROUP, "-", "+", len(known) + BATCH, WORKER)
        pending = {row["message_id"] for row in await self.call(rows)}
        self.give_back(pending - known)

    async def report(self) -> None:
        """Tell Redis what was acknowledged or returned, for all consumers in one call."""
        while True:
            await self.news.wait()
            # Let more acknowledgements arrive.
            await asyncio.sleep(0.005)
            await self.send_report()

    async def send_report(self) -> None:
        report = {
            "acknowledged": self.acknowledged.copy(),
            "failed": self.failed.copy(),
            "returned": self.returned.copy(),
        }
        args = (GROUP, WORKER, RETURNED, MAX_DELIVERIES, to_json(report))
        for payload in await self.call(self.redis.eval(REPORT, 3, STREAM, CHANGED, DEAD, *args)):
            log.warning("set aside after %d deliveries: %.80s", MAX_DELIVERIES, payload)
        del self.acknowledged[: len(report["acknowledged"])]
        del self.failed[: len(report["failed"])]
        del self.returned[: len(report["returned"])]
        if not self.acknowledged and not self.failed and not self.returned:
            self.news.clear()

    async def claim(self) -> None:
        """Renew this worker's claims, and give back what dead workers had."""
        while True:
            # Renew first: after a long time without Redis, this worker's claims look abandoned.
            if self.mine:
                await self.call(self.redis.eval(RENEW, 1, STREAM, GROUP, WORKER, *self.mine))
            await asyncio.sleep(CLAIM_AFTER / 3)
            age = CLAIM_AFTER * 1000  # milliseconds
            dead = self.redis.xautoclaim(STREAM, GROUP, RETURNED, age, count=10_000, justid=True)
            if await self.call(dead):
                change = self.redis.xadd(CHANGED, {"payloads": "dead"}, maxlen=1, approximate=False)
                await self.call(change)

    async def keep_running(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop. Whenever Redis fails, start it again."""
        while True:
            with suppress(WebSocketException):
                # Queueing nothing creates the group, if Redis has come back empty.
                await self.add([])
                await loop()
            await asyncio.sleep(0.2)

    async def start(self) -> None:
        """Connect to Redis, or end this worker."""
        first = multiprocessing.current_process().name in ("MainProcess", "SpawnProcess-1")
        problem = ""
        try:
            self.redis = connect()
            async with asyncio.timeout(REDIS_TIMEOUT):
                await self.redis.eval(PUT, 2, STREAM, CHANGED, GROUP, CAPACITY)
        except FAILED as error:
            self.reachable = False
            # A worker that replaces another one waits for Redis, as the others do.
            if first:
                address = re.sub("//.*@", "//", REDIS_URL.partition("?")[0])  # without a password
                why = explain(error)
                problem = f"no Redis at {address} ({why}): start redis-server, or set REDIS_URL"
        except (ValueError, TypeError):
            problem = f"REDIS_URL is not valid: use {URLS}"
        if problem:
            # One worker says it for all.
            if first:
                log.error(problem)
            # After exit code 3, uvicorn stops all workers. An exception would log a traceback.
            os._exit(3)
        loops = (self.fetch, self.report, self.claim)
        self.tasks = [asyncio.create_task(self.keep_running(loop)) for loop in loops]

    async def stop(self) -> None:
        """Give all payloads back, within 2 seconds. If Redis is gone, other workers claim them."""
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        with suppress(WebSocketException, TimeoutError):
            async with asyncio.timeout(2):
                await self.give_back_unknown()
                await self.send_report()
                await self.call(self.redis.eval(LEAVE, 1, STREAM, GROUP, WORKER))
                log.info("%d payloads were still queued", await self.qsize())
        await self.redis.aclose()


def hang_up(*_: object) -> None:
    """End this worker and uvicorn's parent process, as Ctrl+C does."""
    # When a terminal closes, every process gets a SIGHUP. By itself, the parent would replace its
    # workers: it takes the signal for `kill -HUP`.
    parent = multiprocessing.parent_process()
    if parent and parent.pid:
        os.kill(parent.pid, signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    # Windows has no SIGHUP, and `nohup` lets processes ignore it.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, hang_up)
    await channel.start()
    with suppress(asyncio.CancelledError):  # raised here if Ctrl+C is pressed twice
        yield  # until every endpoint has returned
    await channel.stop()


app = FastAPI(lifespan=lifespan)
channel = Channel()


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


async def receive_batch(websocket: WebSocket) -> list[Message]:
    """Wait for a message, and return it with the messages that have already arrived after it."""
    messages = [await websocket.receive()]
    # A timeout of 0 ends the first receive() that would have to wait.
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            while messages[-1]["type"] != "websocket.disconnect" and len(messages) < BATCH:
                messages.append(await websocket.receive())
    return messages


async def put_batch(websocket: WebSocket, payloads: list[str]) -> None:
    """Queue the payloads, and send each back as its receipt."""
    while payloads:
        try:
            count = await channel.put(payloads, TIMEOUT)
        except TimeoutError:
            raise WebSocketException(1013, "the queue is full: try again later") from None
        for payload in payloads[:count]:
            # The receipt. The payload is queued, even if the producer has left meanwhile.
            with suppress(*GONE):
                await websocket.send_text(payload)
        del payloads[:count]


@app.websocket("/ws/producer", dependencies=[Depends(same_origin)])
async def producer(websocket: WebSocket) -> None:
    await websocket.accept()
    # If the producer does not read its receipts, uvicorn cancels this endpoint when it stops.
    with suppress(asyncio.CancelledError):
        while True:
            payloads: list[str] = []
            try:
                for message in await receive_batch(websocket):
                    if message["type"] == "websocket.disconnect":
                        return
                    payloads.append(validate(message.get("text")))
            finally:
                # A payload that is refused does not harm the payloads before it.
                await put_batch(websocket, payloads)


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
        if not unacknowledged.payloads:
            raise WebSocketException(1008, "an ack, but there is nothing to acknowledge")
        channel.acknowledge(unacknowledged)
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


async def or_503() -> AsyncIterator[None]:
    """Let an HTTP endpoint answer 503 if Redis fails, or if uvicorn cancels it when it stops."""
    try:
        yield
    except WebSocketException as error:
        raise HTTPException(503, error.reason) from None
    except asyncio.CancelledError:
        raise HTTPException(503, "the server is stopping") from None


@app.get("/stats", dependencies=[Depends(or_503)])
async def stats() -> dict[str, int | bool]:
    queued, dead = await channel.qsize(), await channel.call(channel.redis.xlen(DEAD))
    return {"queued": queued, "capacity": CAPACITY, "acks": True, "dead": dead}


@app.get("/dead", dependencies=[Depends(same_origin), Depends(or_503)])
async def dead() -> list[dict[str, Any]]:
    return await channel.dead()


@app.post("/dead/retry", dependencies=[Depends(same_origin), Depends(or_503)])
async def retry() -> dict[str, int]:
    return {"retried": await channel.retry()}


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
