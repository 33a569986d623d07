"""The caveats of steps/README.md as checks: server.py passes each, and step 0 fails it.

Each raises AssertionError with a message that names the caveat, so that a test can tell that a server failed
for this reason and no other.

They are not beside the tests, because several files use each of them: test_contract.py runs them against
every server, and test_steps.py against the code without the fix. Other checks are in the file that uses them.
"""

import asyncio
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing, suppress
from itertools import chain

import psutil
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.kit.clients import (
    Consumer,
    client,
    consumer,
    consumer_path,
    drain,
    gone,
    noticed,
    numbered,
    port,
    produce,
    receive,
    sockets_of,
    vanish,
)
from tests.kit.commands import CONSUMER, MAX_PREFETCH, PRODUCER
from tests.kit.scripts import Script
from tests.kit.servers import Server, tracebacks
from tests.kit.waiting import SLOWNESS, until
from tests.kit.workers import worker

MIB = 1024 * 1024
# Seconds in which a server ends if it waits for nobody. It takes one at most, of which uvicorn's parent
# process sleeps half a second before it sees a signal; a machine that runs other things too may take longer.
# What shows that the server waited for a client is its log: see check_waited_for_nobody().
AT_ONCE = 5

# What is refused: name -> (frame, close code, what the reason says)
REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    "not JSON": ("{nonsense", 1007, r"line 1 column \d+"),
    "cut short": ('{"a": [1, 2', 1007, r"line 1 column \d+"),
    "empty": ("", 1007, r"line 1 column \d+"),
    "blank": (" \n", 1007, r"line 2 column \d+"),
    "trailing junk": ("1 2", 1007, r"line 1 column \d+"),
    "NaN": ("NaN", 1007, r"line 1 column \d+"),
    "Infinity": ('{"a": Infinity}', 1007, r"line 1 column \d+"),
    "-Infinity": ("[-Infinity]", 1007, r"line 1 column \d+"),
    "too deep": ("[" * 100_000, 1007, r"line 1 column \d+"),
    "binary": (b"1", 1003, "binary"),
    "empty binary": (b"", 1003, "binary"),
    "too large": (f'"{"x" * 2 * MIB}"', 1009, str(MIB)),
    "a byte too large": (f'"{"x" * (MIB - 1)}"', 1009, str(MIB)),
    "too large in UTF-8": (f'"{"é" * (MIB // 2)}"', 1009, str(MIB)),
}


async def check_verbatim(server: Server, payload: str) -> None:
    """Receipt and payload are the text that was sent, not another spelling of the same value."""
    async with client(server, PRODUCER) as producer, consumer(server) as taker:
        await producer.send(payload)
        assert await receive(producer) == payload, "the receipt was rewritten"
        assert await taker.payload() == payload, "the payload was rewritten"


async def leave_politely(websocket: ClientConnection) -> None:
    await websocket.close()
    assert websocket.close_code == 1000, "the close frame got no answer"


async def speak_and_vanish(websocket: ClientConnection) -> None:
    await websocket.send("hello")
    await vanish(websocket)


Leaving = Callable[[ClientConnection], Awaitable[None]]


async def visits(server: Server, count: int, ways: list[Leaving]) -> int:
    """That many consumers connect, and all leave again, each in its way.

    Returns once the server has noticed, or after a second; then with the number of those that it has not.
    """
    async with AsyncExitStack() as stack:
        visitors = (client(server, CONSUMER, close_timeout=1 * SLOWNESS) for _ in range(count))
        websockets = [await stack.enter_async_context(visitor) for visitor in visitors]
        sockets = sockets_of(server, websockets)
        await asyncio.gather(*(ways[i % len(ways)](websocket) for i, websocket in enumerate(websockets)))
        if not server.acks:  # there what a consumer says is ignored
            assert 1008 not in {websocket.close_code for websocket in websockets}
    with suppress(AssertionError):
        await noticed(server, sockets)
    return len(sockets & server.open_sockets())


async def check_departed_consumers_swallow_nothing(server: Server, ways: list[Leaving]) -> None:
    """After 100 consumers came and left, 200 payloads arrive, once, in order."""
    await visits(server, 100, ways)
    payloads = [str(number) for number in range(200)]
    await produce(server, payloads)
    async with consumer(server) as taker:
        received = []
        with suppress(TimeoutError):
            async with asyncio.timeout(1 * SLOWNESS):
                received = await taker.payloads(1)
        assert received == payloads[:1], "swallowed: the first payload"
        assert await taker.payloads(199) == payloads[1:]


async def check_departures_are_noticed(server: Server, ways: list[Leaving]) -> None:
    """A consumer that has left leaves no connection behind."""
    still_there = await visits(server, 10, ways)
    assert still_there == 0, f"{still_there} departed consumers still there"


async def check_a_consumer_that_spoke_gets_its_pong(server: Server) -> None:
    """A consumer's pings are answered after it said something; where it may say only `ack`, after that."""
    async with consumer(server) as talker:
        for _ in range(3):  # the first ping may come with the message, before the server stops reading
            if server.acks:
                await produce(server, ["1"])
                await talker.payload()
            else:
                await talker.websocket.send("hello")
            pong = await talker.websocket.ping()
            try:
                async with asyncio.timeout(1 * SLOWNESS):
                    await pong
            except TimeoutError:
                raise AssertionError("no pong for a consumer that spoke") from None


async def check_forbidden(server: Server, saying: str | bytes | list[str], unacknowledged: int) -> None:
    """It ends the connection with 1008, a reason and a line in the log; what was unacknowledged comes again.

    Others notice nothing, whatever the offender says then.
    """
    payloads = [str(number) for number in range(5)]
    mark = len(server.log)
    async with client(server, CONSUMER + "?prefetch=3") as offender:
        await produce(server, payloads[:unacknowledged])
        for payload in payloads[:unacknowledged]:
            assert await receive(offender) == payload
        with suppress(ConnectionClosed):
            for _ in range(10):
                await offender.send(saying)
        await offender.wait_closed()
        assert offender.close_code == 1008
        assert offender.close_reason
        assert "ack" in offender.close_reason
        await gone(server, {port(offender)})
    log = server.log[mark:]
    assert tracebacks(log) == 0, log
    if not server.yours:
        lines = [line for line in log.splitlines() if not line.startswith("INFO:")]
        assert len(lines) == 1
        assert f"closed with 1008: {offender.close_reason}" in lines[0]
    await produce(server, payloads[unacknowledged:])
    await until(lambda: server.queued() == len(payloads), "what was unacknowledged to come back")
    assert await drain(server) == payloads


async def check_refused(server: Server, name: str) -> None:
    """A frame of REFUSED gets its close code, a reason and one line in the log; nothing else changes."""
    frame, code, reason = REFUSED[name]
    mark = len(server.log)
    async with client(server, PRODUCER) as bystander, client(server, PRODUCER) as offender:
        await offender.send('"before"')
        assert await receive(offender) == '"before"'
        await offender.send(frame)
        with suppress(ConnectionClosed):
            taken = await receive(offender)
            raise AssertionError(f"taken: {taken:.20}")
        log = server.log[mark:]
        assert tracebacks(log) == 0, f"{name}: {log}"
        assert offender.close_code == code
        assert offender.close_reason
        assert len(offender.close_reason.encode()) <= 123  # the most that a close frame holds
        assert re.search(reason, offender.close_reason)
        if not server.yours:
            lines = [line for line in log.splitlines() if not line.startswith("INFO:")]
            assert len(lines) == 1
            assert f"closed with {code}: {offender.close_reason}" in lines[0]
        await bystander.send('"after"')
        assert await receive(bystander) == '"after"'
    assert await drain(server) == ['"before"', '"after"']


async def flood(producer: ClientConnection, payloads: list[str]) -> tuple[int, float]:
    """Send ahead until all are echoed or the server closes.

    Returns how many were echoed, and how many seconds the server was silent before the end.
    """

    async def send() -> None:
        with suppress(ConnectionClosed):
            for payload in payloads:
                await producer.send(payload)

    sending = asyncio.create_task(send())
    echoed, last = 0, time.monotonic()
    try:
        for payload in payloads:
            assert await receive(producer) == payload
            echoed, last = echoed + 1, time.monotonic()
    except ConnectionClosed:
        pass
    finally:
        sending.cancel()
    return echoed, time.monotonic() - last


async def check_memory_is_bounded(server: Server, count: int) -> None:
    """With nobody consuming, a flood of 10 kB payloads fills the queue, not the memory; then comes 1013.

    What was echoed by then is there to drain.
    """
    payloads = [f'"{number:09}{"x" * 10_000}"' for number in range(count)]
    async with client(server, PRODUCER) as producer:
        await producer.send('"warm up"')
        assert await receive(producer) == '"warm up"'
        before = most = server.rss()
        flooding = asyncio.create_task(flood(producer, payloads))
        while not flooding.done():
            most = max(most, server.rss())
            await asyncio.sleep(0.05)
        echoed, silence = await flooding
        grown = max(most, server.rss()) - before
        assert grown < 60 * MIB, f"memory grew by {grown / MIB:.0f} MiB"
        assert producer.close_code == 1013
        assert producer.close_reason
        assert "full" in producer.close_reason
        # A busy machine reads the last receipt late, so the silence may look shorter than a second.
        assert 0.2 < silence < 4, f"closed {silence:.1f} s after the queue was full"
    assert await drain(server) == ['"warm up"', *payloads[:echoed]]


async def check_a_killed_consumer_takes_nothing(server: Server) -> None:
    """20,000 payloads of 85 bytes come to two consumers. One, a process, was stopped, and is then killed."""
    payloads = numbered(20_000, 83)
    received: set[str] = set()

    async def take(taker: Consumer) -> None:
        async for payload in taker.websocket:
            received.add(str(payload))
            if taker.acks:
                await taker.websocket.send("ack")

    url = server.url(consumer_path(server, MAX_PREFETCH))
    with closing(Script(url, *["--ack"] * server.acks)) as victim:
        await produce(server, ['"first"'])
        await victim.prints(1)
        [connection] = psutil.Process(victim.process.pid).net_connections("tcp")
        victim.process.send_signal(signal.SIGSTOP)
        async with consumer(server, MAX_PREFETCH) as taker:
            taking = asyncio.create_task(take(taker))
            await feed(server, payloads)
            victim.process.kill()
            await gone(server, {connection.laddr.port})
            await until(lambda: server.queued() == 0, "the other consumer to take all")
            with suppress(AssertionError):
                await until(lambda: len(received) == len(payloads), "what is on its way", 1 * SLOWNESS)
            await taker.websocket.close()
            await taking
    lost = len(payloads) - len(received)
    assert lost == 0, f"lost: {lost} payloads"


async def feed(server: Server, payloads: list[str]) -> None:
    """Send all payloads, but never more than the queue has space for.

    produce() is refused with 1013 if the consumers take nothing for a second, which happens to a
    process of a machine that is busy. A server without /stats cannot be asked: it gets all at once.
    """
    step = server.capacity // 2 if server.has_stats else len(payloads)
    for start in range(0, len(payloads), step):
        if server.has_stats:
            await until(lambda: server.queued() <= step, "the consumers to take half of the queue")
        await produce(server, payloads[start : start + step])


async def check_fair(server: Server, count: int = 3000, prefetch: int | None = None) -> None:
    """Five consumers share the payloads. None gets three times what another of its worker gets."""
    payloads = [str(number) for number in range(count)]
    shares: list[list[str]] = [[] for _ in range(5)]

    async def take(taker: Consumer, share: list[str]) -> None:
        while True:
            share.append(await taker.payload())

    async with AsyncExitStack() as stack:
        takers = [await stack.enter_async_context(consumer(server, prefetch)) for _ in shares]
        workers = [worker(server, taker.websocket) for taker in takers]
        taking = [asyncio.create_task(take(*pair)) for pair in zip(takers, shares, strict=True)]
        try:
            await feed(server, payloads)
            await until(lambda: sum(map(len, shares)) >= len(payloads), "all payloads to arrive")
        finally:
            for task in taking:
                task.cancel()
            await asyncio.gather(*taking, return_exceptions=True)
    assert sorted(chain(*shares), key=int) == payloads
    for one in set(workers):
        sizes = sorted(len(share) for share, own in zip(shares, workers, strict=True) if own == one)
        assert sizes[-1] < 3 * sizes[0], f"hogged: {sizes}"


async def check_broadcast(server: Server) -> None:
    """Every consumer gets every payload. (No server here passes: consumers compete.)"""
    async with consumer(server) as one, consumer(server) as other:
        waiting = {asyncio.create_task(taker.payload()): taker for taker in (one, other)}
        await produce(server, ["1"])
        (first,), (second,) = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert await first == "1"
        await waiting[first].websocket.close()
        await produce(server, ["2"])
        assert await second == "1", "no broadcast: one of two consumers never saw the first payload"


async def check_foreign_page_is_refused(server: Server, path: str, origin: str) -> None:
    """A page of another origin gets 403 instead of a websocket, and the log says why."""
    refusal = None
    try:
        async with client(server, path, origin=origin):
            pass
    except InvalidStatus as error:
        refusal = error.response
    assert refusal is not None, f"a page from {origin} was let in"
    assert refusal.status_code == 403
    if not server.yours:
        assert f"a page from {origin} may not connect" in server.log
        assert "ERROR" not in server.log


async def end(server: Server, number: signal.Signals, seconds: float) -> int | None:
    """Send the signal. The server must end in time, quietly and wholly.

    Returns how many payloads it had, as its log says. The steps do not say it: then this is 0. A reader's
    server need not say it either: then this is None.
    """
    assert server.has_stats in (True, False)  # ask while it can still answer
    server.interrupt(number)
    took = await asyncio.to_thread(server.ends_within, seconds)
    assert took is not None, f"still running {seconds} s after {number.name}:\n{server.log}"
    # multiprocessing has a helper, the resource tracker, that ends when it sees that all others have.
    await until(lambda: not server.processes(), "the last of its processes to end", SLOWNESS)
    assert tracebacks(server.log) == 0, f"ended with a traceback:\n{server.log}"
    counts = re.findall(r"(\d+) payloads were still queued", server.log)
    if not counts and server.yours:
        return None
    if not server.has_stats and not server.yours:
        return 0
    assert len(counts) == 1, f"it did not log how many payloads were still queued:\n{server.log}"
    return int(counts[0])


def check_waited_for_nobody(server: Server) -> None:
    """No endpoint had to be cancelled, as uvicorn does after --timeout-graceful-shutdown."""
    assert "timeout graceful shutdown exceeded" not in server.log, f"waited:\n{server.log}"


async def check_ends(
    server: Server, number: signal.Signals, seconds: float, parked: int, producers: int = 1
) -> None:
    """It ends while that many consumers wait for a payload, some of which spoke. All are told with 1012."""
    async with AsyncExitStack() as stack:
        websockets = [await stack.enter_async_context(client(server, CONSUMER)) for _ in range(parked)]
        if server.acks:  # there a consumer has nothing to say before it has a payload
            await produce(server, ["1"] * parked)
            for websocket in websockets:
                assert await receive(websocket) == "1"
            for websocket in websockets:
                await websocket.send("ack")
                await (await websocket.ping())
        else:
            for websocket in websockets[2::3]:
                await websocket.send("hello")
        for _ in range(producers):
            websockets.append(await stack.enter_async_context(client(server, PRODUCER)))
        assert await end(server, number, seconds) in (0, None)
        for websocket in websockets:
            await websocket.wait_closed()
            assert websocket.close_code == 1012
    check_waited_for_nobody(server)


def fails(saying: str) -> pytest.RaisesExc[AssertionError]:
    """For `with`: a check fails, for this reason."""
    return pytest.raises(AssertionError, match=saying)
