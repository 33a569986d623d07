"""lessons/log_server.py and lessons/log_redis_server.py: nothing is missed after a reconnect.

Each `check_` function is a caveat of lessons/log_server.md. The lesson passes it, and the naive version
fails it. What only the server with Redis promises is in test_log_redis.py.
"""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from lessons import log_server
from tests.checks import fails
from tests.kit.clients import (
    client,
    gone,
    narrow,
    noticed,
    numbered,
    port,
    receive,
    reset,
    sockets_of,
    until_its_socket_is_full,
    vanish,
    write,
)
from tests.kit.commands import uvicorn_command
from tests.kit.constants import with_constants
from tests.kit.log_clients import COMMANDS, consumer, event_source, produce, request, start_job
from tests.kit.ports import free_port
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import TIMEOUT, until

NAIVE = uvicorn_command("lessons.naive.log_server:app")
FAILING_JOB = """
async def write_words(stream, request):
    raise ValueError("as asked")


lesson.write_words = write_words
"""


@pytest.fixture(scope="module", params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    """The name of each lesson in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def shared(name: str) -> Iterator[Server]:
    with running(COMMANDS[name]) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The lesson. It must come through the test without a traceback."""
    yield shared
    assert tracebacks(shared.log) == 0, shared.log


# The caveats


async def check_nothing_is_lost_between_replay_and_live_events(server: Server) -> None:
    """While old events are still on their way to a consumer, new ones come."""
    old = numbered(200, 50_000)
    await produce(server, "late", old)
    async with consumer(server, "late", "0", sock=narrow(server), max_queue=1) as slow:
        await produce(server, "late", ['"new"'])
        got = [offset for offset, _ in await slow.events(len(old))]
        assert got == list(range(1, 201))
        await produce(server, "late", ['"newer"'])
        assert await slow.events(1) == [(201, "new")], "lost"


async def check_a_restart_is_noticed(command: list[str]) -> None:
    """After a restart, offsets begin again. A consumer that resumes gets every event of the new log."""
    number = free_port()
    with running(command, number) as server:
        await produce(server, "a", numbered(5))
        async with consumer(server, "a", "0") as first:
            await first.events(5)
            epoch = first.status.get("epoch", "")
        server.interrupt()
        assert server.ends_within(2) is not None
    with running(command, number) as server:
        await produce(server, "a", numbered(7))
        async with consumer(server, "a", f"{epoch}:5") as second:
            await produce(server, "a", ['"last"'])
            assert (await second.events(1))[0][0] == 1, "lost"
            assert len(await second.events(7)) == 7
            assert not second.status["recovered"]


async def check_a_consumer_that_has_seen_nothing_can_resume(server: Server) -> None:
    async with consumer(server, "empty") as first:
        status = first.status
    await produce(server, "empty", numbered(2))
    assert status, "it cannot know where it was"
    async with consumer(server, "empty", f"{status['epoch']}:{status['next'] - 1}") as second:
        assert second.status["recovered"]
        assert await second.events(2) == [(1, "0"), (2, "1")]


async def check_a_slow_consumer_gets_everything_that_is_kept(server: Server) -> None:
    """300 large events come while a consumer does not read."""
    payloads = numbered(300, 50_000)
    async with consumer(server, "slow", sock=narrow(server), max_queue=1) as slow:
        await produce(server, "slow", payloads)
        for expected in range(1, 302):
            if expected == 50:
                await produce(server, "slow", ['"last"'])
            frame = await slow.frame()
            assert frame.get("offset") == expected, "lost"


async def check_a_job_outlives_its_consumers(server: Server) -> None:
    """A consumer that left in the middle comes back, and gets the rest of the words and the end."""
    words = [f"word{number}" for number in range(20)]
    stream = start_job(server, " ".join(words))
    expected = list(enumerate(["You", "asked:", *words], 1))
    async with consumer(server, stream, "0") as first:
        assert await first.events(3) == expected[:3]
        epoch = first.status.get("epoch", "")
    await asyncio.sleep(1.3)  # the job takes 1.1 s; if this is too short, the rest comes live
    async with consumer(server, stream, f"{epoch}:3") as second:
        got = await second.events(len(expected) - 3)
        assert got == expected[3:], "not where it left off"
        assert await second.frame() == {"end": "done"}
        await second.websocket.wait_closed()
        assert second.websocket.close_code == 1000


CHECKS = [
    check_nothing_is_lost_between_replay_and_live_events,
    check_a_consumer_that_has_seen_nothing_can_resume,
    check_a_slow_consumer_gets_everything_that_is_kept,
    check_a_job_outlives_its_consumers,
]
FAULTS = ["lost", "it cannot know where it was", "lost", "not where it left off"]
Check = Callable[[Server], Awaitable[None]]


@pytest.mark.parametrize("check", CHECKS)
async def test_the_lesson_passes(server: Server, check: Check) -> None:
    await check(server)


@pytest.mark.parametrize(("check", "fault"), list(zip(CHECKS, FAULTS, strict=True)))
async def test_the_naive_version_fails(check: Check, fault: str) -> None:
    with running(NAIVE) as naive, fails(fault):
        await check(naive)


async def test_a_restart_is_noticed() -> None:
    await check_a_restart_is_noticed(COMMANDS["log_server"])


async def test_the_naive_version_does_not_notice_a_restart() -> None:
    with fails("lost"):
        await check_a_restart_is_noticed(NAIVE)


# Resuming


async def test_without_after_there_are_only_new_events(server: Server) -> None:
    await produce(server, "new", numbered(3))
    async with consumer(server, "new") as taker:
        assert (taker.status["first"], taker.status["next"], taker.status["recovered"]) == (1, 4, True)
        await produce(server, "new", ['{ "a" : 1 }'])
        assert await receive(taker.websocket) == '{"offset": 4, "payload": { "a" : 1 }}'


async def test_every_consumer_gets_every_event_once_in_order(server: Server) -> None:
    """Consumers come at any time while a producer sends ahead, and each gets all events."""

    async def follow() -> None:
        async with consumer(server, "busy", "0") as taker:
            assert [offset for offset, _ in await taker.events(900)] == list(range(1, 901))

    async with asyncio.TaskGroup() as group:
        for start in range(0, 900, 100):
            group.create_task(follow())
            await produce(server, "busy", numbered(100, start=start))


async def test_a_fast_producer_makes_no_reading_consumer_miss_events(server: Server) -> None:
    """It sends more events ahead than the server keeps."""
    async with consumer(server, "fast") as taker:
        await produce(server, "fast", numbered(1500))
        assert [offset for offset, _ in await taker.events(1500)] == list(range(1, 1501))


async def test_events_sent_before_closing_are_kept(server: Server) -> None:
    """The producer gets no receipts, because the server reads its close frame with its events."""
    payloads = numbered(100)
    async with client(server, "/ws/hasty/producer") as producer:
        frames = [Frame(Opcode.TEXT, payload.encode()) for payload in payloads]
        frames.append(Frame(Opcode.CLOSE, b""))
        producer.transport.write(b"".join(frame.serialize(mask=True) for frame in frames))
        await producer.wait_closed()
    async with consumer(server, "hasty", "0") as taker:
        assert await taker.events(100) == [(int(json.loads(p)) + 1, json.loads(p)) for p in payloads]


@pytest.mark.parametrize("after", ["", "x", "1:2:x", "0x1", ":"])
async def test_a_bad_offset_is_refused(server: Server, after: str) -> None:
    async with client(server, f"/ws/bad/consumer?after={after}") as websocket:
        await websocket.wait_closed()
        assert websocket.close_code == 1008
        assert websocket.close_reason == "`after` must be EPOCH:OFFSET or 0"


@pytest.mark.parametrize("after", ["other:2", "{epoch}:99", "{epoch}:-5", "2"])
async def test_an_offset_that_is_not_there_starts_with_the_oldest_event(server: Server, after: str) -> None:
    await produce(server, "there", ["1"])
    async with consumer(server, "there", "0") as first:
        epoch = first.status["epoch"]
    async with consumer(server, "there", after.format(epoch=epoch)) as second:
        assert not second.status["recovered"]
        assert (await second.events(1))[0][0] == second.status["first"]


async def test_dropped_events_are_counted(name: str) -> None:
    """A consumer that stops reading is told how many events it missed, in their place."""
    with running(with_constants(f"lessons.{name}", KEEP=10)) as server:
        payloads = numbered(200, 100_000)
        async with consumer(server, "a", sock=narrow(server), max_queue=1) as slow:
            await produce(server, "a", payloads)
            offset, missed = 1, 0
            while offset <= 200:
                frame = await slow.frame()
                if "missed" in frame:
                    missed += frame["missed"]
                    offset += frame["missed"]
                else:
                    assert frame["offset"] == offset
                    offset += 1
            assert 100 < missed <= 190
            epoch = slow.status["epoch"]
        async with consumer(server, "a", "0") as late:
            assert late.status == {"epoch": epoch, "first": 191, "next": 201, "recovered": False}
            assert [offset for offset, _ in await late.events(10)] == list(range(191, 201))
        assert tracebacks(server.log) == 0


async def test_a_consumer_that_does_not_read_delays_nobody_and_costs_no_memory(
    server: Server, name: str
) -> None:
    """While 100 MB pass, the log holds the newest 1,000 events, and nothing for the consumer."""
    # With Redis, each event takes longer, and the log is not in the memory of the server.
    count, size = (1000, 20_000) if name == "log_server" else (100, 200_000)
    async with (
        consumer(server, "flood", sock=narrow(server), max_queue=1) as stuck,
        consumer(server, "flood") as reader,
    ):
        payloads = numbered(count, size)
        await produce(server, "flood", payloads)
        assert len(await reader.events(count)) == count
        before = server.rss()
        for start in range(1, 5):
            await produce(server, "flood", payloads)
            assert (await reader.events(count))[0][0] == start * count + 1
        assert server.rss() - before < 30e6
        await vanish(stuck.websocket)


@pytest.mark.parametrize("leave", [vanish, reset, ClientConnection.close])
async def test_a_departed_consumer_is_noticed(
    server: Server, leave: Callable[[ClientConnection], Awaitable[None]]
) -> None:
    async with consumer(server, "left") as taker:
        sockets = sockets_of(server, [taker.websocket])
        await leave(taker.websocket)
        await noticed(server, sockets)


async def test_a_consumer_that_leaves_at_once_harms_nobody(server: Server) -> None:
    """Its connection is gone before the server has sent anything."""
    for _ in range(50):
        async with client(server, "/ws/short-visit/consumer") as websocket:
            await reset(websocket)
    await gone(server, {port(websocket)})


# Jobs


async def test_a_job_can_be_stopped(server: Server) -> None:
    stream = start_job(server, "word " * 1000)
    async with consumer(server, stream, "0") as taker:
        await taker.events(2)
        assert request(server, "DELETE", f"/jobs/{stream}") == (200, {"stream": stream})
        with suppress(ConnectionClosed):
            while "end" not in (frame := await taker.frame()):
                pass
        assert frame == {"end": "stopped"}
        await taker.websocket.wait_closed()
        assert taker.websocket.close_code == 1000
    assert request(server, "DELETE", f"/jobs/{stream}")[0] == 404
    async with client(server, f"/ws/{stream}/producer") as producer:
        await producer.send("1")
        await producer.wait_closed()
        assert (producer.close_code, producer.close_reason) == (1008, "this stream has ended")


async def test_a_job_that_fails_ends_its_stream(name: str) -> None:
    """Its consumers are told, the log gets a line, and the server goes on."""
    with running(with_constants(f"lessons.{name}", FAILING_JOB)) as server:
        stream = start_job(server, "fail")
        async with consumer(server, stream, "0") as taker:
            assert await taker.frame() == {"end": "failed"}
        assert f"{stream} failed: ValueError('as asked')" in server.log
        assert tracebacks(server.log) == 0


async def test_jobs_end_before_the_storage_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Redis, the consumers of other servers hear of the end."""
    monkeypatch.setattr(log_server, "storage", log_server.Storage())
    monkeypatch.setattr(log_server, "listen_to_signals", lambda: None)
    async with log_server.lifespan(log_server.app):
        stream = await log_server.storage.open("job")
        await log_server.storage.start_job(stream, log_server.run_job(stream, "word " * 1000))
        await until(lambda: len(stream.events) > 0, "the first word")
    assert stream.end == "stopped"


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b"NaN", 400), (b'"' + b"x" * 2**20 + b'"', 413)])
def test_a_bad_job_is_refused(server: Server, body: bytes, status: int) -> None:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request("POST", "/jobs", iter([body[:100_000], body[100_000:]]))
        assert connection.getresponse().status == status


# Server-sent events


async def test_an_event_source_gets_the_same_events_and_resumes(server: Server) -> None:
    """Each event has an id, which a browser sends when it reconnects. Line separators survive."""
    await produce(server, "sse", ['{ "a":\n1 }', '"\u2028"'])
    async with consumer(server, "sse") as taker:
        epoch = taker.status["epoch"]
    async with event_source(server, "/streams/sse?after=0") as source:
        text = (await source.readuntil(b"id: " + epoch.encode() + b":2\n\n")).decode()
    assert f'event: start\ndata: {{"epoch": "{epoch}", "first": 1, "next": 3, "recovered": true}}\n' in text
    assert f"id: {epoch}:0\n\n" in text
    assert f'data: {{ "a":\ndata: 1 }}\nid: {epoch}:1\n\n' in text
    assert f'data: "\u2028"\nid: {epoch}:2\n\n' in text
    async with event_source(server, "/streams/sse?after=0", f"Last-Event-ID: {epoch}:1") as source:
        text = (await source.readuntil(f"id: {epoch}:2\n\n".encode())).decode()
    assert '"recovered": true' in text
    assert f"id: {epoch}:1\n\ndata: " not in text.partition("event: start")[2].partition("\n\n")[2]


async def test_an_event_source_hears_the_end_of_the_stream(server: Server) -> None:
    stream = start_job(server, "two words")
    async with event_source(server, f"/streams/{stream}?after=0") as source:
        text = (await source.readuntil(b'event: end\ndata: "done"\n\n')).decode()
        assert text.count("data: ") == 6
        await source.readuntil(b"\r\n0\r\n\r\n")


async def test_an_event_source_that_leaves_is_noticed(server: Server) -> None:
    before = server.connections()
    async with event_source(server, "/streams/short-visit") as source:
        await source.readuntil(b"event: start")
    await until(lambda: server.connections() <= before, "the connection to end")


async def test_an_event_source_that_leaves_amid_events_causes_no_traceback(server: Server) -> None:
    """FastAPI raises an exception if an event waits to be sent."""
    await produce(server, "visits", numbered(20, 500_000))
    before = server.connections()
    for _ in range(3):
        async with event_source(server, "/streams/visits?after=0") as source:
            await source.readuntil(b"event: start")
        await until(lambda: server.connections() <= before, "the connection to end")
    server.get("/")  # until then, it may not have logged everything


# Garbage collection would close an open generator, but perhaps hours later.
COUNT_USERS = """
import gc

gc.disable()
app.add_api_route("/users", lambda: lesson.storage.streams["visits"].users)
"""


async def test_an_event_source_that_leaves_amid_events_lets_the_stream_expire(name: str) -> None:
    """The server notes at once that nobody uses the stream any more."""
    with running(with_constants(f"lessons.{name}", COUNT_USERS)) as server:
        await produce(server, "visits", numbered(20, 500_000))

        def users() -> int:
            return int(server.get("/users")[2])

        async with event_source(server, "/streams/visits?after=0") as source:
            await source.readexactly(100_000)  # a part of the first event
            await until(lambda: users() == 1, "the producer to leave")
        await until(lambda: users() == 0, "the stream to be unused")


async def test_a_client_that_leaves_amid_its_request_causes_no_traceback(server: Server) -> None:
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        own_port = writer.get_extra_info("sockname")[1]
        writer.write(b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await until(lambda: own_port in server.connections(), "the connection")  # noqa: B023
        server.get("/")  # by now, the server has read the request
        writer.close()
        await until(lambda: own_port not in server.connections(), "its end")  # noqa: B023
    server.get("/")  # until then, it may not have logged everything


# Limits


async def accepts(server: Server, stream: str) -> bool:
    """Whether the server accepts an event for a stream, which may be one too many."""
    async with client(server, f"/ws/{stream}/producer") as producer:
        with suppress(ConnectionClosed):
            await producer.send("1")
            return await receive(producer) == "1"
    return False


async def test_a_stream_too_many_is_refused_until_one_expires(name: str) -> None:
    """A stream with a consumer, an EventSource or a job does not expire."""
    constants = {"MAX_STREAMS": 4, "EXPIRE": 2}
    if name == "log_redis_server":
        constants["HEARTBEAT"] = 1
    with running(with_constants(f"lessons.{name}", **constants)) as server:
        job = start_job(server, "word " * 1000)
        async with consumer(server, "used") as taker, event_source(server, "/streams/heard") as source:
            await source.readuntil(b"event: start")
            await produce(server, "unused", ["1"])
            async with client(server, "/ws/fifth/consumer") as refused:
                await refused.wait_closed()
            assert (refused.close_code, refused.close_reason) == (
                1013,
                "there are too many streams: try again later",
            )
            assert request(server, "GET", "/streams/fifth")[0] == 503
            assert request(server, "POST", "/jobs", "words")[0] == 503

            def streams() -> set[str]:
                found: set[str] = set(request(server, "GET", "/stats")[1]["streams"])
                return found

            assert streams() == {job, "used", "heard", "unused"}
            async with asyncio.timeout(TIMEOUT):
                while not await accepts(server, "fifth"):
                    await asyncio.sleep(0.1)
            assert streams() == {job, "used", "heard", "fifth"}
            await produce(server, "used", ["1"])
            assert await taker.events(1) == [(1, 1)]


async def test_a_stream_expires_when_it_was_not_used_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The while begins when its last user leaves, and again when somebody asks for it."""
    now = 1000.0
    monkeypatch.setattr(log_server, "time", SimpleNamespace(monotonic=lambda: now))
    storage = log_server.Storage()
    stream = await storage.open("a")
    with stream.in_use():
        now += 1000
    for _ in range(3):
        assert await storage.open("a") is stream
        now += 200
    now += 200
    assert await storage.open("a") is not stream


@pytest.mark.parametrize("path", ["/ws/a%20b/consumer", "/ws/a/b/producer", "/ws//consumer"])
async def test_a_bad_name_is_refused_before_the_handshake(server: Server, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with client(server, path):
            pass
    assert refused.value.response.status_code == 404
    assert request(server, "GET", "/streams/a%20b")[0] == 404


@pytest.mark.parametrize(
    ("payload", "code"), [("{", 1007), ("NaN", 1007), (b"1", 1003), (json.dumps("x" * 2**20), 1009)]
)
async def test_bad_input_is_refused(server: Server, payload: str | bytes, code: int) -> None:
    async with client(server, "/ws/input/producer") as producer:
        await producer.send("1")
        assert await receive(producer) == "1"
        await producer.send(payload)
        await producer.wait_closed()
        assert producer.close_code == code
    async with consumer(server, "input", "0") as taker:
        assert (await taker.events(1))[0][1] == 1


async def test_a_foreign_page_is_refused(server: Server) -> None:
    for path in ("/ws/a/producer", "/ws/a/consumer"):
        with pytest.raises(InvalidStatus):
            async with client(server, path, origin="http://evil.example"):
                pass
    for method, path in (("POST", "/jobs"), ("DELETE", "/jobs/job-1"), ("GET", "/streams/a")):
        assert request(server, method, path, "x", Origin="http://evil.example")[0] == 403


# The end


LIMIT = ["--timeout-graceful-shutdown", "1"]


@pytest.mark.parametrize(
    ("options", "number"),
    [(LIMIT, signal.SIGINT), ([], signal.SIGINT), ([], signal.SIGTERM)],
    ids=["limit", "no limit", "SIGTERM"],
)
async def test_ctrl_c_ends_everything(name: str, options: list[str], number: signal.Signals) -> None:
    """Consumers get 1012, and the responses to an EventSource end, even without a time limit."""
    command = [*COMMANDS[name][:4], *options, "--port"]
    with running(command) as server:
        stream = start_job(server, "word " * 1000)
        async with (
            consumer(server, stream, "0") as taker,
            consumer(server, "quiet") as quiet,
            event_source(server, "/streams/quiet") as source,
            event_source(server, f"/streams/{stream}?after=0") as busy,
        ):
            await taker.events(2)
            await source.readuntil(b"event: start")
            await busy.readuntil(b"event: start")
            server.interrupt(number)
            for websocket in (taker.websocket, quiet.websocket):
                await websocket.wait_closed()
                assert websocket.close_code == 1012
            assert (await source.read()).endswith(b"0\r\n\r\n")
            assert b"event: end" not in await busy.read()
            assert server.ends_within(2) is not None
        assert tracebacks(server.log) == 0


async def test_the_server_ends_although_its_clients_do_not_read(name: str) -> None:
    """Uvicorn cancels their endpoints, and the log has no traceback."""
    with running(COMMANDS[name]) as server:
        await produce(server, "long", numbered(20, 500_000))
        async with (
            client(server, "/ws/deaf/producer", sock=narrow(server), max_queue=1) as producer,
            consumer(server, "deaf", sock=narrow(server), max_queue=1) as stuck,
            event_source(server, "/streams/long?after=0") as source,
        ):
            write(producer, numbered(100, 50_000))
            await until_its_socket_is_full(server, stuck.websocket)
            await until_its_socket_is_full(server, producer)
            await source.readuntil(b"event: start")
            server.interrupt()
            assert await asyncio.to_thread(server.ends_within, 3) is not None
            producer.transport.abort()
            stuck.websocket.transport.abort()
        assert "timeout graceful shutdown exceeded" in server.log
        assert tracebacks(server.log) == 0


async def test_events_that_are_dropped_while_their_number_is_sent_count_too() -> None:
    """The consumer is slow, so the log drops ten more before it takes the number of the first five."""
    storage = log_server.Storage()
    stream = await storage.open("fast")
    for payload in numbered(log_server.KEEP + 5):
        await storage.append(stream, payload)
    reading = storage.read(stream, 1)
    assert await anext(reading) == 5
    for payload in numbered(10):
        await storage.append(stream, payload)
    assert await anext(reading) == 10
    event = await anext(reading)
    assert isinstance(event, log_server.Event)
    assert event.offset == 16


@pytest.fixture
async def ended() -> log_server.Stream:
    """A stream that has ended, with more events than a consumer gets in a row."""
    storage = log_server.Storage()
    stream = await storage.open("ended")
    for payload in numbered(100):
        await storage.append(stream, payload)
    stream.end = "done"
    return stream


class Sent(list[str]):
    """What the server sends to a consumer, whose socket is never full."""

    async def send_text(self, frame: str) -> None:
        self.append(frame)

    async def close(self, code: int) -> None:
        self.append(f"close {code}")


async def test_a_server_that_stops_tells_no_consumer_that_it_has_everything(
    ended: log_server.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that has not got all events of a stream that has ended gets 1012, and resumes later."""
    stopping = asyncio.Event()
    stopping.set()
    monkeypatch.setattr(log_server, "stopping", stopping)
    websocket: Any = Sent()
    await log_server.send_events(websocket, ended, 1)
    assert websocket == ["close 1012"]
    assert [event.event async for event in log_server.events((ended, 1, {}))] == ["start"]


async def test_consumers_that_read_old_events_take_turns(ended: log_server.Stream) -> None:
    """Another one need not wait until the first one has all events."""
    first: Any = Sent()
    sending = asyncio.create_task(log_server.send_events(first, ended, 1))
    await asyncio.sleep(0)
    assert len(first) == log_server.BURST
    await sending
    assert len(first) == 100 + 2
