"""What lessons/redis_server.py promises beyond the contract: one queue for many servers; any may die."""

import asyncio
import json
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from lessons import redis_server
from tests.checks import end, flood
from tests.kit.clients import (
    client,
    consumer,
    drain,
    gone,
    numbered,
    port,
    produce,
    receive,
    receive_all,
    vanish,
    write,
)
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.needs import NGINX, needs_nginx
from tests.kit.ports import free_port
from tests.kit.redis import CLAIM_AFTER, REDIS_TIMEOUT, UVLOOP_FAILS, Redis, lose, restore
from tests.kit.root import ROOT
from tests.kit.servers import Server, busy, running, tracebacks
from tests.kit.storm import Storm
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for
from tests.kit.workers import serving, worker, workers

COMMAND = SERVERS["redis_server.py"]
MAX_DELIVERIES = 5
Leave = Callable[[ClientConnection], Awaitable[None]]
SOON = 0.5 * SLOWNESS  # seconds in which what goes at once has gone
PATIENCE = 1 * SLOWNESS  # seconds after which nginx gives up a connection on which nothing comes
PING_INTERVAL = 0.25 * SLOWNESS  # seconds
# For what both lessons promise of one Stream.
LESSONS = pytest.mark.parametrize(
    ("lesson", "constants"),
    [("redis_server", {}), ("partitioned_server", {"PARTITIONS": 1})],
    ids=["redis_server.py", "partitioned_server.py"],
)
NGINX_MAIN = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path temp;
    proxy_temp_path temp;
    fastcgi_temp_path temp;
    uwsgi_temp_path temp;
    scgi_temp_path temp;
    include queue.conf;
}
"""
NGINX_CONF = """\
map $http_upgrade $connection_upgrade {
    default upgrade;
    ''      close;
}

upstream queue {
    server 10.0.0.1:8000;
    server 10.0.0.2:8000;
}

server {
    listen 80;

    location / {
        proxy_pass http://queue;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header Host $http_host;  # with its port: the server compares it with a page's Origin
        proxy_read_timeout 60s;  # longer than the 20 s after which uvicorn sends a ping
    }
}
"""


class Stream:
    """A queue, seen in Redis."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: Any = redis.Redis.from_url(url, decode_responses=True)  # Any: some answers are awaitable

    def length(self) -> int:
        return int(self.client.xlen("{queue}"))

    def pending(self) -> int:
        return int(self.client.xpending("{queue}", "workers")["pending"])

    def is_empty(self) -> bool:
        return self.length() == self.pending() == 0

    def deliveries(self) -> list[int]:
        """How often each unacknowledged payload was delivered, as Redis counts."""
        rows = self.client.xpending_range("{queue}", "workers", "-", "+", 1000)
        return [row["times_delivered"] for row in rows]

    def last_change(self) -> str:
        """The entry that has last woken the workers."""
        return str(self.client.xinfo_stream("{queue}:changed")["last-generated-id"])

    def workers(self) -> set[str]:
        """The names in the consumer group, but for the one that is no worker."""
        return {row["name"] for row in self.client.xinfo_consumers("{queue}", "workers")} - {"returned"}

    def connections(self) -> int:
        """How many connections to its database there are, but for our own."""
        database = self.url.rpartition("/")[2]
        return sum(int(row["db"] == database) for row in self.client.client_list()) - 1

    def is_watched(self) -> bool:
        """Whether a worker waits for payloads: it has a call to Redis that blocks."""
        database = self.url.rpartition("/")[2]
        return any(row["db"] == database and "b" in row["flags"] for row in self.client.client_list())


@contextmanager
def running_together(commands: list[list[str]], url: str) -> Iterator[list[Server]]:
    """Several servers with one Redis, which start at the same time."""
    servers = []
    with ExitStack() as stack:
        for command in commands:
            servers.append(Server(command, env={"REDIS_URL": url}))
            stack.callback(servers[-1].kill)
        for server in servers:
            server.wait_ready()
        yield servers


@pytest.fixture(scope="module")
def broker() -> Iterator[Redis]:
    """A Redis that tests may kill, and must start again."""
    broker = Redis()
    yield broker
    broker.close()


@pytest.fixture(scope="module")
def stream(broker: Redis) -> Iterator[Stream]:
    """The queue of the two servers that tests share."""
    stream = Stream(broker.url())
    yield stream
    stream.client.close()


@pytest.fixture(scope="module")
def shared(stream: Stream) -> Iterator[list[Server]]:
    command = with_constants("lessons.redis_server", REDIS_TIMEOUT=REDIS_TIMEOUT)
    command = with_options(command, "--ws-ping-interval", str(PING_INTERVAL))
    with running_together([command] * 2, stream.url) as servers:
        yield servers


@pytest.fixture
async def pair(shared: list[Server], stream: Stream) -> AsyncIterator[list[Server]]:
    """Two servers, one queue, which is empty. They must come through the test without a traceback."""
    marks = [len(server.log) for server in shared]
    yield shared
    async with asyncio.timeout(TIMEOUT):
        while not stream.is_empty():  # what was acknowledged last, or what a test that failed left behind
            await drain(shared[0])
            await asyncio.sleep(0.01)
    for server, mark in zip(shared, marks, strict=True):
        assert tracebacks(server.log[mark:]) == 0, server.log[mark:]


@pytest.fixture(scope="module")
def crew_stream(broker: Redis) -> Iterator[Stream]:
    stream = Stream(broker.url())
    yield stream
    stream.client.close()


@pytest.fixture(scope="module")
def impatient() -> list[str]:
    """The command of a server that claims what a silent worker has after CLAIM_AFTER."""
    return with_constants("lessons.redis_server", CLAIM_AFTER=CLAIM_AFTER)


@pytest.fixture(scope="module")
def crew(impatient: list[str], crew_stream: Stream) -> Iterator[Server]:
    """An impatient server with two workers, which uvicorn replaces when they are killed."""
    with running(with_options(impatient, "--workers", "2"), env={"REDIS_URL": crew_stream.url}) as server:
        wait_for(lambda: serving(server) == 2, "both workers")
        yield server
        assert tracebacks(server.log) == 0


async def test_payloads_go_from_any_server_to_any(pair: list[Server]) -> None:
    """Payloads come out of either server in the order of their receipts."""
    one, other = pair
    async with consumer(other) as taker:
        for _ in range(3):
            await produce(one, ["1"])
            async with asyncio.timeout(SOON):
                assert await taker.payload() == "1"
    payloads = [str(number) for number in range(10)]
    for number, payload in enumerate(payloads):
        await produce(pair[number % 2], [payload])
    assert await drain(one) == payloads


async def test_payloads_of_a_departed_consumer_go_to_another_server_at_once(pair: list[Server]) -> None:
    """A consumer that waits at another server has them within half a second, in order."""
    one, other = pair
    payloads = [str(number) for number in range(5)]
    async with client(one, CONSUMER + "?prefetch=5") as holder:
        await produce(other, payloads)
        assert [await receive(holder) for _ in payloads] == payloads
        async with consumer(other) as taker:
            await (await taker.websocket.ping())
            await vanish(holder)
            async with asyncio.timeout(SOON):
                assert await taker.payloads(5) == payloads


async def test_returned_payloads_go_before_newer_ones(pair: list[Server]) -> None:
    """Another server's consumer is busy when they come back. It gets them next."""
    one, other = pair
    payloads = [str(number) for number in range(10)]
    async with client(one, CONSUMER + "?prefetch=5") as holder:
        await produce(one, payloads[:5])
        assert [await receive(holder) for _ in range(5)] == payloads[:5]
        async with client(other, CONSUMER) as taker:
            await produce(one, payloads[5:])
            order = [await receive(taker)]
            await vanish(holder)
            await until(lambda: other.queued() == 9, "the five to come back", SOON)
            for _ in range(9):
                await taker.send("ack")
                order.append(await receive(taker))
            await taker.send("ack")
    assert order == ["5", *payloads[:5], *payloads[6:]]


@pytest.mark.parametrize("prefetch", [1, 2])
async def test_a_worker_takes_no_more_than_its_consumers_may_have(
    pair: list[Server], stream: Stream, prefetch: int
) -> None:
    """A payload that came back is one of them. What a worker has takes up no space in the queue."""
    payloads = ["1", "2", "3", "4"]
    await produce(pair[0], payloads)
    async with client(pair[0], CONSUMER) as holder:
        assert await receive(holder) == "1"
    await until(lambda: pair[0].queued() == 4, "the payload to come back")
    async with client(pair[0], f"{CONSUMER}?prefetch={prefetch}") as taker:
        assert [await receive(taker) for _ in range(prefetch)] == payloads[:prefetch]
        assert stream.pending() == prefetch
        for payload in payloads[prefetch:]:
            await taker.send("ack")
            assert await receive(taker) == payload
        for _ in range(prefetch):
            await taker.send("ack")
        await until(stream.is_empty, "the queue to be empty")


async def test_a_server_that_ends_gives_back_its_payloads(pair: list[Server], stream: Stream) -> None:
    """They come first, at another server, at once. Redis forgets the worker."""
    payloads = [str(number) for number in range(10)]
    before = stream.workers()
    with running(COMMAND, env={"REDIS_URL": stream.url}) as leaver:
        async with client(leaver, CONSUMER + "?prefetch=5") as holder:
            await produce(leaver, payloads)
            assert [await receive(holder) for _ in range(5)] == payloads[:5]
            assert len(stream.workers() - before) == 1
            assert await end(leaver, signal.SIGINT, 2) == 10
    assert stream.workers() <= before
    async with asyncio.timeout(SOON):
        assert await drain(pair[0]) == payloads


async def test_payloads_on_their_way_to_a_departed_consumer_come_back(
    pair: list[Server], broker: Redis, stream: Stream
) -> None:
    """Redis hands them over when their consumer has left. They go to the next one."""
    payloads = [str(number) for number in range(5)]
    await produce(pair[0], payloads)
    await until(lambda: not stream.is_watched(), "the workers to have nothing to do")
    broker.stop()
    try:
        async with client(pair[0], CONSUMER + "?prefetch=5") as leaver:
            await (await leaver.ping())
        await gone(pair[0], {port(leaver)})
    finally:
        broker.go_on()
    async with consumer(pair[1]) as taker, asyncio.timeout(SOON):
        assert await taker.payloads(5) == payloads


async def test_acknowledged_payloads_are_gone(pair: list[Server], stream: Stream) -> None:
    """After the last acknowledgement, Redis has no payload, and no unacknowledged entry."""
    payloads = [str(number) for number in range(300)]
    async with consumer(pair[0], prefetch=10) as here, consumer(pair[1]) as there:
        taking = [asyncio.create_task(taker.payloads(300)) for taker in (here, there)]
        await produce(pair[0], payloads)
        await until(stream.is_empty, "the queue to be empty")
        for task in taking:
            task.cancel()
        await asyncio.gather(*taking, return_exceptions=True)
    assert stream.client.xlen("{queue}:changed") == 1, "what wakes the workers is left behind"


async def test_servers_that_have_nothing_to_do_seldom_ask_redis(pair: list[Server], stream: Stream) -> None:
    """A worker that waits for payloads looks once a second. It does not repeat what it has reported."""

    def scripts() -> int:
        return int(stream.client.info("commandstats")["cmdstat_eval"]["calls"])

    async with consumer(pair[0]) as taker:
        await produce(pair[1], ["1", "2"])
        assert await taker.payloads(2) == ["1", "2"]
        await until(stream.is_empty, "the queue to be empty")
        before, start = scripts(), time.monotonic()
        await asyncio.sleep(1)
        assert scripts() - before < 30 * (time.monotonic() - start)


async def test_all_that_comes_back_wakes_the_workers(pair: list[Server], stream: Stream) -> None:
    """They wait for the next entry in a second Stream. Without it, they look only once a second."""

    async def woken() -> None:
        await until(lambda: stream.last_change() != before, "the workers to be woken")

    await produce(pair[0], ["1"])
    leaves: list[Leave] = [ClientConnection.close, *[vanish] * MAX_DELIVERIES]
    for leave in leaves:
        before = stream.last_change()
        async with client(pair[0], CONSUMER) as holder:
            assert await receive(holder) == "1"
            await leave(holder)
            await woken()
    assert pair[1].stats()["dead"] == 1
    before = stream.last_change()
    assert pair[1].retry() == 1
    await woken()
    assert await drain(pair[1]) == ["1"]


async def test_a_receipt_says_that_redis_has_the_payload(
    pair: list[Server], broker: Redis, stream: Stream
) -> None:
    """With the receipt, the payload is in the stream. While Redis hangs, there is no receipt."""
    async with client(pair[0], PRODUCER) as producer:
        for number in range(1, 21):
            await producer.send(str(number))
            assert await receive(producer) == str(number)
            assert stream.length() == number
        broker.stop()
        try:
            await producer.send("21")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2 * SLOWNESS):
                    await producer.recv()
        finally:
            broker.go_on()
        assert await receive(producer) == "21"
    assert await drain(pair[1]) == [str(number) for number in range(1, 22)]


async def test_capacity_is_for_all_servers_together(pair: list[Server], stream: Stream) -> None:
    """With floods at two servers, at most CAPACITY payloads wait. Both producers get 1013."""
    payloads = [str(number) for number in range(5000)]
    most = 0
    async with client(pair[0], PRODUCER) as one, client(pair[1], PRODUCER) as other:
        floods = [asyncio.create_task(flood(producer, payloads)) for producer in (one, other)]
        while not all(task.done() for task in floods):
            most = max(most, stream.length())
            await asyncio.sleep(0.005)
        echoed = [(await task)[0] for task in floods]
        for producer in (one, other):
            assert producer.close_code == 1013
            assert producer.close_reason
            assert "full" in producer.close_reason
    assert most == sum(echoed) == pair[0].capacity
    received = await drain(pair[1])
    assert sorted(received) == sorted(payloads[: echoed[0]] + payloads[: echoed[1]])


async def test_a_thousand_waiting_consumers_cost_three_connections(broker: Redis) -> None:
    """They use no CPU, and each gets its payload."""
    stream = Stream(broker.url())
    with closing(stream.client), running(COMMAND, env={"REDIS_URL": stream.url}) as server:
        parked = park(server, 1000)
        await until(lambda: busy(server, 0.5) < 0.1, "the server to be idle")
        batches = [[str(number) for number in range(start, start + 100)] for start in range(0, 1000, 100)]
        await asyncio.gather(*(produce(server, batch) for batch in batches))
        received = [json.loads(sock.recv(100)[2:]) for sock in parked]
        assert sorted(received) == list(range(1000))
        assert 1 <= stream.connections() <= 3
        for sock in parked:
            sock.close()
        await until(lambda: server.queued() == 1000, "all of it to come back")


def park(server: Server, count: int) -> list[socket.socket]:
    """Consumers that wait for a payload, without what a websocket's client costs."""
    sockets = [socket.create_connection(("127.0.0.1", server.port), TIMEOUT) for _ in range(count)]
    for sock in sockets:
        sock.sendall(
            f"GET {CONSUMER} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
    for sock in sockets:
        answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        assert answer.endswith(b"\r\n\r\n")
    return sockets


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_without_redis_ends_with_one_line(count: int) -> None:
    """All workers end. The line says where Redis should be, without a password."""
    address = f"127.0.0.1:{free_port()}/0"
    command = with_options(COMMAND, "--workers", str(count))
    server = Server(command, env={"REDIS_URL": f"redis://somebody:s3cret@{address}?password=s3cret"})
    try:
        assert server.ends_within(10) is not None
        wait_for(lambda: not server.processes(), "all to end")
        if count == 1:  # else uvicorn's parent process ends with 0, whatever its workers ended with
            assert server.process.returncode == 3
        [line] = [line for line in server.log.splitlines() if "no Redis at" in line]
        assert line.startswith("ERROR:")
        assert f"redis://{address} " in line
        assert "start redis-server" in line
        assert tracebacks(server.log) == 0
        assert "s3cret" not in server.log
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["killed", "stopped", "emptied"])
async def test_the_server_goes_on_when_redis_is_back(
    pair: list[Server], broker: Redis, stream: Stream, how: str
) -> None:
    """Producers get 1013, consumers wait; then all goes on, with a line for each of the two in the log.

    What consumers acknowledged meanwhile is settled then, and what those had that left goes to others.
    """
    one, other = pair
    async with AsyncExitStack() as stack:
        holders = [await stack.enter_async_context(client(one, CONSUMER + "?prefetch=2")) for _ in range(2)]
        await produce(other, ["1"] * 4)
        assert [await receive(holder) for holder in holders * 2] == ["1"] * 4
        taker = await stack.enter_async_context(consumer(other))
        producers = [await stack.enter_async_context(client(server, PRODUCER)) for server in pair * 8]
        marks = [len(server.log) for server in pair]
        lose(broker, how)
        lost = time.monotonic()
        try:
            pages = asyncio.gather(*(asyncio.to_thread(server.get, "/stats") for server in pair))
            for producer in producers:
                await producer.send("2")
            for producer in producers:
                assert await receive_all(producer) == [], "a receipt for what Redis does not have"
                assert producer.close_code == 1013
                assert producer.close_reason
                assert "Redis" in producer.close_reason
            assert [status for status, _, _ in await pages] == [503, 503]
            assert time.monotonic() - lost < 1.5 * REDIS_TIMEOUT
            for websocket in (*holders, taker.websocket):
                await (await websocket.ping())
            for _ in range(2):
                await holders[0].send("ack")
            await holders[0].close()
            await vanish(holders[1])
            await gone(one, {port(holder) for holder in holders})
        finally:
            restore(broker, how)
        if how == "emptied":  # no payload is needed to find out that Redis is back
            await until(lambda: [server.get("/stats")[0] for server in pair] == [200, 200], "both servers")
        for server in pair:
            await produce(server, ["3"])
        expected = Counter({"3": 2} if how == "emptied" else {"1": 2, "3": 2})
        received: Counter[str] = Counter()

        async def take_all() -> None:
            while True:
                received[await taker.payload()] += 1

        taking = asyncio.create_task(take_all())
        await until(lambda: received >= expected and stream.is_empty(), "the queue to be empty")
        taking.cancel()
        await asyncio.wait([taking])
        if how == "stopped":
            del received["2"]  # a payload without a receipt may be there or not, and come first or last
        assert received == expected
        for server, mark in zip(pair, marks, strict=True):
            log = server.log[mark:]
            assert how != "stopped" or "Redis is gone (no answer)" in log
            assert re.findall("ERROR|Redis is gone|Redis is back", log) == [
                *("ERROR", "Redis is gone", "Redis is back")
            ], log


async def test_payloads_that_redis_hands_over_late_are_delivered(
    pair: list[Server], broker: Redis, stream: Stream
) -> None:
    """A worker asks for payloads. Redis answers, but so late that the worker no longer waits.

    Its consumer gets the payloads all the same, and not only after CLAIM_AFTER, as those of a dead worker.
    Another consumer of the same worker has many older payloads.
    """
    server, _ = pair
    older, late = ["0"] * 300, numbered(300)
    await produce(server, [*older, "1", *late])
    async with client(server, CONSUMER + "?prefetch=300") as holder:
        assert [await receive(holder) for _ in older] == older
        async with consumer(server) as taker:
            assert await taker.payload() == "1"  # so that Redis knows the script that hands payloads over
        await until(lambda: server.queued() == 300, "the others to be queued")
        mark = len(server.log)
        broker.stop()
        try:
            async with consumer(server, prefetch=300) as taker:
                await until(lambda: "Redis is gone" in server.log[mark:], "the worker to give up waiting")
                broker.go_on()
                assert sorted(await taker.payloads(300)) == sorted(late)
        finally:
            broker.go_on()
        for _ in older:
            await holder.send("ack")
        await until(stream.is_empty, "the queue to be empty")


@LESSONS
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_ctrl_c_ends_the_server_while_redis_is_gone(
    broker: Redis, how: str, lesson: str, constants: dict[str, object]
) -> None:
    """It prints no traceback, although a producer waits for a receipt, and a request for its answer."""
    command = with_constants(f"lessons.{lesson}", **constants)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        async with consumer(server), client(server, PRODUCER), client(server, PRODUCER) as producer:
            lose(broker, how)
            try:
                await producer.send("1")
                if how == "killed":
                    await until(lambda: busy(server, 0.5) < 0.2, "the server to wait between its attempts")
                asking = asyncio.create_task(asyncio.to_thread(server.get, "/stats"))
                if how == "stopped":
                    await until(lambda: len(server.connections()) == 4, "the request to arrive")
                server.interrupt()
                # uvicorn waits for the endpoints for a second, and the server for Redis for two.
                took = await asyncio.to_thread(server.ends_within, 3.5)
                with suppress(OSError, HTTPException):  # if the request came too late
                    assert (await asking)[0] == 503
            finally:
                restore(broker, how)
        assert took is not None, server.log
        await until(lambda: not server.processes(), "all to end")
        assert tracebacks(server.log) == 0


async def test_payloads_on_their_way_to_a_server_that_ends_come_back(
    crew: Server, crew_stream: Stream, impatient: list[str], broker: Redis
) -> None:
    """They go to a consumer of another server. Redis forgets the worker, which has none of them."""
    payloads = [str(number) for number in range(5)]
    await produce(crew, payloads)
    before = crew_stream.workers()
    with running(impatient, env={"REDIS_URL": crew_stream.url}) as leaver:
        broker.stop()
        try:
            async with client(leaver, CONSUMER + "?prefetch=5") as holder:
                await (await holder.ping())
                leaver.interrupt()
                await until(lambda: "Waiting for application shutdown" in leaver.log, "its consumer to leave")
        finally:
            broker.go_on()
        assert await asyncio.to_thread(leaver.ends_within, 2) is not None
    assert crew_stream.workers() <= before
    async with consumer(crew) as taker:
        assert await taker.payloads(5) == payloads


NO_REPORT = """
import asyncio


async def report(queue):
    await asyncio.Event().wait()


getattr(lesson, "Partition", lesson.Channel).report = report
"""


@LESSONS
async def test_a_server_that_ends_reports_what_is_left(
    broker: Redis, lesson: str, constants: dict[str, object]
) -> None:
    """It ends before the next report. What its consumer acknowledged is gone, and the rest is returned."""
    url = broker.url()
    command = with_constants(f"lessons.{lesson}", NO_REPORT, **constants)
    with closing(redis.Redis.from_url(url)) as admin:
        with running(command, env={"REDIS_URL": url}) as server:
            await produce(server, ["1", "2"])
            async with client(server, CONSUMER) as holder:
                assert await receive(holder) == "1"
                await holder.send("ack")
                assert await receive(holder) == "2"
                server.interrupt()
                assert await asyncio.to_thread(server.ends_within, 10) is not None
        [stream] = admin.keys("{queue*}")
        assert admin.xlen(stream) == 1
        assert [row["name"] for row in admin.xinfo_consumers(stream, "workers")] == [b"returned"]


async def test_workers_share_the_queue(crew: Server, crew_stream: Stream) -> None:
    """With 16 producers over both workers and one consumer, all their payloads arrive in order."""
    payloads = [str(number) for number in range(16)]
    async with AsyncExitStack() as stack:
        producers = [await stack.enter_async_context(client(crew, PRODUCER)) for _ in payloads]
        for producer, payload in zip(producers, payloads, strict=True):
            await producer.send(payload)
            assert await receive(producer) == payload
        assert len({worker(crew, producer) for producer in producers}) == 2, "one has all: this shows nothing"
    assert await drain(crew) == payloads


async def elsewhere(server: Server, stack: AsyncExitStack, avoided: psutil.Process) -> ClientConnection:
    """A consumer, with a prefetch of 3, at another worker than this."""
    for _ in range(100):
        websocket = await stack.enter_async_context(client(server, CONSUMER + "?prefetch=3"))
        if worker(server, websocket) != avoided:
            return websocket
        await websocket.close()
    raise AssertionError("one worker gets all connections: this shows nothing")


async def test_a_killed_workers_payloads_are_claimed(crew: Server, crew_stream: Stream) -> None:
    """After CLAIM_AFTER, they go to another worker. A living worker keeps its own."""
    payloads = [str(number) for number in range(6)]
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(client(crew, CONSUMER + "?prefetch=3"))
        doomed = worker(crew, holder)
        await produce(crew, payloads[:3])
        assert [await receive(holder) for _ in range(3)] == payloads[:3]
        keeper = await elsewhere(crew, stack, doomed)
        await produce(crew, payloads[3:])
        assert [await receive(keeper) for _ in range(3)] == payloads[3:]
        taker = await elsewhere(crew, stack, doomed)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * CLAIM_AFTER):
                await taker.recv()
        change = crew_stream.last_change()
        doomed.kill()
        killed = time.monotonic()
        assert [await receive(taker) for _ in range(3)] == payloads[:3]
        took = time.monotonic() - killed
        assert 0.5 * CLAIM_AFTER < took < 2 * CLAIM_AFTER, f"claimed after {took:.2f} s"
        assert crew_stream.deliveries() == [1] * 6, "a claim counts as a failure of a consumer"
        await until(lambda: crew_stream.last_change() != change, "the workers to be woken")
        for websocket in (keeper, taker):
            for _ in range(3):
                await websocket.send("ack")
        await until(crew_stream.is_empty, "the queue to be empty")


async def test_a_killed_servers_payloads_are_found_behind_many_others(
    crew: Server, crew_stream: Stream, impatient: list[str]
) -> None:
    """The consumers of living workers have more than the 1000 that Redis looks through by default."""
    older = numbered(1100)
    async with (
        client(crew, CONSUMER + "?prefetch=600") as one,
        client(crew, CONSUMER + "?prefetch=500") as other,
    ):
        await produce(crew, older[:600])
        await produce(crew, older[600:])
        keepers = {one: 600, other: 500}
        received = [await receive(keeper) for keeper, count in keepers.items() for _ in range(count)]
        assert sorted(received) == sorted(older)
        with running(impatient, env={"REDIS_URL": crew_stream.url}) as doomed:
            async with client(doomed, CONSUMER) as holder:
                await produce(crew, ["1"])
                assert await receive(holder) == "1"
                doomed.kill()
        async with client(crew, CONSUMER) as taker:
            assert await receive(taker) == "1"
            await taker.send("ack")
            for keeper, count in keepers.items():
                for _ in range(count):
                    await keeper.send("ack")
            await until(crew_stream.is_empty, "the queue to be empty")


async def test_living_workers_keep_their_payloads_through_a_long_outage(
    crew: Server, crew_stream: Stream, broker: Redis
) -> None:
    """Redis is gone for longer than CLAIM_AFTER. Then no worker redelivers what the other still has."""
    async with AsyncExitStack() as stack:
        holders = [await stack.enter_async_context(client(crew, CONSUMER + "?prefetch=3"))]
        await produce(crew, ["1"] * 3)
        assert [await receive(holders[0]) for _ in range(3)] == ["1"] * 3
        holders.append(await elsewhere(crew, stack, worker(crew, holders[0])))
        await produce(crew, ["2"] * 3)
        assert [await receive(holders[1]) for _ in range(3)] == ["2"] * 3
        takers = [await elsewhere(crew, stack, worker(crew, holder)) for holder in holders]
        broker.kill()
        await asyncio.sleep(1.5 * CLAIM_AFTER)
        broker.start()
        redelivered = [asyncio.create_task(taker.recv()) for taker in takers]
        done, _ = await asyncio.wait(redelivered, timeout=1.5 * CLAIM_AFTER)
        assert not done
        for holder in holders:
            for _ in range(3):
                await holder.send("ack")
        await until(crew_stream.is_empty, "the queue to be empty")
        for task in redelivered:
            task.cancel()
        await asyncio.wait(redelivered)


@pytest.mark.parametrize("lesson", ["redis_server", "partitioned_server"])
async def test_a_worker_that_dies_while_redis_is_away_is_replaced(broker: Redis, lesson: str) -> None:
    """The new worker waits for Redis, as the others do. At the start, it would end them all."""
    command = with_options(uvicorn_command(f"lessons.{lesson}:app"), "--workers", "2")
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await until(lambda: serving(server) == 2, "both workers")
        broker.kill()
        workers(server)[0].kill()
        await until(lambda: serving(server) == 3, "a new worker")
        broker.start()
        await until(lambda: server.get("/stats")[0] == 200, "both workers to reach Redis")
        payloads = numbered(10)
        await produce(server, payloads)
        async with consumer(server) as taker:
            assert sorted(await taker.payloads(10)) == sorted(payloads)
        assert tracebacks(server.log) == 0


LATE_RENEWAL = """
import asyncio

from redis.asyncio import Redis

run, may_run = Redis.eval, asyncio.Event()


async def renew(*args):
    lesson.log.info("a renewal waits")
    await may_run.wait()
    await run(*args)
    lesson.log.info("the renewal ran")


Redis.eval = lambda *args: (renew if args[1] == lesson.RENEW else run)(*args)
app.add_api_route("/renew", may_run.set)
"""


@LESSONS
async def test_a_late_renewal_takes_nothing_back(
    broker: Redis, lesson: str, constants: dict[str, object]
) -> None:
    """A worker renews its claims, but the consumer leaves before Redis gets the call.

    The payload still goes to the next consumer at once, and not only after CLAIM_AFTER.
    """
    url = broker.url()
    constants = {**constants, "CLAIM_AFTER": CLAIM_AFTER, "REDIS_TIMEOUT": TIMEOUT}
    command = with_constants(f"lessons.{lesson}", LATE_RENEWAL, **constants)
    with running(command, env={"REDIS_URL": url}) as server, closing(redis.Redis.from_url(url)) as admin:

        def is_returned() -> bool:
            [stream] = admin.keys("{queue*}")
            [row] = admin.xpending_range(stream, "workers", "-", "+", 1)
            return row["consumer"] == b"returned"

        await produce(server, ["1"])
        async with client(server, CONSUMER) as holder:
            assert await receive(holder) == "1"
            await until(lambda: "a renewal waits" in server.log, "the renewal")
        await until(is_returned, "the payload to be given back")
        await asyncio.to_thread(server.get, "/renew")
        await until(lambda: "the renewal ran" in server.log, "the renewal to run")
        assert is_returned()
        async with consumer(server) as taker:
            assert await taker.payload() == "1"


LOST_ANSWER = """
import asyncio
import json

from redis.asyncio import Redis
from redis.exceptions import ConnectionError

run, may_fail, lost = Redis.eval, asyncio.Event(), []


async def report(*args):
    await run(*args)
    news = json.loads(args[-1])
    if (news["failed"] or news["returned"]) and not lost:
        lost.append(args)
        lesson.log.info("an answer gets lost")
        await may_fail.wait()
        raise ConnectionError("lost")
    if lost:
        lesson.log.info("reported again")
    return []


Redis.eval = lambda *args: (report if args[1] == lesson.REPORT else run)(*args)
app.add_api_route("/fail", may_fail.set)
"""


@LESSONS
@pytest.mark.parametrize("leave", [ClientConnection.close, vanish])
async def test_a_repeated_report_takes_nothing_back(
    broker: Redis, lesson: str, constants: dict[str, object], leave: Leave
) -> None:
    """A worker gives a payload back, but gets no answer, and reports again. Meanwhile, another worker has it.

    Its consumer gets it only once.
    """
    env = {"REDIS_URL": broker.url()}
    constants = {**constants, "REDIS_TIMEOUT": TIMEOUT}
    command = with_constants(f"lessons.{lesson}", LOST_ANSWER, **constants)
    with (
        running(command, env=env) as one,
        running(with_constants(f"lessons.{lesson}", **constants), env=env) as other,
    ):
        await produce(one, ["1"])
        async with client(one, CONSUMER) as holder:
            assert await receive(holder) == "1"
            await leave(holder)
        await until(lambda: "an answer gets lost" in one.log, "the report")
        async with client(other, CONSUMER + "?prefetch=2") as taker:
            assert await receive(taker) == "1"
            await asyncio.to_thread(one.get, "/fail")
            await until(lambda: "reported again" in one.log, "the second report")
            await produce(one, ["2"])
            assert await receive(taker) == "2"


SLOW_REPORT = """
import asyncio

from redis.asyncio import Redis

run, may_run = Redis.eval, asyncio.Event()


async def report(*args):
    if not may_run.is_set():
        lesson.log.info("a report waits")
        await may_run.wait()
    return await run(*args)


def kept():
    [queue] = getattr(lesson.channel, "partitions", [lesson.channel])
    return [len(queue.mine), len(queue.acknowledged), len(queue.failed), len(queue.returned)]


Redis.eval = lambda *args: (report if args[1] == lesson.REPORT else run)(*args)
app.add_api_route("/report", may_run.set)
app.add_api_route("/kept", kept)
"""


@LESSONS
async def test_what_happens_during_a_report_is_in_the_next_one(
    broker: Redis, lesson: str, constants: dict[str, object]
) -> None:
    """While a worker reports to Redis, a consumer acknowledges, another one crashes, and a third one leaves.

    Then Redis hears of all three, and the worker keeps nothing of it in memory.
    """
    url = broker.url()
    constants = {**constants, "MAX_DELIVERIES": 1, "REDIS_TIMEOUT": TIMEOUT}
    command = with_constants(f"lessons.{lesson}", SLOW_REPORT, **constants)
    with running(command, env={"REDIS_URL": url}) as server, closing(redis.Redis.from_url(url)) as admin:

        def keeps(*counts: int) -> bool:
            return bool(json.loads(server.get("/kept")[2]) == list(counts))

        async with AsyncExitStack() as stack:
            holders = []
            for payload in ("1", "2", "3"):
                holder = await stack.enter_async_context(client(server, CONSUMER))
                await produce(server, [payload])
                assert await receive(holder) == payload
                holders.append(holder)
            acknowledging, crashing, leaving = holders
            await acknowledging.send("ack")
            await until(lambda: "a report waits" in server.log, "the report")
            await produce(server, ["4"])
            assert await receive(acknowledging) == "4"
            await acknowledging.send("ack")
            await acknowledging.close()
            await vanish(crashing)
            await leaving.close()
            await until(lambda: keeps(0, 2, 1, 1), "the server to notice all of it")
        await asyncio.to_thread(server.get, "/report")
        await until(lambda: keeps(0, 0, 0, 0), "the next report")
        stats = server.stats()
        assert (stats["queued"], stats["dead"]) == (1, 1)
        assert await drain(server) == ["3"]
        [stream] = admin.keys("{queue*}")
        await until(lambda: admin.xlen(stream) == 0, "Redis to forget what was acknowledged")


SLOW_LOOK = """
lesson.random.uniform = lambda low, high: 1  # second between two looks for space
app.add_api_route("/waiting", lesson.channel.line.locked)
"""


async def test_producers_wait_in_line(broker: Redis) -> None:
    """A producer waits for space, and looks for it from time to time. No other one takes it in between."""
    command = with_constants("lessons.redis_server", SLOW_LOOK, CAPACITY=2, TIMEOUT=TIMEOUT)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await produce(server, ["1", "2"])
        async with client(server, PRODUCER) as first, client(server, PRODUCER) as second:
            await first.send("3")
            await until(lambda: server.get("/waiting")[2] == "true", "the first one to wait")
            async with client(server, CONSUMER + "?prefetch=2") as taker:
                assert [await receive(taker) for _ in range(2)] == ["1", "2"]
                await second.send("4")
                assert await receive(second) == "4"
                assert await receive(first) == "3"
                for _ in range(2):
                    await taker.send("ack")
                assert [await receive(taker) for _ in range(2)] == ["3", "4"]


COUNT_LINE = 'app.add_api_route("/line", lambda: lesson.channel.waiting)'


async def test_producers_in_line_share_the_space_of_a_burst(broker: Redis) -> None:
    """A consumer takes 50 payloads at once, while two producers have 50 each. Nobody takes all the space."""
    limits = {"CAPACITY": 100, "TIMEOUT": 6 * TIMEOUT}
    command = with_constants("lessons.redis_server", COUNT_LINE, **limits)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await produce(server, numbered(100))
        async with client(server, PRODUCER) as first, client(server, PRODUCER) as second:
            write(first, numbered(50))
            write(second, numbered(50))
            await until(lambda: server.get("/line")[2] == "2", "both to wait")
            receipts = [0, 0]

            async def count(place: int, producer: ClientConnection) -> None:
                async for _ in producer:
                    receipts[place] += 1

            counting = [asyncio.create_task(count(*each)) for each in enumerate((first, second))]
            async with client(server, CONSUMER + "?prefetch=50"):
                await until(lambda: sum(receipts) == 50, "the receipts of 50 payloads")
                assert min(receipts) >= 20
            for task in counting:
                task.cancel()
            await asyncio.gather(*counting, return_exceptions=True)


async def test_producers_wait_in_line_for_a_limited_time(broker: Redis) -> None:
    """Redis hangs, and so does the first in line. The next one gets 1013 before the first."""
    limits = {"CAPACITY": 1, "TIMEOUT": 2 * SLOWNESS, "REDIS_TIMEOUT": 3 * TIMEOUT}
    command = with_constants("lessons.redis_server", SLOW_LOOK, **limits)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await produce(server, ["1"])
        async with client(server, PRODUCER) as first, client(server, PRODUCER) as second:
            await first.send("2")
            await until(lambda: server.get("/waiting")[2] == "true", "the first one to wait")
            broker.stop()
            try:
                await second.send("3")
                await second.wait_closed()
            finally:
                broker.go_on()
            assert (second.close_code, second.close_reason) == (1013, "the queue is full: try again later")


@LESSONS
async def test_an_error_of_uvloop_counts_as_an_outage(
    broker: Redis, lesson: str, constants: dict[str, object]
) -> None:
    """A producer gets 1013, and everything goes on when Redis is back."""
    command = with_constants(f"lessons.{lesson}", UVLOOP_FAILS, **constants)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        async with consumer(server) as taker:
            await produce(server, ["1"])
            assert await taker.payload() == "1"
            broker.kill()
            for _ in range(2):  # the second time, there is certainly no connection any more
                async with client(server, PRODUCER) as producer:
                    await producer.send("2")
                    await producer.wait_closed()
                    assert producer.close_code == 1013
            broker.start()
            await until(lambda: server.get("/stats")[0] == 200, "the server to find Redis")
            await produce(server, ["3"])
            assert await taker.payload() == "3"
        assert tracebacks(server.log) == 0


CUT = """
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError

read, cut = Connection.read_response, []


async def read_response(connection, *args, **kwargs):
    answer = await read(connection, *args, **kwargs)
    if answer == 1 and not cut:  # one payload is queued
        cut.append(connection)
        await connection.disconnect()
        raise ConnectionError("cut")
    return answer


Connection.read_response = read_response
"""


@LESSONS
async def test_no_call_is_repeated(broker: Redis, lesson: str, constants: dict[str, object]) -> None:
    """Redis queues a payload, but the answer gets lost. The producer gets 1013. The payload comes once."""
    command = with_constants(f"lessons.{lesson}", CUT, **constants)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        async with client(server, PRODUCER) as producer:
            await producer.send("1")
            assert await receive_all(producer) == []
            assert producer.close_code == 1013
        assert await drain(server) == ["1"]


@LESSONS
async def test_a_server_that_ends_leaves_no_connection_open(
    broker: Redis, lesson: str, constants: dict[str, object]
) -> None:
    """Python would warn of it, if asked to."""
    warn = 'import warnings\n\nwarnings.simplefilter("always", ResourceWarning)\n'
    command = with_constants(f"lessons.{lesson}", warn, **constants)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await produce(server, ["1"])
        assert await drain(server) == ["1"]
        server.interrupt()
        assert await asyncio.to_thread(server.ends_within, 10) is not None
        assert "ResourceWarning" not in server.log


async def test_dead_letters_may_come_back_to_a_full_queue(broker: Redis) -> None:
    """Then it has more payloads than its capacity. Producers get no receipt until there is space again."""
    command = with_constants("lessons.redis_server", CAPACITY=1, MAX_DELIVERIES=1)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        await produce(server, ["1"])
        async with client(server, CONSUMER) as crashing:
            assert await receive(crashing) == "1"
            await vanish(crashing)
        await until(lambda: server.stats()["dead"] == 1, "the payload to be set aside")
        await produce(server, ["2"])
        assert server.retry() == 1
        async with client(server, PRODUCER) as producer:
            write(producer, ["3", "4"])
            assert await receive_all(producer) == []
            assert producer.close_code == 1013
        assert await drain(server) == ["2", "1"]


def test_a_worker_is_not_forgotten_while_it_has_payloads(broker: Redis) -> None:
    """Redis would forget them, too."""
    stream = Stream(broker.url())
    name, changed, group = redis_server.STREAM, redis_server.CHANGED, redis_server.GROUP
    with closing(stream.client):
        stream.client.eval(redis_server.PUT, 2, name, changed, group, 10, "1")
        assert stream.client.eval(redis_server.TAKE, 1, name, group, "a worker", "returned", 1)
        stream.client.eval(redis_server.LEAVE, 1, name, group, "a worker")
        assert stream.pending() == 1


async def test_nothing_is_lost_whatever_is_killed(
    crew: Server, crew_stream: Stream, impatient: list[str], broker: Redis
) -> None:
    """Consumers, workers, a server and Redis, killed under load at random: every echoed payload arrives."""
    with ExitStack() as stack:
        one = stack.enter_context(running(impatient, env={"REDIS_URL": crew_stream.url}))
        storm = Storm([one, crew])
        stack.callback(storm.close)

        def kill_consumer() -> None:
            random.choice(storm.consumers).process.kill()

        def kill_worker() -> None:
            for process in workers(crew)[:1]:  # none where uvicorn has yet to replace them
                process.kill()

        def kill_server() -> None:
            storm.servers[0].kill()
            storm.servers[0] = stack.enter_context(
                running(impatient, one.port, env={"REDIS_URL": crew_stream.url})
            )

        def kill_redis() -> None:
            broker.kill()
            broker.start()

        kills = [kill_consumer, kill_worker, kill_server, kill_redis] * 2
        random.shuffle(kills)
        order = [kill.__name__ for kill in kills]
        async with asyncio.TaskGroup() as group:
            for start in range(2):
                group.create_task(storm.produce(start))
            await storm.flow()
            for kill in kills:
                await asyncio.sleep(random.random() * 0.1)
                await asyncio.to_thread(kill)
                await storm.flow()
            storm.ending = True
        with suppress(AssertionError):
            await until(lambda: storm.echoed <= set(storm.received()), "the rest")
        assert storm.echoed - set(storm.received()) == set(), f"lost, after {order}"
        await until(crew_stream.is_empty, "all to be settled")
        assert tracebacks(storm.servers[0].log) == 0


def nginx_conf() -> str:
    """The proxy's configuration as lessons/redis_server.md shows it."""
    readme = ROOT / "lessons/redis_server.md"
    found = re.search(r"```nginx\n(.*?)```", readme.read_text(), re.DOTALL) if readme.exists() else None
    return found[1] if found else NGINX_CONF


@pytest.fixture
def proxy(shared: list[Server], tmp_path: Path) -> Iterator[Server]:
    """nginx in front of the two servers."""
    own_port, ports = free_port(), iter([server.port for server in shared])
    conf, places = nginx_conf(), []
    for pattern, replace in (
        (r"(?m)^(\s*listen) [\d.:]+;", lambda match: f"{match[1]} 127.0.0.1:{own_port};"),
        (r"(?m)^(\s*server) [\w.-]+:\d+;", lambda match: f"{match[1]} 127.0.0.1:{next(ports)};"),
        (r"(proxy_read_timeout) \w+;", lambda match: f"{match[1]} {int(PATIENCE * 1000)}ms;"),
    ):
        conf, count = re.subn(pattern, replace, conf)
        places.append(count)
    assert places == [1, 2, 1], "not the page's snippet as this test knows it"
    (tmp_path / "queue.conf").write_text(conf)
    (tmp_path / "nginx.conf").write_text(NGINX_MAIN)
    command = ["sh", "-c", 'exec "$0" -p "$1" -e stderr -c nginx.conf', str(NGINX), str(tmp_path)]
    with running(command, own_port) as server:
        yield server
        assert "[" not in server.log, server.log  # as in [error]


@needs_nginx
async def test_the_queue_works_behind_nginx(proxy: Server, pair: list[Server], stream: Stream) -> None:
    """Pages and payloads pass. A page from there may connect. An idle consumer stays connected."""
    marks = [len(server.log) for server in pair]
    status, content_type, page = proxy.get("/")
    assert (status, content_type) == (200, "text/html; charset=utf-8")
    assert page == (ROOT / "web/index.html").read_text()
    origin = f"http://127.0.0.1:{proxy.port}"
    async with AsyncExitStack() as stack:
        takers = [await stack.enter_async_context(client(proxy, CONSUMER, origin=origin)) for _ in range(4)]
        producer = await stack.enter_async_context(client(proxy, PRODUCER, origin=origin))
        for server, mark in zip(pair, marks, strict=True):
            assert CONSUMER in server.log[mark:], "a server got nothing to do"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5 * PATIENCE):
                await takers[0].wait_closed()
        payloads = [json.dumps("x" * 1_000_000), "1", "2", "3"]
        for payload in payloads:
            await producer.send(payload)
            assert await receive(producer) == payload
        assert sorted([await receive(taker) for taker in takers]) == sorted(payloads)
        for taker in takers:
            await taker.send("ack")
        await until(stream.is_empty, "the queue to be empty")
    with pytest.raises(InvalidStatus) as refusal:
        async with client(proxy, CONSUMER, origin="http://example.com"):
            pass
    assert refusal.value.response.status_code == 403


async def test_a_producer_is_told_why_redis_refuses(broker: Redis) -> None:
    """Redis answers, but has no memory left: the producer's close reason and the log say so.

    Consumers still get what is queued, and their acknowledgements make room.
    """
    stream = Stream(broker.url())
    with closing(stream.client), running(COMMAND, env={"REDIS_URL": stream.url}) as server:
        await produce(server, ["0"])
        with closing(redis.Redis(port=broker.port)) as admin:
            admin.config_set("maxmemory", 1)
            try:
                async with client(server, PRODUCER) as producer:
                    await producer.send("1")
                    await producer.wait_closed()
                assert await drain(server) == ["0"]
                await until(stream.is_empty, "Redis to forget the payload")
            finally:
                admin.config_set("maxmemory", 0)
        assert producer.close_code == 1013
        assert producer.close_reason
        reason = r"Redis refuses: command not allowed when used memory > 'maxmemory'\.( script: .*)?"
        assert re.fullmatch(reason, producer.close_reason), producer.close_reason
        assert "closed with 1013: Redis refuses: command not allowed when used memory" in server.log
        await produce(server, ["2"])
        assert await drain(server) == ["2"]
        assert tracebacks(server.log) == 0


async def test_a_long_refusal_fits_into_a_close_frame() -> None:
    """Redis cannot write to its disk, and says so in 300 characters. A close frame takes 123 bytes."""
    broker = Redis()
    with closing(broker), running(COMMAND, env={"REDIS_URL": broker.url()}) as server:
        with closing(redis.Redis(port=broker.port)) as connection:
            admin: Any = connection
            admin.config_set("save", "3600 1")
            broker.remove_folder()
            admin.bgsave()
            await until(lambda: admin.info()["rdb_last_bgsave_status"] == "err", "Redis to fail")
        async with client(server, PRODUCER) as producer:
            await producer.send("1")
            await producer.wait_closed()
        assert producer.close_code == 1013
        assert producer.close_reason
        assert producer.close_reason.startswith("Redis refuses: ")
        assert "Redis is configured to save RDB snapshots" in producer.close_reason
        assert tracebacks(server.log) == 0


async def test_the_queue_works_on_redis_cluster() -> None:
    """A script may use two keys only if they have the same hash slot: a payload goes in, back, and out.

    If the cluster loses the slot, or another one and therefore stops, that is as if Redis were gone.
    """
    broker = Redis("--cluster-enabled", "yes", "--databases", "1")
    admin: Any = redis.Redis(port=broker.port, decode_responses=True)
    with closing(broker), closing(admin):
        admin.cluster("ADDSLOTS", *range(16384))
        await until(lambda: admin.cluster("INFO")["cluster_state"] == "ok", "the cluster")
        with running(COMMAND, env={"REDIS_URL": broker.url(0)}) as server:
            await produce(server, ["1", "2"])
            async with client(server, CONSUMER) as holder:
                assert await receive(holder) == "1"
            await until(lambda: server.queued() == 2, "the payload to come back")
            assert await drain(server) == ["1", "2"]
            slot = admin.cluster("KEYSLOT", "{queue}")
            admin.config_set("cluster-require-full-coverage", "no")
            admin.cluster("DELSLOTS", slot)
            assert "Redis does not answer" in server.get("/stats")[2]
            assert "Redis is gone (Hash slot not served)" in server.log
            admin.cluster("ADDSLOTS", slot)
            await until(lambda: server.get("/stats")[0] == 200, "the server to find the slot")
            admin.config_set("cluster-require-full-coverage", "yes")
            admin.cluster("DELSLOTS", slot - 1)
            await until(lambda: admin.cluster("INFO")["cluster_state"] == "fail", "the cluster to fail")
            assert "Redis does not answer" in server.get("/stats")[2]
