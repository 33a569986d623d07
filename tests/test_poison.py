"""Poison messages: a payload that crashes every consumer is set aside, and only that payload."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from http.client import HTTPConnection
from types import ModuleType

import pytest
from websockets.asyncio.client import ClientConnection

from lessons import ack_server, partitioned_server, redis_server
from tests.kit.clients import consumer, drain, numbered, produce, receive, reset, vanish
from tests.kit.commands import ACKING, SERVERS
from tests.kit.constants import with_constants
from tests.kit.redis import shared_redis
from tests.kit.scripts import Script
from tests.kit.servers import Server, running
from tests.kit.waiting import until

MAX_DELIVERIES = 5
acking = pytest.mark.parametrize("command", ACKING, indirect=True)
Leave = Callable[[ClientConnection], Awaitable[None]]


async def fail(websocket: ClientConnection) -> None:
    """Leave as a program that raises an exception inside `async with connect(...)`."""
    await websocket.close(1011)


async def send_nonsense(websocket: ClientConnection) -> None:
    await websocket.send("nack")
    await websocket.wait_closed()


async def close(websocket: ClientConnection) -> None:
    await websocket.close()


async def go_away(websocket: ClientConnection) -> None:
    await websocket.close(1001)


def dead(server: Server) -> list[dict[str, object]]:
    letters: list[dict[str, object]] = json.loads(server.get("/dead")[2])
    return letters


async def crash(server: Server, leave: Leave, expected: str, prefetch: int = 1) -> None:
    """Connect a consumer that gets this payload first, and crashes on it."""
    before = server.queued() + server.stats()["dead"]
    async with consumer(server, prefetch) as taker:
        assert await receive(taker.websocket) == expected
        await leave(taker.websocket)
    await until(lambda: server.queued() + server.stats()["dead"] == before, "the payload to come back")


@pytest.mark.parametrize("command", [*ACKING, "gateway_server.py"], indirect=True)
@pytest.mark.parametrize("leave", [vanish, reset, fail, send_nonsense])
async def test_a_payload_that_crashes_every_consumer_is_set_aside(server: Server, leave: Leave) -> None:
    """After MAX_DELIVERIES deliveries, the next consumer gets the payload behind it."""
    payloads = ['{"poison": "<b>"}', "1", "2"]
    mark = len(server.log)
    await produce(server, payloads)
    for _ in range(MAX_DELIVERIES):
        assert dead(server) == []
        await crash(server, leave, payloads[0])
    assert dead(server) == [{"payload": payloads[0], "deliveries": MAX_DELIVERIES}]
    assert server.stats()["dead"] == 1
    assert await drain(server) == ["1", "2"]
    assert f"WARNING:  set aside after {MAX_DELIVERIES} deliveries: {payloads[0]}" in server.log[mark:]
    assert server.retry() == 1
    await crash(server, leave, payloads[0])
    assert dead(server) == [], "it was set aside again at once"
    assert await drain(server) == payloads[:1]


@acking
async def test_payloads_that_were_prefetched_are_not_to_blame(server: Server) -> None:
    """Each consumer crashes with 100 payloads. Only the oldest is set aside, and the others come in order."""
    payloads = numbered(100)
    await produce(server, payloads)
    for number in range(3):
        for _ in range(MAX_DELIVERIES):
            await crash(server, vanish, payloads[number], prefetch=100)
        assert [letter["payload"] for letter in dead(server)] == payloads[: number + 1]
    assert await drain(server) == payloads[3:]
    assert server.retry() == 3
    assert await drain(server) == payloads[:3]


@acking
async def test_an_acknowledged_payload_is_not_to_blame(server: Server) -> None:
    """The consumer was working on the payload behind it."""
    await produce(server, ["1", "2"])
    async with consumer(server, 2) as taker:
        assert await taker.payloads(1) == ["1"]
        assert await receive(taker.websocket) == "2"
        await vanish(taker.websocket)
    await until(lambda: server.queued() == 1, "the payload to come back")
    for _ in range(MAX_DELIVERIES - 1):
        assert dead(server) == []
        await crash(server, vanish, "2")
    assert [letter["payload"] for letter in dead(server)] == ["2"]
    server.retry()
    await drain(server)


@acking
@pytest.mark.parametrize("leave", [close, go_away])
async def test_a_consumer_that_leaves_on_purpose_does_not_count(server: Server, leave: Leave) -> None:
    """It has finished nothing and broken nothing."""
    await produce(server, ["1"])
    for _ in range(MAX_DELIVERIES + 2):
        await crash(server, leave, "1")
    assert dead(server) == []
    assert await drain(server) == ["1"]


@acking
async def test_a_server_that_ends_is_no_failure_of_its_consumers(command: list[str]) -> None:
    """The payload on which a consumer works goes back to the queue, and its deliveries stay the same."""
    lesson = command[3].removesuffix(":app")
    with running(with_constants(lesson, MAX_DELIVERIES=1), env={"REDIS_URL": shared_redis().url()}) as server:
        await produce(server, ["1"])
        async with consumer(server) as taker:
            assert await receive(taker.websocket) == "1"
            server.interrupt()
            await taker.websocket.wait_closed()
        assert await asyncio.to_thread(server.ends_within, 3) is not None
        assert "1 payloads were still queued" in server.log


async def test_a_payload_that_was_not_sent_is_not_to_blame() -> None:
    """If the oldest payload is still on its way, the consumer cannot be working on it."""
    unacknowledged = ack_server.Unacknowledged(prefetch=2)
    unacknowledged.sending_since = time.monotonic()
    unacknowledged.entries.append(ack_server.Entry(1, "1"))
    unacknowledged.blame()
    assert unacknowledged.entries[0].deliveries == 0
    unacknowledged.entries.append(ack_server.Entry(2, "2"))  # now the second one is on its way
    unacknowledged.blame()
    assert [entry.deliveries for entry in unacknowledged.entries] == [1, 0]


@pytest.mark.parametrize("lesson", [redis_server, partitioned_server])
async def test_in_redis_a_payload_that_was_not_sent_is_not_to_blame(lesson: ModuleType) -> None:
    """More payloads may wait behind the one that is on its way."""
    unacknowledged = lesson.Unacknowledged(prefetch=3)
    unacknowledged.sending_since = time.monotonic()
    unacknowledged.payloads.append("1")
    unacknowledged.blame()
    assert unacknowledged.failed == []
    unacknowledged.payloads.append("2")
    unacknowledged.unsent.put_nowait("2")
    unacknowledged.blame()
    assert unacknowledged.failed == []
    unacknowledged.unsent.get_nowait()  # now the second one is on its way
    unacknowledged.blame()
    assert unacknowledged.failed == ["1"]


@acking
async def test_only_the_hundred_oldest_dead_letters_are_listed(command: list[str]) -> None:
    lesson = command[3].removesuffix(":app")
    with running(with_constants(lesson, MAX_DELIVERIES=1)) as server:
        payloads = numbered(102)
        await produce(server, payloads)
        for payload in payloads:
            await crash(server, vanish, payload)
        assert server.stats()["dead"] == 102
        assert [letter["payload"] for letter in dead(server)] == payloads[:100]
        assert server.retry() == 102
        assert await drain(server) == payloads


@acking
async def test_a_foreign_page_can_neither_read_nor_retry_dead_letters(server: Server) -> None:
    for method, path in (("GET", "/dead"), ("POST", "/dead/retry")):
        connection = HTTPConnection("127.0.0.1", server.port)
        connection.request(method, path, headers={"Origin": "http://evil.example"})
        assert connection.getresponse().status == 403
        connection.close()


@acking
async def test_a_payload_that_the_client_never_survives_is_set_aside(server: Server) -> None:
    """The client of the README prints it five times. Then comes the payload behind it."""
    await produce(server, ['"poison"', "1"])
    for _ in range(MAX_DELIVERIES):
        script = Script(server.url("/ws/consumer"))
        try:
            assert await script.prints(1) == ['"poison"']
        finally:
            script.close()
        # A server that was busy may notice the next client first, and give it the payload behind.
        await until(lambda: server.queued() + server.stats()["dead"] == 2, "the poison to come back")
    assert server.stats()["dead"] == 1
    assert await drain(server) == ["1"]
    server.retry()
    await drain(server)


async def test_in_redis_counts_and_dead_letters_survive_a_restart() -> None:
    """Three consumers fail on a payload before the restart, and two after it."""
    command, env = SERVERS["redis_server.py"], {"REDIS_URL": shared_redis().url()}
    with running(command, env=env) as server:
        await produce(server, ["1", "2"])
        for _ in range(3):
            await crash(server, vanish, "1")
        server.interrupt()
        assert server.ends_within(2) is not None
    with running(command, env=env) as server:
        for _ in range(2):
            assert dead(server) == []
            await crash(server, vanish, "1")
        assert dead(server) == [{"payload": "1", "deliveries": 5}]
        server.kill()
    with running(command, env=env) as server:
        assert dead(server) == [{"payload": "1", "deliveries": 5}]
        assert await drain(server) == ["2"]
        assert server.retry() == 1
        assert await drain(server) == ["1"]
