"""Acknowledgements: what a consumer has not acknowledged when its connection ends is redelivered."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.checks import (
    AT_ONCE,
    Leaving,
    check_a_killed_consumer_takes_nothing,
    check_forbidden,
    check_foreign_page_is_refused,
    end,
    flood,
    leave_politely,
)
from tests.kit.clients import (
    arrived,
    client,
    consumer,
    drain,
    narrow,
    numbered,
    produce,
    receive,
    reset,
    settled,
    vanish,
)
from tests.kit.commands import ACKING, CONSUMER, MAX_PREFETCH, PRODUCER, with_options
from tests.kit.constants import with_constants
from tests.kit.scripts import Script
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS, until

LOAD_SECONDS = 2  # for which consumers are killed under load
PING = ["--ws-ping-interval", "1", "--ws-ping-timeout", str(1 * SLOWNESS)]

pytestmark = pytest.mark.parametrize("command", ACKING, indirect=True)


async def queued(server: Server, count: int) -> None:
    await until(lambda: server.queued() == count, f"{count} queued payloads")


async def check_nothing_comes_again(server: Server) -> None:
    """The next payload is what the next consumer gets first."""
    await produce(server, ['"new"'])
    assert await settled(server) == 1
    assert await drain(server) == ['"new"']


async def be_refused(websocket: ClientConnection) -> None:
    await websocket.send("nack")
    await websocket.wait_closed()
    assert websocket.close_code == 1008


WAYS: list[Leaving] = [leave_politely, vanish, reset, be_refused]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# Prefetch


@pytest.mark.parametrize("prefetch", [None, 1, 2, 8, 100, MAX_PREFETCH])
async def test_the_server_sends_no_more_ahead_than_the_prefetch(server: Server, prefetch: int | None) -> None:
    """Without a prefetch, that is one payload. Each acknowledgement lets exactly one more come."""
    window = prefetch or 1
    payloads = numbered(window + 10)
    async with consumer(server, prefetch) as taker:
        await produce(server, payloads)
        assert await settled(server) == 10
        assert await arrived(taker.websocket) == payloads[:window]
        for sent in (window, window + 1):
            await taker.websocket.send("ack")
            await queued(server, window + 9 - sent)
            assert await settled(server) == window + 9 - sent
            assert await arrived(taker.websocket) == payloads[sent : sent + 1]
    await queued(server, window + 8)
    assert await drain(server) == payloads[2:]


async def test_consumers_with_a_large_prefetch_share_a_backlog(server: Server) -> None:
    """Neither of two gets three times as much as the other, although each has room for everything."""
    payloads = numbered(640)
    async with consumer(server, MAX_PREFETCH) as one, consumer(server, MAX_PREFETCH) as other:
        await produce(server, payloads)
        counts = {one: 0, other: 0}
        while sum(counts.values()) < len(payloads):
            for taker in counts:
                counts[taker] += len(await arrived(taker.websocket))
        assert max(counts.values()) < 3 * min(counts.values())
    await queued(server, len(payloads))
    assert await drain(server) == payloads


async def test_a_consumer_that_was_at_its_prefetch_takes_no_more_than_the_others(server: Server) -> None:
    """It stops in the middle of its turn. When it goes on, it begins a new turn."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(client(server, f"{CONSUMER}?prefetch=20"))
        await produce(server, numbered(100))
        await queued(server, 80)
        await drain(server)
        await queued(server, 0)
        for _ in range(20):
            await receive(first)
            await first.send("ack")
        await settled(server)
        others = [
            await stack.enter_async_context(client(server, f"{CONSUMER}?prefetch=20")) for _ in range(4)
        ]
        await produce(server, numbered(20))
        counts = dict.fromkeys((first, *others), 0)
        while sum(counts.values()) < 20:
            for taker in counts:
                counts[taker] += len(await arrived(taker))
        assert max(counts.values()) < 3 * min(counts.values()), f"hogged: {list(counts.values())}"


async def test_acknowledgements_may_come_together_and_in_parts(server: Server) -> None:
    """Six acknowledgements count as six, in whatever frames they come."""
    payloads = numbered(20)
    async with consumer(server, 8) as taker:
        await produce(server, payloads)
        assert [await receive(taker.websocket) for _ in range(8)] == payloads[:8]
        for _ in range(4):
            await taker.websocket.send("ack")
        await taker.websocket.send(["a", "ck"])
        await taker.websocket.send(["", "ack", ""])
        assert [await receive(taker.websocket) for _ in range(6)] == payloads[8:14]
        assert await settled(server) == 6
        assert await arrived(taker.websocket) == []
        await taker.websocket.close()
        assert taker.websocket.close_code == 1000
    await queued(server, 14)
    assert await drain(server) == payloads[6:]


@pytest.mark.parametrize("prefetch", ["0", "1001", "-1", "x", "", "1.5"])
async def test_an_invalid_prefetch_is_refused(server: Server, prefetch: str) -> None:
    """The server closes with 1008 after the handshake, so that a client can read the reason."""
    await produce(server, ["1"])
    async with client(server, f"{CONSUMER}?prefetch={prefetch}") as websocket:
        with pytest.raises(ConnectionClosed):
            await receive(websocket)
        assert websocket.close_code == 1008
        assert websocket.close_reason
        assert "prefetch" in websocket.close_reason
    await check_foreign_page_is_refused(server, f"{CONSUMER}?prefetch={prefetch}", "http://evil.example")
    assert await drain(server) == ["1"]


async def test_an_acknowledgement_of_nothing_is_refused(server: Server) -> None:
    """The server closes with 1008 at once, so that a client that counts wrongly hears of it."""
    await check_forbidden(server, "ack", unacknowledged=0)


async def test_a_second_acknowledgement_of_a_payload_is_refused(server: Server) -> None:
    """The first one counts."""
    await produce(server, ["1", "2"])
    async with consumer(server, 2) as taker:
        assert await taker.payloads(2) == ["1", "2"]
        await taker.websocket.send("ack")
        await taker.websocket.wait_closed()
        assert taker.websocket.close_code == 1008
    await check_nothing_comes_again(server)


async def test_stats_do_not_count_unacknowledged_payloads_as_queued(server: Server) -> None:
    """A payload is queued until it is sent, and again when it comes back."""
    async with consumer(server, 3) as taker:
        await produce(server, numbered(5))
        assert await settled(server) == 2
        await taker.payloads(1)
        assert await settled(server) == 1
        await taker.payloads(2)
        assert await settled(server) == 0
        assert [await receive(taker.websocket) for _ in range(2)] == numbered(2, start=3)
    await queued(server, 2)


# What comes back


@ways
async def test_unacknowledged_payloads_go_back_to_the_front(server: Server, way: Leaving) -> None:
    """They keep their order and go before newer payloads, however the connection ends."""
    payloads = numbered(30)
    async with consumer(server, 10) as taker:
        await produce(server, payloads[:20])
        assert await taker.payloads(5) == payloads[:5]
        await queued(server, 5)
        await way(taker.websocket)
        await queued(server, 15)
    await produce(server, payloads[20:])
    assert await drain(server) == payloads[5:]


@ways
async def test_unacknowledged_payloads_go_to_a_consumer_that_waits(server: Server, way: Leaving) -> None:
    """The consumer need not wait for a new payload."""
    payloads = numbered(10)
    async with consumer(server, 10) as one:
        await produce(server, payloads)
        assert [await receive(one.websocket) for _ in payloads] == payloads
        async with consumer(server) as other:
            await way(one.websocket)
            assert await other.payloads(10) == payloads
    await check_nothing_comes_again(server)


@pytest.mark.parametrize("first", [0, 1])
async def test_payloads_of_two_departed_consumers_come_in_their_old_order(server: Server, first: int) -> None:
    """Each of two consumers holds every other payload. It does not matter which leaves first."""
    payloads = numbered(50)
    async with consumer(server, 10) as one, AsyncExitStack() as stack:
        await produce(server, payloads[:10])
        await queued(server, 0)  # so one has ten of them, and no room
        other = await stack.enter_async_context(consumer(server, 10))
        await produce(server, payloads[10:20])
        await queued(server, 0)
        for number in range(20, 40):  # an acknowledgement lets its consumer alone have the next
            await (one, other)[number % 2].payload()
            await produce(server, [payloads[number]])
            await queued(server, 0)
        assert await arrived(one.websocket) == payloads[20:40:2]
        assert await arrived(other.websocket) == payloads[21:40:2]
        await produce(server, payloads[40:])
        await (vanish if first else reset)((one, other)[first].websocket)
        await queued(server, 20)
        await (reset if first else vanish)((other, one)[first].websocket)
        await queued(server, 30)
    assert await drain(server) == payloads[20:]


async def test_payloads_come_back_again_and_again(server: Server) -> None:
    """Twenty consumers, one after the other, acknowledge one payload and leave."""
    payloads = numbered(40)
    await produce(server, payloads)
    for number in range(20):
        async with consumer(server, 8) as taker:
            assert await taker.payload() == payloads[number]
            await (await taker.websocket.ping())  # a reset would overtake what was said before
            await WAYS[number % len(WAYS)](taker.websocket)
            await queued(server, 39 - number)
    assert await drain(server) == payloads[20:]


async def test_pings_find_a_consumer_that_hangs(command: list[str]) -> None:
    """A stopped client process answers no ping. After the timeout, its payloads go to others."""
    payloads = numbered(5)
    with running(with_options(command, *PING)) as server:
        address = server.url(CONSUMER) + "?prefetch=3"
        with closing(Script(address, "--ack")) as script:
            await produce(server, ["0"])
            await script.prints(1)
            script.process.send_signal(signal.SIGSTOP)
            await produce(server, payloads)
            assert await settled(server) == 2
            async with consumer(server) as taker:
                assert await taker.payloads(2) == payloads[3:]
                assert await taker.payloads(3) == payloads[:3]
        assert tracebacks(server.log) == 0


@contextmanager
def impatient(command: list[str], seconds: float) -> Iterator[Server]:
    """A server that gives consumers up whose socket has been full for so long."""
    [app] = [word for word in command if word.endswith(":app")]
    with running(with_constants(app.removesuffix(":app"), SEND_TIMEOUT=seconds * SLOWNESS)) as server:
        yield server
        assert tracebacks(server.log) == 0


async def test_a_consumer_that_does_not_read_is_disconnected(command: list[str]) -> None:
    """Its socket is full, so no ping reaches it either. What it has goes to others, in order.

    One that has read all it may have, and does not acknowledge it, is not given up.
    """
    payloads = numbered(300, 50_000)
    async with AsyncExitStack() as stack:
        server = stack.enter_context(impatient(command, 1))
        patient = await stack.enter_async_context(consumer(server))
        await produce(server, ['"patient"'])
        assert await receive(patient.websocket) == '"patient"'
        async with consumer(server, 1000, sock=narrow(server), max_queue=1) as stuck:
            await produce(server, payloads)
            back = f"{len(payloads)} queued payloads"
            await until(lambda: server.queued() == len(payloads), back, 5 * SLOWNESS)
            assert await drain(server) == payloads
            stuck.websocket.transport.abort()
        await patient.websocket.send("ack")
        await produce(server, ["1"])
        assert await patient.payload() == "1"


async def test_a_consumer_that_reads_slowly_is_not_disconnected(command: list[str]) -> None:
    """Its socket is full for longer than the timeout, but never for so long at a stretch.

    A stretch ends when a third of what the operating system holds for it, some megabytes, has been read.
    """
    payloads = numbered(300, 50_000)
    with impatient(command, 2) as server:
        async with consumer(server, 1000, sock=narrow(server), max_queue=1) as slow:
            await produce(server, payloads)
            deadline = time.monotonic() + 3 * SLOWNESS
            received = []
            for _ in payloads:
                received.append(await slow.payload())
                if time.monotonic() < deadline:
                    await asyncio.sleep(0.01 * SLOWNESS)  # slow is what it is
            assert received == payloads


# Nothing is lost


async def test_consumers_killed_under_load_lose_nothing(command: list[str]) -> None:
    """Three client processes with 64 payloads each, one killed after the other: each payload is acknowledged.

    Only what a killed one had not acknowledged comes twice: none but the last 64 that it printed.
    """
    rng = random.Random(1)
    echoed: list[str] = []
    flowing = True

    async def send(server: Server) -> None:
        number = 0
        while flowing:
            async with client(server, PRODUCER) as producer:
                with suppress(ConnectionClosed):  # 1013, where all consumers are just being replaced
                    while flowing:
                        batch = [str(number + n) for n in range(100)]
                        number += 100
                        for payload in batch:
                            await producer.send(payload)
                        for payload in batch:
                            assert await receive(producer) == payload
                            echoed.append(payload)

    with running(command) as server:
        async with AsyncExitStack() as stack:

            def start() -> Script:
                script = Script(server.url(CONSUMER) + "?prefetch=64", "--ack")
                stack.callback(script.close)
                return script

            scripts = [start() for _ in range(3)]
            killed: list[Script] = []
            sending = asyncio.create_task(send(server))
            deadline = time.monotonic() + LOAD_SECONDS
            while time.monotonic() < deadline or len(killed) < 6:
                victim = scripts.pop(rng.randrange(3))
                await victim.prints(rng.randrange(1, 300))
                victim.process.kill()
                killed.append(victim)
                scripts.append(start())
            flowing = False
            await sending

            def missing() -> set[str]:
                return set(echoed).difference(*(script.lines for script in [*killed, *scripts]))

            await until(lambda: server.queued() == 0 and not missing(), f"the rest: {missing()}")
            times = Counter(payload for script in [*killed, *scripts] for payload in script.lines)
            unacknowledged = {payload for script in killed for payload in script.lines[-64:]}
        assert tracebacks(server.log) == 0
    assert len(echoed) > 1000
    assert {payload for payload in times if times[payload] > 1} <= unacknowledged


async def test_a_killed_consumer_takes_nothing_with_it(command: list[str]) -> None:
    """It stops reading, 20,000 small payloads are sent, and another consumer gets all of them."""
    with running(command) as server:
        await check_a_killed_consumer_takes_nothing(server)


async def test_the_client_acknowledges_what_it_has_printed(server: Server) -> None:
    """`ws_consumer_client.py --ack` prints three payloads, and they never come again."""
    await produce(server, numbered(5))
    with closing(Script(server.url(CONSUMER), "--ack", "--count", "3")) as script:
        assert await script.ends() == 0
        assert script.lines == numbered(3)
    await queued(server, 2)
    assert await drain(server) == numbered(2, start=3)


async def test_without_ack_the_client_gets_one_payload(server: Server) -> None:
    """When the client ends, the next consumer gets that payload."""
    await produce(server, numbered(5))
    with closing(Script(server.url(CONSUMER))) as script:
        await script.prints(1)
        assert await settled(server) == 4
        assert script.lines == numbered(1)
    await queued(server, 5)
    assert await drain(server) == numbered(5)


# Room


async def fill(server: Server) -> int:
    """Send until the server says that the queue is full. How many payloads it took."""
    async with client(server, PRODUCER) as producer:
        echoed, _ = await flood(producer, numbered(server.capacity + 500))
        assert producer.close_code == 1013
    return echoed


async def test_returned_payloads_may_exceed_the_capacity(server: Server) -> None:
    """Producers then wait until the queue is below its capacity again."""
    old, backlog = numbered(100), numbered(server.capacity, start=100)
    async with consumer(server, 100) as taker:
        await produce(server, old)
        await queued(server, 0)
        await produce(server, backlog)
        await vanish(taker.websocket)
        await queued(server, server.capacity + 100)
    async with client(server, PRODUCER) as producer, consumer(server) as taker:
        assert await taker.payloads(99) == old[:99]
        assert await settled(server) == server.capacity
        await producer.send('"patient"')
        for _ in range(3):  # turns for the server
            assert await asyncio.to_thread(server.queued) == server.capacity
        assert await taker.payload() == old[99]
        assert await receive(producer) == '"patient"'
    await queued(server, server.capacity + 1)
    assert await drain(server) == [*backlog, '"patient"']


async def test_redelivery_does_not_change_the_capacity(server: Server) -> None:
    """After 50 consumers took 20 payloads and left, exactly the capacity fits into the queue."""
    await produce(server, numbered(20))
    for number in range(50):
        async with consumer(server, 20) as taker:
            assert {await receive(taker.websocket) for _ in range(20)} == set(numbered(20))
            await WAYS[number % len(WAYS)](taker.websocket)
        if "dead" in server.stats():
            # The consumers that crashed had not acknowledged the first payload, so it is set aside at last.
            # In Redis, it then goes to the end of the queue.
            await until(lambda: server.queued() + server.stats()["dead"] == 20, "20 payloads")
            server.retry()
        await queued(server, 20)
    assert set(await drain(server)) == set(numbered(20))
    assert await fill(server) == server.capacity
    assert server.queued() == server.capacity
    assert await drain(server) == numbered(server.capacity)


# The end


async def test_ctrl_c_counts_unacknowledged_payloads_as_queued(fresh: Server) -> None:
    """The log counts them, and the consumers are closed with 1012."""
    payloads = numbered(30)
    async with consumer(fresh, 10) as one, consumer(fresh, 5) as other:
        await produce(fresh, payloads)
        await queued(fresh, 15)
        await one.payloads(2)
        await queued(fresh, 13)
        assert await end(fresh, signal.SIGINT, AT_ONCE) == 28
        for taker in (one, other):
            await taker.websocket.wait_closed()
            assert taker.websocket.close_code == 1012
