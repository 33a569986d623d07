"""Each file in steps/ fixes one fault: it passes the checks so far, and fails the next ones.

A check that cannot fail proves nothing, so each one also runs against the step before, and against
step 0. There it must fail for the reason that steps/README.md gives.
"""

import asyncio
import itertools
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import pytest

from steps import step0_naive
from tests.checks import (
    REFUSED,
    Leaving,
    check_a_consumer_that_spoke_gets_its_pong,
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
from tests.diffs import changes
from tests.kit.clients import (
    client,
    drain,
    gone,
    narrow,
    numbered,
    port,
    produce,
    receive,
    receive_all,
    reset,
    until_its_socket_is_full,
    vanish,
)
from tests.kit.commands import CONSUMER, NAIVE, PRODUCER, SERVERS, uvicorn_command, with_options
from tests.kit.root import ROOT
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS

STEPS = sorted((ROOT / "steps").glob("step*.py"))
# Uvicorn's defaults are 20 s and 20 s.
PING = ["--ws-ping-interval", "0.1", "--ws-ping-timeout", str(0.5 * SLOWNESS)]
WAYS: list[Leaving] = [leave_politely, vanish, reset]


class Check(NamedTuple):
    """A check, the first step that passes it, and how the step before fails it."""

    step: int
    passes: Callable[[Server], Awaitable[None]]
    symptom: str
    options: tuple[str, ...] = ()


async def check_all_bad_frames_are_refused(server: Server) -> None:
    for name in REFUSED:
        await check_refused(server, name)


async def check_a_consumer_that_spoke_lives(server: Server, seconds: float) -> None:
    """A server that sends pings does not miss the pongs of a consumer that said something."""
    async with client(server, CONSUMER) as talker:
        await talker.send("hello")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await talker.wait_closed()
        assert talker.close_code is None, f"closed with {talker.close_code}: {talker.close_reason}"


async def check_the_payload_being_sent_goes_back(server: Server) -> None:
    """A consumer stops reading, closes, and reads what it was sent. The next one gets the rest."""
    payloads = numbered(300, 50_000)
    async with client(server, CONSUMER, sock=narrow(server), max_queue=1) as websocket:
        await produce(server, payloads)
        await until_its_socket_is_full(server, websocket)
        async with asyncio.TaskGroup() as group:
            group.create_task(websocket.close())
            first = await receive_all(websocket)
    rest = await drain(server)
    assert 0 < len(first) < len(payloads)
    assert rest
    assert len(first) + len(rest) == len(payloads), f"lost: {len(payloads) - len(first) - len(rest)} payloads"
    assert first + rest == payloads


async def check_ends_despite_a_consumer_that_stopped_reading(server: Server) -> None:
    """uvicorn cancels its endpoint after a second (--timeout-graceful-shutdown 1): no traceback."""
    async with client(server, CONSUMER, sock=narrow(server), max_queue=1) as websocket:
        await produce(server, numbered(300, 50_000))
        await until_its_socket_is_full(server, websocket)
        server.interrupt()
        took = await asyncio.to_thread(server.ends_within, 2.5)
        assert took is not None, f"still running:\n{server.log}"
        assert "CancelledError" not in server.log, f"ended with a traceback:\n{server.log}"
        await vanish(websocket)


async def check_a_producer_leaves_without_a_traceback(server: Server, ways: list[Leaving]) -> None:
    """Producers send a payload, read its receipt or not, and leave. The log has no traceback."""
    mark = len(server.log)
    ports = set()
    for reads_its_receipt, way in itertools.product((True, False), ways):
        async with client(server, PRODUCER) as producer:
            await producer.send("1")
            if reads_its_receipt:
                assert await receive(producer) == "1"
            ports.add(port(producer))
            await way(producer)
    await gone(server, ports)
    # The server is single-threaded: once it has answered, it has logged what came before.
    server.get("/")
    log = server.log[mark:]
    assert tracebacks(log) == 0, f"a traceback after a producer left:\n{log}"


CHECKS = {
    "departed consumers swallow nothing": Check(
        1,
        partial(check_departed_consumers_swallow_nothing, ways=WAYS),
        "swallowed",
    ),
    "departures are noticed": Check(
        1,
        partial(check_departures_are_noticed, ways=[*WAYS, speak_and_vanish]),
        r"\d+ departed consumers still there",
    ),
    "a consumer that spoke gets its pong": Check(1, check_a_consumer_that_spoke_gets_its_pong, "no pong"),
    "a consumer that spoke lives": Check(
        1,
        partial(check_a_consumer_that_spoke_lives, seconds=2 * SLOWNESS),
        "closed with 1011: keepalive ping timeout",
        tuple(PING),
    ),
    "Ctrl+C": Check(
        1,
        partial(check_ends, number=signal.SIGINT, seconds=1, parked=10, producers=0),
        r"still running 1 s after SIGINT(.|\n)*Waiting for background tasks to complete",
        ("--timeout-graceful-shutdown", "60"),
    ),
    "SIGTERM": Check(
        1,
        partial(check_ends, number=signal.SIGTERM, seconds=1, parked=10, producers=0),
        r"still running 1 s after SIGTERM(.|\n)*Waiting for background tasks to complete",
        ("--timeout-graceful-shutdown", "60"),
    ),
    "Ctrl+C, with a consumer that stopped reading": Check(
        1,
        check_ends_despite_a_consumer_that_stopped_reading,
        r"ended with a traceback(.|\n)*asyncio.exceptions.CancelledError",
    ),
    "a producer leaves": Check(
        2,
        partial(check_a_producer_leaves_without_a_traceback, ways=WAYS),
        r"a traceback after a producer left(.|\n)*starlette.websockets.WebSocketDisconnect",
    ),
    "Ctrl+C, with a producer": Check(
        2,
        partial(check_ends, number=signal.SIGINT, seconds=1, parked=10),
        r"ended with a traceback(.|\n)*starlette.websockets.WebSocketDisconnect",
    ),
    "payloads are passed on unchanged": Check(
        2, partial(check_verbatim, payload='{"a" : 1.0e5}'), "the receipt was rewritten"
    ),
    "the payload being sent goes back": Check(3, check_the_payload_being_sent_goes_back, "lost: 1 payloads"),
    "bad input is refused": Check(4, check_all_bad_frames_are_refused, "taken: {nonsense"),
    "a binary frame is refused": Check(4, partial(check_refused, name="binary"), "KeyError: 'text'"),
    "memory is bounded": Check(5, partial(check_memory_is_bounded, count=10_000), "memory grew by"),
    "consumers take turns": Check(6, check_fair, "hogged"),
    "foreign producers are refused": Check(
        7,
        partial(check_foreign_page_is_refused, path=PRODUCER, origin="http://evil.example"),
        "http://evil.example was let in",
    ),
    "foreign consumers are refused": Check(
        7,
        partial(check_foreign_page_is_refused, path=CONSUMER, origin="http://evil.example"),
        "http://evil.example was let in",
    ),
}


def step_with_check(steps: Callable[[Check], range]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("step", "check"),
        [
            pytest.param(STEPS[number], check, id=f"{STEPS[number].stem}: {name}")
            for name, check in CHECKS.items()
            for number in steps(check)
        ],
        indirect=["step"],
    )


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that runs one file of steps/, with the options that the check needs."""
    command = uvicorn_command(f"steps.{request.param.stem}:app")
    check = request.node.callspec.params["check"]
    with running(with_options(command, *check.options)) as server:
        yield server


@step_with_check(lambda check: range(check.step, len(STEPS)))
async def test_a_step_passes_the_checks_so_far(step: Server, check: Check) -> None:
    """Later steps keep what the earlier ones hold."""
    await check.passes(step)


@step_with_check(lambda check: range(check.step - 1, check.step))
async def test_the_step_before_fails_the_check(step: Server, check: Check) -> None:
    """Each step is needed: the step before has the fault, with the symptom that the page shows."""
    with fails(check.symptom):
        await check.passes(step)


def test_every_step_has_a_check() -> None:
    assert {check.step for check in CHECKS.values()} == set(range(1, len(STEPS)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(old, new, id=new.stem)
        for old, new in zip(STEPS, [*STEPS[1:], ROOT / "server.py"], strict=True)
    ],
)
def test_a_step_is_a_small_diff(old: str, new: str) -> None:
    """At most 42 lines change below the docstring, blank lines included."""
    assert 0 < len(changes(old, new)) <= 42


def test_the_last_step_is_server_py_without_its_conveniences() -> None:
    """Each step has the exact text of server.py, so that the last diff only adds to it."""
    removed = [line[1:] for line in changes(STEPS[-1], ROOT / "server.py") if line[0] == "-"]
    assert [line for line in removed if line and not line.startswith(("from ", "import "))] == [
        "app = FastAPI()"
    ]


# Step 0, which has all the faults


@pytest.fixture(scope="module")
def shared_naive() -> Iterator[Server]:
    """For checks of single connections, which care for nothing that another left in the queue."""
    with running(NAIVE) as server:
        yield server


@pytest.mark.parametrize("way", [leave_politely, vanish, reset, speak_and_vanish])
async def test_step_0_hands_payloads_to_departed_consumers(naive: Server, way: Leaving) -> None:
    """An endpoint that waits for the queue alone does not see its consumer leave."""
    with fails("swallowed"):
        await check_departed_consumers_swallow_nothing(naive, [way])


async def test_step_0_keeps_connections_of_consumers_that_spoke(naive: Server) -> None:
    """Nobody receives what the consumer said, so uvicorn stops reading its connection."""
    with fails("10 departed consumers still there"):
        await check_departures_are_noticed(naive, [speak_and_vanish])


@pytest.mark.parametrize("name", REFUSED)
async def test_step_0_refuses_nothing(shared_naive: Server, name: str) -> None:
    """A bad frame is a traceback in the log or is accepted. Its producer gets no reason."""
    symptoms = {
        "taken": [
            "NaN",
            "Infinity",
            "-Infinity",
            "too large",
            "a byte too large",
            "too large in UTF-8",
        ],
        "json.decoder.JSONDecodeError": [
            "not JSON",
            "cut short",
            "empty",
            "blank",
            "trailing junk",
        ],
        "RecursionError": ["too deep"],
        "KeyError: 'text'": ["binary", "empty binary"],
    }
    (symptom,) = (symptom for symptom, names in symptoms.items() if name in names)
    with fails(symptom):
        await check_refused(shared_naive, name)


async def test_step_0_fills_the_memory(naive: Server) -> None:
    """A queue without a bound takes all that comes."""
    with fails("memory grew by"):
        await check_memory_is_bounded(naive, 10_000)


async def test_step_0_lets_one_consumer_take_the_backlog(naive: Server) -> None:
    """`await queue.get()` does not pause while the queue has something."""
    with fails("hogged"):
        await check_fair(naive)


async def test_step_0_does_not_broadcast(naive: Server) -> None:
    """Its docstring says that it does."""
    assert "Broadcast" in (step0_naive.consumer.__doc__ or "")
    with fails("no broadcast"):
        await check_broadcast(naive)


@pytest.mark.parametrize("path", [PRODUCER, CONSUMER])
async def test_step_0_lets_any_page_in(shared_naive: Server, path: str) -> None:
    """The same-origin policy does not apply to websockets."""
    with fails("http://evil.example was let in"):
        await check_foreign_page_is_refused(shared_naive, path, "http://evil.example")


async def test_step_0_ends_with_a_traceback_after_the_graceful_timeout(naive: Server) -> None:
    """--timeout-graceful-shutdown cancels the endpoint, and uvicorn logs that as an error."""
    with fails(r"ended with a traceback(.|\n)*asyncio.exceptions.CancelledError"):
        await check_ends(naive, signal.SIGINT, 5, parked=1)


# server.py, the last step


async def test_a_consumer_that_spoke_outlives_many_pings() -> None:
    """What closes the naive server's consumer after 0.6 s does not disturb that of server.py."""
    with running(with_options(SERVERS["server.py"], *PING)) as server:
        await check_a_consumer_that_spoke_lives(server, 1 * SLOWNESS)


async def test_without_acknowledgements_a_killed_consumer_takes_payloads_with_it() -> None:
    """Payloads that server.py has written to its socket are lost: thousands, if small."""
    with running(SERVERS["server.py"]) as server, fails(r"lost: \d{4,} payloads"):
        await check_a_killed_consumer_takes_nothing(server)


@pytest.mark.parametrize(("sends", "code"), [(0, 1012), (2, 1006)], ids=["reads", "sends first"])
async def test_a_client_that_sends_before_it_reads_sees_1006(sends: int, code: int) -> None:
    """uvicorn closes the socket with its close frame, and does not wait for the client's.

    What the client sends then is answered with a reset, and its next send fails. It gives up the
    connection, and never reads the close frame. If this test fails, uvicorn waits for the client's
    close frame, and "1006 instead of 1012" in steps/README.md is out of date.
    """
    with running(SERVERS["server.py"]) as server:
        async with client(server, PRODUCER) as producer:
            await (await producer.ping())
            server.interrupt()
            # The event loop has no turn while we wait, and send() does not wait.
            assert server.ends_within(5) is not None
            for _ in range(sends):
                await producer.send("1")
            await producer.wait_closed()
            assert producer.close_code == code
