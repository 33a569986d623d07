"""What lessons/partitioned_server.py promises: order for each key, one prefetch, and nodes that fail alone.

Of the contract, it keeps what does not need one order, or one capacity, for all producers.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from tests.kit.clients import client, consumer, drain, receive, vanish, write
from tests.kit.commands import CONSUMER, PRODUCER, uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.redis import CLAIM_AFTER, DOWN_AFTER, FAILOVER, REDIS_TIMEOUT, Node, shared_redis
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import until, wait_for
from tests.kit.workers import serving, worker
from tests.test_contract import (  # noqa: F401
    test_a_consumer_that_closes_and_the_next_one_get_every_payload,
    test_chaos_neither_loses_nor_duplicates_payloads,
    test_each_payload_goes_to_one_consumer,
    test_five_consumers_share_a_backlog_fairly,
    test_receipts_come_in_order_to_a_producer_that_sends_ahead,
    test_the_server_ends_at_once,
    test_the_server_ends_while_payloads_flow,
)

COMMAND = uvicorn_command("lessons.partitioned_server:app")
LESSON = "lessons.partitioned_server"
PARTITIONS = 8
STREAMS = [f"{{queue:{number}}}" for number in range(PARTITIONS)]


def partition(key: str) -> int:
    return zlib.crc32(key.encode()) % PARTITIONS


# A key for each partition, in order.
KEYS = sorted({partition(str(key)): str(key) for key in range(100)}.items())
KEY_OF = dict(KEYS)


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    """The server for the tests of the contract."""
    with running(COMMAND) as server:
        yield server


@pytest.fixture(name="server")
async def emptied(shared: Server) -> AsyncIterator[Server]:
    yield shared
    await drain(shared)  # of a test that failed
    assert tracebacks(shared.log) == 0, shared.log


@pytest.fixture
def fresh() -> Iterator[Server]:
    with running(COMMAND) as server:
        yield server


@pytest.fixture
def url() -> str:
    return shared_redis().url()


async def send(server: Server, key: str, payloads: list[str]) -> None:
    """Send payloads with a key. Each must come back as its receipt."""
    async with client(server, f"{PRODUCER}?key={key}") as producer:
        write(producer, payloads)
        for payload in payloads:
            assert await receive(producer) == payload


async def refused(server: Server, key: str, count: int) -> str | None:
    """Send payloads with a key until the server closes the connection. Returns its reason."""
    async with client(server, f"{PRODUCER}?key={key}") as producer:
        write(producer, ["0"] * count)
        await producer.wait_closed()
        assert producer.close_code == 1013
        return producer.close_reason


def labelled(key: str, count: int) -> list[str]:
    return [json.dumps([key, number]) for number in range(count)]


async def test_each_key_keeps_its_order(url: str) -> None:
    """Eight producers send at once, to two workers. Each connects five times. Its payloads stay in order."""
    keys = [str(key) for key in range(8)]
    sent = {key: labelled(key, 100) for key in keys}

    async def send_all(key: str) -> None:
        for start in range(0, 100, 20):
            await send(server, key, sent[key][start : start + 20])

    with running(with_options(COMMAND, "--workers", "2"), env={"REDIS_URL": url}) as server:
        async with asyncio.TaskGroup() as group:
            for key in keys:
                group.create_task(send_all(key))
        received = [json.loads(payload) for payload in await drain(server)]
    for key in keys:
        assert [json.dumps(payload) for payload in received if payload[0] == key] == sent[key]


async def test_a_key_decides_on_the_partition(url: str) -> None:
    """Each Stream gets the payloads of its keys. /stats counts all of them."""
    with running(COMMAND, env={"REDIS_URL": url}) as server:
        for number, key in KEYS:
            await send(server, key, ["1"] * (number + 1))
        with redis.Redis.from_url(url) as admin:
            lengths = [admin.xlen(stream) for stream in STREAMS]
        assert lengths == [1, 2, 3, 4, 5, 6, 7, 8]
        assert server.queued() == 36
        assert server.capacity == PARTITIONS * 1000
        assert len(await drain(server)) == 36


async def test_the_prefetch_is_for_all_partitions_together(url: str) -> None:
    """A consumer gets no more than its prefetch, and then no partition asks Redis again and again."""
    with (
        running(COMMAND, env={"REDIS_URL": url}) as server,
        redis.Redis.from_url(url, decode_responses=True) as connection,
    ):
        admin: Any = connection

        def pending() -> int:
            return sum(int(admin.xpending(stream, "workers")["pending"]) for stream in STREAMS)

        def calls() -> int:
            commands = ("eval", "evalsha", "xreadgroup", "xclaim")
            statistics = admin.info("commandstats")
            return sum(statistics.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in commands)

        for _, key in KEYS:
            await send(server, key, labelled(key, 10))
        async with client(server, CONSUMER + "?prefetch=3") as holder:
            for _ in range(3):
                await receive(holder)
            before = calls()
            await asyncio.sleep(0.5)
            assert calls() - before < 50
            assert pending() == 3
            await holder.send("ack")
            await receive(holder)
            assert pending() <= 4
        await until(lambda: pending() == 3 or server.queued() == 79, "the payloads to come back")
        assert len(await drain(server)) == 79


async def test_no_partition_starves_another(url: str) -> None:
    """A consumer gets a payload of the last partition before the first one is empty."""
    with running(COMMAND, env={"REDIS_URL": url}) as server:
        for _, key in KEYS:
            await send(server, key, labelled(key, 50))
        async with consumer(server) as taker:
            first = [json.loads(await taker.payload())[0] for _ in range(50)]
        assert set(first) == set(KEY_OF.values())
        await drain(server)


async def test_a_full_partition_stops_only_its_own_producers(url: str) -> None:
    """They get 1013. Producers of other partitions get their receipts."""
    with running(with_constants(LESSON, CAPACITY=10), env={"REDIS_URL": url}) as server:
        assert await refused(server, KEY_OF[0], 11) == "the queue is full: try again later"
        await send(server, KEY_OF[1], ["1"] * 10)
        assert server.queued() == 20
        assert len(await drain(server)) == 20


async def test_dead_letters_of_all_partitions(url: str) -> None:
    """/dead lists them, oldest first. They can be put back into their partitions."""
    with running(COMMAND, env={"REDIS_URL": url}) as server:
        for number in (3, 1, 2):
            await send(server, KEY_OF[number], [str(number)])
            for _ in range(5):
                async with client(server, CONSUMER) as crashing:
                    assert await receive(crashing) == str(number)
                    await vanish(crashing)
            await until(lambda: server.queued() == 0, "the payload to be set aside")
        await until(lambda: server.stats()["dead"] == 3, "three dead letters")
        letters = json.loads(server.get("/dead")[2])
        assert letters == [{"payload": payload, "deliveries": 5} for payload in ("3", "1", "2")]
        assert server.retry() == 3
        assert sorted(await drain(server)) == ["1", "2", "3"]


async def test_a_killed_worker_loses_nothing(url: str) -> None:
    """Its consumer had payloads of all partitions. Another worker redelivers all of them, in their order."""
    command = with_options(with_constants(LESSON, CLAIM_AFTER=CLAIM_AFTER), "--workers", "2")
    with running(command, env={"REDIS_URL": url}) as server:
        await until(lambda: serving(server) == 2, "both workers")
        for _, key in KEYS:
            await send(server, key, labelled(key, 3))
        async with client(server, CONSUMER + "?prefetch=24") as holder:
            had = [await receive(holder) for _ in range(24)]
            worker(server, holder).kill()
            await holder.wait_closed()
        async with consumer(server, prefetch=24) as taker:
            again = await taker.payloads(24)
        assert sorted(again) == sorted(had)
        for _, key in KEYS:
            assert [payload for payload in again if json.loads(payload)[0] == key] == labelled(key, 3)
        assert tracebacks(server.log) == 0


@pytest.fixture
def cluster() -> Iterator[list[Node]]:
    """Three nodes of a Redis Cluster, each with a third of the slots. Each goes on if another one fails."""
    options = ["--cluster-enabled", "yes", "--databases", "1", "--cluster-node-timeout", f"{DOWN_AFTER:.0f}"]
    options += ["--cluster-require-full-coverage", "no"]
    with ExitStack() as stack:
        nodes = [stack.enter_context(closing(Node(*options))) for _ in range(3)]
        for number, node in enumerate(nodes):
            node.admin.cluster("ADDSLOTS", *range(16384 * number // 3, 16384 * (number + 1) // 3))
        for node in nodes[1:]:
            node.admin.cluster("MEET", "127.0.0.1", nodes[0].port)

        def is_complete() -> bool:
            known = [int(node.admin.cluster("INFO")["cluster_slots_ok"]) for node in nodes]
            states = [node.admin.cluster("INFO")["cluster_state"] for node in nodes]
            return known == [16384] * 3 and states == ["ok"] * 3

        wait_for(is_complete, "the nodes to know each other", FAILOVER)
        yield nodes


async def test_a_node_that_is_killed_stops_only_its_own_partitions(cluster: list[Node]) -> None:
    """Its producers get 1013, the others go on, and so do the consumers. When it is back, nothing is lost."""
    homes = {}
    for number, stream in enumerate(STREAMS):
        homes[number] = cluster[key_slot(stream.encode()) * 3 // 16384]
    assert len(set(homes.values())) == 3
    killed = homes[0]
    other = next(number for number, node in homes.items() if node is not killed)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    with running(COMMAND, env={"REDIS_URL": f"redis+cluster://{hosts}"}) as server:
        await send(server, KEY_OF[0], ["1", "2"])
        assert server.acks
        killed.kill()
        assert await refused(server, KEY_OF[0], 1) == "Redis does not answer: try again later"
        async with consumer(server) as taker:
            await send(server, KEY_OF[other], ["3"])
            assert await taker.payload() == "3"
            assert server.get("/stats")[0] == 503
            killed.start()
            assert await taker.payloads(2) == ["1", "2"]
            await until(lambda: server.get("/stats")[0] == 200, "all partitions", FAILOVER)
            await send(server, KEY_OF[0], ["4"])
            assert await taker.payload() == "4"
        assert f"{STREAMS[0]} waits, its producers get 1013" in server.log
        assert f"Redis is back: {STREAMS[0]}" in server.log
        assert tracebacks(server.log) == 0


async def test_a_node_that_hangs_delays_the_other_partitions_once(cluster: list[Node]) -> None:
    """It answers nothing. The consumer waits for REDIS_TIMEOUT, but not again for each of its partitions."""
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    command = with_constants(LESSON, REDIS_TIMEOUT=REDIS_TIMEOUT)
    with running(command, env={"REDIS_URL": f"redis+cluster://{hosts}"}) as server:
        for _, key in KEYS:
            await send(server, key, labelled(key, 50))
        streams = [stream for stream in STREAMS if key_slot(stream.encode()) * 3 // 16384 == 0]
        hanging = {KEY_OF[STREAMS.index(stream)] for stream in streams}
        assert len(hanging) == 4
        async with consumer(server) as taker:
            await taker.payloads(20)
            cluster[0].stop()
            try:
                async with asyncio.timeout(3 * REDIS_TIMEOUT):
                    received = [json.loads(await taker.payload())[0] for _ in range(50)]
            finally:
                cluster[0].go_on()
            assert set(received) - hanging == set(KEY_OF.values()) - hanging
            await taker.payloads(8 * 50 - 70)
        assert tracebacks(server.log) == 0


async def test_a_partition_that_moves_to_another_node_loses_nothing(cluster: list[Node]) -> None:
    """Its Stream moves first, and for a moment no node serves it. A consumer has one of its payloads."""
    slot = key_slot(STREAMS[0].encode())
    source = cluster[slot * 3 // 16384]
    target = cluster[(slot * 3 // 16384 + 1) % 3]
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    with running(COMMAND, env={"REDIS_URL": f"redis+cluster://{hosts}"}) as server:
        await send(server, KEY_OF[0], ["1", "2"])
        async with client(server, CONSUMER) as holder:
            assert await receive(holder) == "1"
            target.admin.cluster("SETSLOT", slot, "IMPORTING", source.admin.cluster("MYID"))
            source.admin.cluster("SETSLOT", slot, "MIGRATING", target.admin.cluster("MYID"))
            source.admin.migrate("127.0.0.1", target.port, STREAMS[0], 0, 10_000)
            await holder.send("ack")
            await until(lambda: f"MOVED to 127.0.0.1:{target.port}" in server.log, "the server to notice")
            others = source.admin.cluster("GETKEYSINSLOT", slot, 10)
            source.admin.migrate("127.0.0.1", target.port, others, 0, 10_000)
            for node in (target, source):
                node.admin.cluster("SETSLOT", slot, "NODE", target.admin.cluster("MYID"))
            assert await receive(holder) == "2"
            await holder.send("ack")
        await until(lambda: server.get("/stats")[0] == 200, "the partition", FAILOVER)
        await send(server, KEY_OF[0], ["3"])
        assert await drain(server) == ["3"]
        assert f"Redis is back: {STREAMS[0]}" in server.log
        assert tracebacks(server.log) == 0
