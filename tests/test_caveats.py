"""The naive server fails each caveat's check, for the reason that the README gives.

The same checks hold server.py and the others in test_contract.py and test_ack.py. A check that cannot fail
proves nothing.
"""

import signal
from collections.abc import Iterator

import pytest

from tests.checks import (
    REFUSED,
    Leaving,
    check_a_consumer_that_spoke_gets_its_pong,
    check_a_consumer_that_spoke_lives,
    check_a_killed_consumer_takes_nothing,
    check_broadcast,
    check_departed_consumers_swallow_nothing,
    check_departures_are_noticed,
    check_ends,
    check_fair,
    check_foreign_page_is_refused,
    check_memory_is_bounded,
    check_refused,
    check_verbatim,
    fails,
    leave_politely,
    speak_and_vanish,
)
from tests.harness import (
    CONSUMER,
    NAIVE,
    PRODUCER,
    SERVERS,
    SLOWNESS,
    Server,
    client,
    reset,
    running,
    vanish,
    with_options,
)
from tests.naive import server as naive_server

PING = ["--ws-ping-interval", "0.1", "--ws-ping-timeout", str(0.5 * SLOWNESS)]  # uvicorn's: 20 s, 20 s


@pytest.fixture(scope="module")
def shared_naive() -> Iterator[Server]:
    """For checks of single connections, which care for nothing that another left in the queue."""
    with running(NAIVE) as server:
        yield server


async def test_naive_writes_payloads_anew(naive: Server) -> None:
    """What was parsed and serialised again is the same value in another spelling."""
    with fails("the receipt was written anew"):
        await check_verbatim(naive, '{"a" : 1.0e5}')


@pytest.mark.parametrize("way", [leave_politely, vanish, reset, speak_and_vanish])
async def test_naive_hands_payloads_to_departed_consumers(naive: Server, way: Leaving) -> None:
    """An endpoint that waits for the queue alone does not see its consumer leave, and swallows another."""
    with fails("swallowed"):
        await check_departed_consumers_swallow_nothing(naive, [way])


async def test_naive_keeps_connections_of_consumers_that_spoke(naive: Server) -> None:
    """Nobody receives what the consumer said, so the server stops reading, and sees it leave even less."""
    with fails("10 departed consumers still there"):
        await check_departures_are_noticed(naive, [speak_and_vanish])


async def test_naive_misses_the_pings_of_a_consumer_that_spoke(shared_naive: Server) -> None:
    """Nobody receives what the consumer said, so the server stops reading."""
    with fails("no pong"):
        await check_a_consumer_that_spoke_gets_its_pong(shared_naive)


async def test_naive_drops_a_consumer_that_spoke() -> None:
    """The server doesn't read the pongs that it asked for. With uvicorn's defaults this takes 40 s."""
    dropped = "closed with 1011: keepalive ping timeout"
    with running(with_options(NAIVE, *PING)) as server, fails(dropped):
        await check_a_consumer_that_spoke_lives(server, 5 * SLOWNESS)


async def test_a_consumer_that_spoke_outlives_many_pings() -> None:
    """What drops the naive server's consumer after 0.6 s leaves server.py's alone."""
    with running(with_options(SERVERS["server.py"], *PING)) as server:
        await check_a_consumer_that_spoke_lives(server, 1 * SLOWNESS)


@pytest.mark.parametrize("name", REFUSED)
async def test_naive_does_not_refuse(shared_naive: Server, name: str) -> None:
    """A bad frame is a traceback in the log, or it is taken, and no producer hears what was wrong."""
    symptoms = {
        "taken": ["NaN", "Infinity", "-Infinity", "too large", "a byte too large", "too large in UTF-8"]
    }
    symptoms["json.decoder.JSONDecodeError"] = ["not JSON", "cut short", "empty", "blank", "trailing junk"]
    symptoms["RecursionError"] = ["too deep"]
    symptoms["KeyError: 'text'"] = ["binary", "empty binary"]
    (symptom,) = (symptom for symptom, names in symptoms.items() if name in names)
    with fails(symptom):
        await check_refused(shared_naive, name)


async def test_naive_fills_the_memory(naive: Server) -> None:
    """A queue without a bound takes all that comes."""
    with fails("memory grew by"):
        await check_memory_is_bounded(naive, 10_000)


async def test_naive_lets_one_consumer_hog_the_backlog(naive: Server) -> None:
    """`await queue.get()` on a queue that isn't empty never yields to the other consumers."""
    with fails("hogged"):
        await check_fair(naive)


async def test_naive_is_no_broadcast(naive: Server) -> None:
    """Its docstring says that it is."""
    assert "Broadcast" in (naive_server.consumer.__doc__ or "")
    with fails("no broadcast"):
        await check_broadcast(naive)


async def test_without_acknowledgements_a_killed_consumer_takes_payloads_with_it() -> None:
    """All that was written to its socket: with server.py thousands, where they are small."""
    with running(SERVERS["server.py"]) as server, fails(r"lost: \d{4,} payloads"):
        await check_a_killed_consumer_takes_nothing(server)


@pytest.mark.parametrize("path", [PRODUCER, CONSUMER])
async def test_naive_lets_any_page_in(shared_naive: Server, path: str) -> None:
    """A websocket is not bound by the same-origin policy."""
    with fails("http://evil.example was let in"):
        await check_foreign_page_is_refused(shared_naive, path, "http://evil.example")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_naive_hangs_on_the_way_out(number: signal.Signals) -> None:
    """uvicorn waits for the endpoint, which waits for the queue."""
    hung = rf"still running 1 s after {number.name}(.|\n)*Waiting for background tasks to complete"
    with running(with_options(NAIVE, "--timeout-graceful-shutdown", "60")) as server, fails(hung):
        await check_ends(server, number, 1, parked=1)


async def test_naive_ends_with_a_traceback_after_the_graceful_timeout(naive: Server) -> None:
    """--timeout-graceful-shutdown cancels the endpoint, and uvicorn logs that as an error."""
    with fails(r"ended with a traceback(.|\n)*asyncio.exceptions.CancelledError"):
        await check_ends(naive, signal.SIGINT, 5, parked=1)


@pytest.mark.parametrize(("sends", "code"), [(0, 1012), (2, 1006)], ids=["reads", "sends first"])
async def test_a_client_that_sends_before_it_reads_sees_1006(sends: int, code: int) -> None:
    """uvicorn closes the socket with its close frame, and does not wait for the client's.

    What the client sends then is answered with a reset, and its next send fails. It gives the connection up,
    and never reads the close frame, which has come. If this test fails, uvicorn waits for the client's close
    frame, and the README's caveat is history.
    """
    with running(SERVERS["server.py"]) as server:
        async with client(server, PRODUCER) as producer:
            await (await producer.ping())
            server.interrupt()
            assert server.ends_within(5) is not None  # the event loop has no turn meanwhile
            for _ in range(sends):
                await producer.send("1")  # does not wait, so the event loop has still had no turn
            await producer.wait_closed()
            assert producer.close_code == code
