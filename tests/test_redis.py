"""What lessons/redis_server.py promises beyond the contract: one queue for many servers; any may die."""

import asyncio
import json
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from tests.checks import end, flood
from tests.kit.clients import client, consumer, drain, gone, port, produce, receive, receive_all, vanish
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, with_options
from tests.kit.constants import with_constants
from tests.kit.needs import NGINX, needs_nginx
from tests.kit.ports import free_port
from tests.kit.redis import CLAIM_AFTER, REDIS_TIMEOUT, Redis, lose, restore
from tests.kit.root import ROOT
from tests.kit.servers import Server, busy, running, tracebacks
from tests.kit.storm import Storm
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for
from tests.kit.workers import serving, worker, workers

COMMAND = SERVERS["redis_server.py"]
SOON = 0.5 * SLOWNESS  # seconds in which what goes at once has gone
PATIENCE = 1 * SLOWNESS  # seconds after which nginx gives up a connection on which nothing comes
PING_INTERVAL = 0.25 * SLOWNESS  # seconds
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
async def pair(shared: list[Server]) -> AsyncIterator[list[Server]]:
    """Two servers, one queue, which is empty. They must come through the test without a traceback."""
    marks = [len(server.log) for server in shared]
    yield shared
    await drain(shared[0])  # of a test that failed
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
            assert re.findall("ERROR|Redis is gone|Redis is back", log) == [
                *("ERROR", "Redis is gone", "Redis is back")
            ], log


async def test_a_payload_that_redis_hands_over_late_is_delivered(pair: list[Server], broker: Redis) -> None:
    """A worker asks for a payload. Redis answers, but so late that the worker no longer waits.

    Its consumer gets the payload all the same, and not only after CLAIM_AFTER, as that of a worker that died.
    """
    server, _ = pair
    await produce(server, ["1", "2"])
    async with consumer(server) as taker:
        assert await taker.payload() == "1"  # so that Redis knows the script that hands payloads over
    await until(lambda: server.queued() == 1, "the second payload to be queued")
    mark = len(server.log)
    broker.stop()
    try:
        async with consumer(server) as taker:
            await until(lambda: "Redis is gone" in server.log[mark:], "the worker to give up waiting")
            broker.go_on()
            assert await taker.payload() == "2"
    finally:
        broker.go_on()


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_ctrl_c_ends_the_server_while_redis_is_gone(broker: Redis, how: str) -> None:
    """It prints no traceback, although a producer waits for a receipt."""
    with running(COMMAND, env={"REDIS_URL": broker.url()}) as server:
        async with consumer(server), client(server, PRODUCER), client(server, PRODUCER) as producer:
            lose(broker, how)
            try:
                await producer.send("1")
                server.interrupt()
                # uvicorn waits for the endpoints for a second, and the server for Redis for two.
                took = await asyncio.to_thread(server.ends_within, 6)
            finally:
                restore(broker, how)
        assert took is not None, server.log
        await until(lambda: not server.processes(), "all to end")
        assert tracebacks(server.log) == 0


async def test_payloads_on_their_way_to_a_server_that_ends_come_back(
    crew: Server, crew_stream: Stream, impatient: list[str], broker: Redis
) -> None:
    """They go to a consumer of another server."""
    payloads = [str(number) for number in range(5)]
    await produce(crew, payloads)
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
    async with consumer(crew) as taker:
        assert await taker.payloads(5) == payloads


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
        doomed.kill()
        killed = time.monotonic()
        assert [await receive(taker) for _ in range(3)] == payloads[:3]
        took = time.monotonic() - killed
        assert 0.5 * CLAIM_AFTER < took < 2 * CLAIM_AFTER, f"claimed after {took:.2f} s"
        for websocket in (keeper, taker):
            for _ in range(3):
                await websocket.send("ack")
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


# Of each lesson, the servers in the next two tests have one queue.
LESSONS = pytest.mark.parametrize(
    ("lesson", "constants"),
    [("redis_server", {}), ("partitioned_server", {"PARTITIONS": 1})],
    ids=["redis_server.py", "partitioned_server.py"],
)
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
    if json.loads(args[-1])["returned"] and not lost:
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
async def test_a_repeated_report_takes_nothing_back(
    broker: Redis, lesson: str, constants: dict[str, object]
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
        await until(lambda: "an answer gets lost" in one.log, "the report")
        async with client(other, CONSUMER + "?prefetch=2") as taker:
            assert await receive(taker) == "1"
            await asyncio.to_thread(one.get, "/fail")
            await until(lambda: "reported again" in one.log, "the second report")
            await produce(one, ["2"])
            assert await receive(taker) == "2"


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
        assert "Redis refuses: command not allowed when used memory" in producer.close_reason
        assert "closed with 1013: Redis refuses: command not allowed when used memory" in server.log
        await produce(server, ["2"])
        assert await drain(server) == ["2"]
        assert tracebacks(server.log) == 0


async def test_the_queue_works_on_redis_cluster() -> None:
    """A script may use two keys only if they have the same hash slot: a payload goes in, back, and out."""
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
