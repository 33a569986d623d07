"""lessons/rooms_server.py: a queue for each room. The contract suite tests a single room of it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from tests.checks import fails
from tests.kit.clients import client, numbered, receive, reset, vanish, write
from tests.kit.commands import SERVERS, uvicorn_command
from tests.kit.constants import with_constants
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import until

NAIVE = uvicorn_command("lessons.naive.rooms_server:app")


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with running(SERVERS["rooms_server.py"]) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """A server without rooms. It must come through the test without a traceback."""
    yield shared
    assert rooms(shared) == {}
    assert tracebacks(shared.log) == 0, shared.log


def rooms(server: Server) -> dict[str, int]:
    """Return how many payloads wait in each room."""
    queued: dict[str, int] = json.loads(server.get("/stats")[2])["rooms"]
    return queued


async def send(websocket: ClientConnection, payloads: list[str]) -> None:
    """Send payloads, and wait for their receipts."""
    write(websocket, payloads)
    for payload in payloads:
        assert await receive(websocket) == payload


async def take(server: Server, room: str, payloads: list[str]) -> None:
    """Expect these payloads, and no others, in a room that nobody else uses."""
    async with client(server, f"/ws/{room}/consumer") as consumer:
        for payload in payloads:
            assert await receive(consumer) == payload
    await until(lambda: room not in rooms(server), "the room to be dropped")


async def test_a_payload_never_leaves_its_room(server: Server) -> None:
    """Names that differ only in case, or of which one is the beginning of the other, are different rooms."""
    names = ["a", "A", "a.b", "a.b-c", "a_b", "0", "x" * 64]
    async with AsyncExitStack() as stack:
        consumers = {
            name: await stack.enter_async_context(client(server, f"/ws/{name}/consumer")) for name in names
        }
        for name in names:
            async with client(server, f"/ws/{name}/producer") as producer:
                await send(producer, [json.dumps(name)])
        for name, consumer in consumers.items():
            assert await receive(consumer) == json.dumps(name)
        assert rooms(server) == dict.fromkeys(names, 0)
    await until(lambda: rooms(server) == {}, "the rooms to be dropped")


@pytest.mark.parametrize("end", ["producer", "consumer"])
@pytest.mark.parametrize("name", ["", "a%20b", "%C3%A9", "x" * 65, "a/b", "a%2Fb", "*"])
async def test_a_bad_name_is_refused_before_the_handshake(server: Server, name: str, end: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with client(server, f"/ws/{name}/{end}"):
            pass
    assert refused.value.response.status_code == 404
    assert b"1 to 64 letters" in refused.value.response.body


async def check_rooms_are_dropped(server: Server) -> None:
    """However the last connection leaves, an empty room is dropped at once."""
    ways: list[Callable[[ClientConnection], Awaitable[None]]] = [ClientConnection.close, vanish, reset]
    for number, leave in enumerate(ways):
        async with (
            client(server, f"/ws/room{number}/consumer") as consumer,
            client(server, f"/ws/room{number}/producer") as producer,
        ):
            await send(producer, ["1"])
            assert await receive(consumer) == "1"
            assert rooms(server)[f"room{number}"] == 0
            await producer.close()
            await leave(consumer)
    await until(lambda: not rooms(server), "the rooms to be dropped", timeout=2)


async def test_a_room_is_dropped_when_its_last_connection_leaves(server: Server) -> None:
    await check_rooms_are_dropped(server)


async def test_the_naive_version_keeps_every_room() -> None:
    with running(NAIVE) as naive, fails("the rooms to be dropped"):
        await check_rooms_are_dropped(naive)


async def test_a_room_with_a_payload_stays(server: Server) -> None:
    """Its producer has left, and a consumer that comes later gets the payload."""
    async with client(server, "/ws/kitchen/producer") as producer:
        await send(producer, ["1", "2"])
    assert rooms(server) == {"kitchen": 2}
    await take(server, "kitchen", ["1", "2"])


async def test_a_room_too_many_is_refused_until_one_is_dropped() -> None:
    """The connection gets 1013. The existing rooms go on."""
    with running(with_constants("lessons.rooms_server", MAX_ROOMS=2)) as server:
        async with client(server, "/ws/a/consumer") as first, client(server, "/ws/b/producer") as second:
            for end in ("producer", "consumer"):
                async with client(server, f"/ws/c/{end}") as refused:
                    await refused.wait_closed()
                    assert refused.close_code == 1013
                    assert refused.close_reason == "there are 2 rooms: try again later"
            async with client(server, "/ws/a/producer") as producer:
                await send(producer, ["1"])
                assert await receive(first) == "1"
            await second.close()
            await until(lambda: "b" not in rooms(server), "a room to be dropped")
            async with client(server, "/ws/c/producer") as welcome:
                await send(welcome, ["1"])
        assert tracebacks(server.log) == 0


async def test_full_rooms_delay_no_other_room() -> None:
    """20 rooms are full, and each has a producer that waits for space. Payloads flow in 180 other rooms."""
    payloads = numbered(10)
    with running(with_constants("lessons.rooms_server", CAPACITY=10, TIMEOUT=60)) as server:
        async with AsyncExitStack() as stack:
            for number in range(20):
                producer = await stack.enter_async_context(client(server, f"/ws/full{number}/producer"))
                await send(producer, payloads)
                await producer.send('"waits"')

            async def flow(number: int) -> None:
                async with (
                    client(server, f"/ws/room{number}/consumer") as consumer,
                    client(server, f"/ws/room{number}/producer") as producer,
                ):
                    for payload in payloads:
                        await send(producer, [payload])
                        assert await receive(consumer) == payload

            async with asyncio.TaskGroup() as group:
                for number in range(180):
                    group.create_task(flow(number))
            expected = {f"full{number}": 10 for number in range(20)}
            await until(lambda: rooms(server) == expected, "only the full rooms to be left")
            for number in range(20):
                async with client(server, f"/ws/full{number}/consumer") as consumer:
                    for payload in [*payloads, '"waits"']:
                        assert await receive(consumer) == payload
        assert tracebacks(server.log) == 0


async def test_server_code_can_produce_and_consume() -> None:
    """A task consumes one room and produces in another. If it fails on a payload, the payload goes back."""
    with running(uvicorn_command("tests.examples.rooms:app")) as server:
        async with (
            client(server, "/ws/questions/producer") as producer,
            client(server, "/ws/answers/consumer") as consumer,
        ):
            await send(producer, ['{"question": "why?"}'])
            assert [await receive(consumer) for _ in range(3)] == ['"You"', '"asked:"', '"why?"']
            await send(producer, ["[]"])
            await until(lambda: "TypeError: list indices" in server.log, "the failure")
            assert rooms(server)["questions"] == 1
            server.interrupt()
            assert server.ends_within(3) is not None
        assert "1 payloads were still queued" in server.log


KEPT = """
import asyncio
from lessons import rooms_server as lesson

async def main():
    room = lesson.rooms["kitchen"]
    await room.put("1")
    taken = asyncio.Event()
    async def handle(payload):
        taken.set()
    task = asyncio.create_task(room.deliver(handle))
    await taken.wait()
    assert list(lesson.rooms) == ["kitchen"]
    task.cancel()
    await asyncio.wait([task])
    assert not lesson.rooms
    try:
        await room.put("2")
    except LookupError as error:
        print(error)

asyncio.run(main())
"""


def test_server_code_cannot_put_a_payload_in_a_room_that_was_dropped() -> None:
    """Such a payload would be lost: no consumer could find it."""
    printed = subprocess.check_output([sys.executable, "-c", KEPT], text=True)
    assert printed == "room kitchen was dropped: get it from `rooms` each time\n"


async def test_the_server_counts_what_is_left_in_all_rooms() -> None:
    with running(SERVERS["rooms_server.py"]) as server:
        for name in ("a", "b"):
            async with client(server, f"/ws/{name}/producer") as producer:
                await send(producer, ["1"])
        server.interrupt()
        assert server.ends_within(2) is not None
        assert "2 payloads were still queued" in server.log
