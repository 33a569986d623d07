"""What lessons/log_redis_server.py promises beyond log_server.py: one log for many servers; any may die."""

import asyncio
import difflib
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import pytest
import redis
from websockets.exceptions import ConnectionClosed

from lessons import log_redis_server
from tests.diffs import without_docstring
from tests.kit.clients import client, numbered
from tests.kit.commands import with_options
from tests.kit.constants import with_constants
from tests.kit.log_clients import (
    COMMANDS,
    Consumer,
    consumer,
    event_source,
    produce,
    request,
    start_job,
)
from tests.kit.ports import free_port
from tests.kit.redis import REDIS_TIMEOUT, UVLOOP_FAILS, Redis, lose, restore
from tests.kit.root import ROOT
from tests.kit.servers import Server, running
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for
from tests.kit.workers import serving, worker, workers

NAME = "log_redis_server"
COMMAND = COMMANDS[NAME]
# A job says when it ends.
JOB_WITH_AN_END = """
write_words = lesson.write_words


async def write_words_and_say_so(stream, request):
    try:
        await write_words(stream, request)
    finally:
        print("the job no longer runs", flush=True)


lesson.write_words = write_words_and_say_so
"""
# So that the tests need not wait as long as the lesson does.
IMPATIENT = with_constants(
    f"lessons.{NAME}", JOB_WITH_AN_END, HEARTBEAT=1, JOB_TIMEOUT=3, REDIS_TIMEOUT=REDIS_TIMEOUT
)
OVER_AND_OVER = "word " * 10_000


@pytest.fixture(scope="module")
def broker() -> Iterator[Redis]:
    """A Redis that tests may kill, and must start again."""
    with closing(Redis()) as broker:
        yield broker


@pytest.fixture(scope="module")
def env(broker: Redis) -> dict[str, str]:
    """With it, servers use the same log."""
    return {"REDIS_URL": broker.url()}


@pytest.fixture(scope="module")
def shared_pair(env: dict[str, str]) -> Iterator[list[Server]]:
    with running(IMPATIENT, env=env) as one, running(IMPATIENT, env=env) as other:
        yield [one, other]


@pytest.fixture
def pair(shared_pair: list[Server]) -> Iterator[list[Server]]:
    """Two servers with one Redis, as on two machines."""
    yield shared_pair
    for server in shared_pair:
        check_quiet(server)


def check_quiet(server: Server) -> None:
    for complaint in ("Traceback", "never retrieved", "destroyed", "never awaited"):
        assert complaint not in server.log, server.log


@pytest.fixture
async def storage(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[log_redis_server.Storage]:
    """The storage of a lesson that runs in this process."""
    monkeypatch.setattr(log_redis_server, "REDIS_URL", env["REDIS_URL"])
    storage = log_redis_server.Storage()
    monkeypatch.setattr(log_redis_server, "storage", storage)
    yield storage
    await storage.redis.aclose()


async def ending(taker: Consumer) -> dict[str, Any]:
    """Skip events up to the end of the stream, and return that frame."""
    while "end" not in (frame := await taker.frame()):
        pass
    await taker.websocket.wait_closed()
    assert taker.websocket.close_code == 1000
    return frame


# Many servers


async def test_all_consumers_get_all_events_in_the_same_order(pair: list[Server]) -> None:
    """Producers and consumers are at both servers. No offset is given twice, and none is left out."""

    async def follow(server: Server) -> list[tuple[int, object]]:
        async with consumer(server, "shared", "0") as taker:
            return await taker.events(400)

    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(follow(server)) for server in pair * 2]
        for start, server in enumerate(pair * 2):
            group.create_task(produce(server, "shared", numbered(100, start=start * 100)))
    first, *others = [follower.result() for follower in followers]
    assert [offset for offset, _ in first] == list(range(1, 401))
    assert {payload for _, payload in first} == {str(number) for number in range(400)}
    assert all(other == first for other in others)


async def test_a_consumer_resumes_at_another_server(pair: list[Server]) -> None:
    one, other = pair
    await produce(one, "moving", numbered(3))
    async with consumer(one, "moving", "0") as taker:
        await taker.events(2)
        epoch = taker.status["epoch"]
    async with consumer(other, "moving", f"{epoch}:2") as taker:
        assert taker.status == {"epoch": epoch, "first": 1, "next": 4, "recovered": True}
        assert await taker.events(1) == [(3, "2")]


async def test_a_new_event_reaches_another_server_at_once(pair: list[Server], env: dict[str, str]) -> None:
    """It does not wait for the next heartbeat, and many events in between do no harm."""
    one, _ = pair
    with running(with_constants(f"lessons.{NAME}", HEARTBEAT=3600), env=env) as other:
        async with consumer(other, "quiet") as taker:
            await produce(one, "quiet", ["1"])
            assert await taker.events(1) == [(1, 1)]
        await produce(one, "quiet", numbered(1500))
        async with consumer(other, "quiet") as taker:
            assert (taker.status["first"], taker.status["next"]) == (502, 1502)
            await produce(one, "quiet", ['"new"'])
            assert await taker.events(1) == [(1502, "new")]
        check_quiet(other)


async def test_a_job_can_be_stopped_at_another_server(pair: list[Server]) -> None:
    """Its consumers get the end, and the job ends where it runs."""
    one, other = pair
    mark = len(one.log)
    stream = start_job(one, OVER_AND_OVER)
    async with consumer(other, stream, "0") as taker:
        await taker.events(2)
        assert "the job no longer runs" not in one.log[mark:]
        assert request(other, "DELETE", f"/jobs/{stream}") == (200, {"stream": stream})
        assert await ending(taker) == {"end": "stopped"}
    await until(lambda: "the job no longer runs" in one.log[mark:], "the job to end")
    assert request(one, "DELETE", f"/jobs/{stream}")[0] == 404


async def test_an_event_source_resumes_at_another_server(pair: list[Server]) -> None:
    one, other = pair
    await produce(one, "sse", numbered(2))
    async with consumer(one, "sse") as taker:
        epoch = taker.status["epoch"]
    async with event_source(other, "/streams/sse", f"Last-Event-ID: {epoch}:1") as source:
        text = (await source.readuntil(f"id: {epoch}:2\n\n".encode())).decode()
    assert '"recovered": true' in text
    assert text.count('data: "') == 1


async def test_producers_get_their_turn_at_redis(storage: log_redis_server.Storage) -> None:
    """Without turns, a few fast producers would get all connections, and the others 1013."""
    stream = await storage.open("fast")
    counts = [0] * 20

    async def produce_fast(number: int) -> None:
        while max(counts) < 50:
            await storage.append(stream, "1")
            counts[number] += 1

    await asyncio.gather(*map(produce_fast, range(20)))
    assert min(counts) > 25


# A server or a worker dies


@asynccontextmanager
async def at_another_worker(server: Server, taker: Consumer, after: str) -> AsyncIterator[Consumer]:
    """A second consumer of the stream `a`, at another worker than the first."""
    first = worker(server, taker.websocket)
    async with asyncio.timeout(TIMEOUT):
        while True:
            async with consumer(server, "a", after) as other:
                if worker(server, other.websocket) != first:
                    yield other
                    return


async def test_a_killed_worker_and_a_restart_lose_nothing(broker: Redis) -> None:
    """Events, epoch and offsets stay. A consumer at the other worker notices nothing."""
    env = {"REDIS_URL": broker.url()}
    with running(with_options(COMMAND, "--workers", "2"), env=env) as server:
        wait_for(lambda: server.log.count("Application startup complete") == 2, "both workers")
        await produce(server, "a", numbered(5))
        async with consumer(server, "a", "0") as doomed:
            await doomed.events(3)
            epoch = doomed.status["epoch"]
            async with at_another_worker(server, doomed, f"{epoch}:3") as other:
                worker(server, doomed.websocket).kill()
                await doomed.websocket.wait_closed()
                await produce(server, "a", ['"after"'])
                assert await other.events(3) == [(4, "3"), (5, "4"), (6, "after")]
        # Ctrl+C in a worker that is still importing would print a traceback.
        await until(lambda: server.log.count("Application startup complete") == 3, "the new worker")
        server.interrupt()
        assert server.ends_within(5) is not None
        check_quiet(server)
    with running(COMMAND, env=env) as server:
        async with consumer(server, "a", f"{epoch}:3") as taker:
            assert taker.status == {"epoch": epoch, "first": 1, "next": 7, "recovered": True}
            assert await taker.events(3) == [(4, "3"), (5, "4"), (6, "after")]


async def test_a_killed_worker_is_replaced_while_redis_is_gone(broker: Redis) -> None:
    """The server does not end. The new workers serve when Redis is back."""
    with running(with_options(COMMAND, "--workers", "2"), env={"REDIS_URL": broker.url()}) as server:
        wait_for(lambda: serving(server) == 2, "both workers")
        await produce(server, "a", ["1"])
        broker.kill()
        try:
            for process in workers(server):
                process.kill()
            await until(lambda: serving(server) == 4, "two new workers")
        finally:
            broker.start()
        await until(lambda: server.log.count("Redis is back") == 2, "both to find Redis")
        await produce(server, "a", ["2"])
        async with consumer(server, "a", "0") as taker:
            assert await taker.events(2) == [(1, 1), (2, 2)]
        check_quiet(server)


async def test_a_job_fails_if_its_server_is_killed(pair: list[Server], env: dict[str, str]) -> None:
    """Another server notices that nobody renews the job any more, and writes the end of its stream."""
    with running(IMPATIENT, env=env) as doomed:
        stream = start_job(doomed, OVER_AND_OVER)
        async with consumer(pair[0], stream, "0") as taker:
            await taker.events(2)
            doomed.kill()
            assert await ending(taker) == {"end": "failed"}


async def test_a_job_is_stopped_if_its_server_is_stopped(pair: list[Server], env: dict[str, str]) -> None:
    with running(IMPATIENT, env=env) as server:
        stream = start_job(server, OVER_AND_OVER)
        async with consumer(pair[0], stream, "0") as taker:
            await taker.events(2)
            server.interrupt()
            assert await ending(taker) == {"end": "stopped"}
            assert server.ends_within(2) is not None
            check_quiet(server)


# Redis goes away


async def closed(server: Server, path: str) -> tuple[int | None, str | None]:
    """Connect, and wait until the server closes the connection."""
    async with client(server, path) as websocket:
        await websocket.wait_closed()
        return websocket.close_code, websocket.close_reason


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_consumers_go_on_when_redis_is_back(pair: list[Server], broker: Redis, how: str) -> None:
    """Producers and new consumers get 1013. Consumers wait, and then go on. The log says it once.

    A job that could not write has failed.
    """
    one, other = pair
    marks = [len(server.log) for server in pair]

    def logs() -> list[str]:
        return [server.log[mark:] for server, mark in zip(pair, marks, strict=True)]

    job = start_job(one, OVER_AND_OVER)
    await produce(one, how, ["1"])
    async with consumer(other, how, "0") as taker:
        assert await taker.events(1) == [(1, 1)]
        lose(broker, how)
        try:
            answers = [
                asyncio.to_thread(request, one, "POST", "/jobs", "words"),
                asyncio.to_thread(request, one, "GET", f"/streams/{how}"),
                closed(one, f"/ws/{how}/producer"),
                closed(other, f"/ws/{how}/consumer"),
            ]
            assert [answer[0] for answer in await asyncio.gather(*answers)] == [503, 503, 1013, 1013]
            await until(lambda: f"{job} failed" in logs()[0], "the job to fail")
        finally:
            restore(broker, how)
        await until(lambda: all("Redis is back" in log for log in logs()), "both to find Redis")
        await produce(one, how, ["2"])
        assert await taker.events(1) == [(2, 2)]
    assert [log.count("Redis is gone") for log in logs()] == [1, 1]
    async with consumer(other, job, "0") as taker:
        assert await ending(taker) == {"end": "failed"}


PATIENT_JOB = """
import asyncio

may_write = asyncio.Event()


async def write_words(stream, request):
    await may_write.wait()
    await lesson.storage.append(stream, "1")


lesson.write_words = write_words
app.add_api_route("/write", may_write.set)
"""


async def test_living_jobs_go_on_after_a_long_outage(broker: Redis, env: dict[str, str]) -> None:
    """Redis is gone for longer than JOB_TIMEOUT. Then no server takes the jobs of the other for dead."""
    heartbeat = math.ceil(SLOWNESS)
    timeout = 3 * heartbeat
    command = with_constants(f"lessons.{NAME}", PATIENT_JOB, HEARTBEAT=heartbeat, JOB_TIMEOUT=timeout)
    with running(command, env=env) as one, running(command, env=env) as other:
        pair = one, other
        jobs = [start_job(server, "words") for server in pair]
        broker.kill()
        await asyncio.sleep(1.5 * timeout)
        broker.start()
        await until(lambda: all("Redis is back" in server.log for server in pair), "both to find Redis")
        await asyncio.sleep(timeout)  # long enough for each to look for dead jobs
        for server, job in zip(pair, jobs, strict=True):
            await asyncio.to_thread(server.get, "/write")
            async with consumer(server, job, "0") as taker:
                assert await taker.events(1) == [(1, 1)]
                assert await ending(taker) == {"end": "done"}


async def test_an_error_of_uvloop_counts_as_an_outage(broker: Redis) -> None:
    """A producer gets 1013, and the consumer goes on when Redis is back."""
    command = with_constants(f"lessons.{NAME}", UVLOOP_FAILS)
    with running(command, env={"REDIS_URL": broker.url()}) as server:
        async with consumer(server, "uvloop") as taker:
            await produce(server, "uvloop", ["1"])
            assert await taker.events(1) == [(1, 1)]
            broker.kill()
            for _ in range(2):  # the second time, there is certainly no connection any more
                async with client(server, "/ws/uvloop/producer") as producer:
                    with suppress(ConnectionClosed):
                        await producer.send("2")
                    await producer.wait_closed()
                    assert producer.close_code == 1013
            broker.start()
            await until(lambda: "Redis is back" in server.log[-200:], "the server to find Redis")
            await produce(server, "uvloop", ["3"])
            assert await taker.events(1) == [(2, 3)]
        check_quiet(server)


async def test_consumers_hear_that_redis_has_lost_the_log(pair: list[Server], broker: Redis) -> None:
    """They are closed with 1012. When they resume, they get the new log from its first event."""
    one, other = pair
    await produce(one, "lost", numbered(5))
    async with consumer(other, "lost", "0") as taker:
        await taker.events(5)
        epoch = taker.status["epoch"]
        async with event_source(other, f"/streams/lost?after={epoch}:5") as source:
            await source.readuntil(b"event: start")
            lose(broker, "emptied")
            restore(broker, "emptied")
            await taker.websocket.wait_closed()
            assert taker.websocket.close_code == 1012
            assert (await source.read()).endswith(b"0\r\n\r\n")
    await produce(one, "lost", ['"new"'])
    async with consumer(other, "lost", f"{epoch}:5") as taker:
        assert not taker.status["recovered"]
        assert taker.status["epoch"] > epoch
        assert await taker.events(1) == [(1, "new")]


@pytest.mark.parametrize("lost", ["the newest events", "a newer stream"])
async def test_consumers_hear_that_redis_has_lost_the_newest_events(
    pair: list[Server], broker: Redis, env: dict[str, str], lost: str
) -> None:
    """Redis is back with an older snapshot. They are closed with 1012, and resume from what there is."""
    one, _ = pair
    name = lost.replace(" ", "-")
    with closing(redis.Redis.from_url(env["REDIS_URL"])) as connection:
        admin: Any = connection
        stream, streams = f"{log_redis_server.STREAM}{name}", log_redis_server.STREAMS
        await produce(one, name, numbered(5))
        snapshot, state = admin.dump(stream), admin.hget(streams, stream)
        if lost == "a newer stream":
            admin.delete(stream)
        await produce(one, name, numbered(3))
        async with consumer(one, name) as taker:
            pipe = admin.pipeline(transaction=True)
            pipe.restore(stream, 0, snapshot, replace=True).hset(streams, stream, state)
            pipe.execute()
            await taker.websocket.wait_closed()
            assert taker.websocket.close_code == 1012
            after = f"{taker.status['epoch']}:{taker.status['next'] - 1}"
    async with consumer(one, name, after) as taker:
        assert (taker.status["first"], taker.status["next"]) == (1, 6)
        assert not taker.status["recovered"]
        assert await taker.events(5) == [(number, str(number - 1)) for number in range(1, 6)]


async def test_a_lost_stream_does_not_keep_others_from_being_renewed(broker: Redis) -> None:
    """Redis loses a stream with a consumer and one with a job, and there are too many to make them again."""
    url = broker.url()
    command = with_constants(f"lessons.{NAME}", HEARTBEAT=1, MAX_STREAMS=2)
    stream, streams = log_redis_server.STREAM, log_redis_server.STREAMS
    with closing(redis.Redis.from_url(url)) as connection, running(command, env={"REDIS_URL": url}) as server:
        admin: Any = connection
        async with consumer(server, "lost") as taker, consumer(server, "kept"):
            pipe = admin.pipeline(transaction=True)
            pipe.delete(stream + "lost").hdel(streams, stream + "lost")
            pipe.xadd(stream + "new", {"payload": 1}).hset(streams, stream + "new", "{}")
            pipe.zadd(log_redis_server.JOBS, {"lost-job": 0})
            pipe.persist(stream + "kept")
            pipe.execute()
            await taker.websocket.wait_closed()
            assert taker.websocket.close_code == 1012
            await until(lambda: admin.ttl(stream + "kept") > 0, "the other stream to be renewed")
            await until(lambda: admin.zcard(log_redis_server.JOBS) == 0, "the job to be forgotten")
        check_quiet(server)


class Sent(list[str]):
    """What the server sends to a consumer. Redis is emptied when the consumer gets the first event."""

    async def send_text(self, frame: str) -> None:
        if not self:
            await log_redis_server.storage.redis.flushdb()
        self.append(frame)

    async def close(self, code: int) -> None:
        self.append(f"close {code}")


async def test_a_consumer_does_not_get_the_end_without_all_events(storage: log_redis_server.Storage) -> None:
    """Redis has lost the stream, so the consumer is closed with 1012, although the stream had ended."""
    stream = await storage.open("ended")
    for payload in numbered(log_redis_server.BURST + 1):
        await storage.append(stream, payload)
    await storage.end_job("ended", "done")
    websocket: Any = Sent()
    await log_redis_server.send_events(websocket, stream, 1)
    assert len(websocket) == log_redis_server.BURST + 1
    assert websocket[-1] == "close 1012"


def test_a_server_without_redis_ends_with_one_line() -> None:
    """The line has no password, and the exit code is 3."""
    command = with_options(COMMAND, "--workers", "1")
    server = Server(command, env={"REDIS_URL": f"redis://:secret@127.0.0.1:{free_port()}"})
    try:
        assert server.ends_within(10) is not None
        assert server.process.poll() == 3
        [line] = [line for line in server.log.splitlines() if "ERROR" in line]
        assert "no Redis at redis://127.0.0.1:" in line
        assert "secret" not in server.log
        check_quiet(server)
    finally:
        server.kill()


async def test_ctrl_c_ends_the_server_while_redis_is_gone() -> None:
    """Its consumers and its job end with it."""
    with closing(Redis()) as broker, running(COMMAND, env={"REDIS_URL": broker.url()}) as server:
        stream = start_job(server, OVER_AND_OVER)
        async with consumer(server, stream, "0") as taker:
            await taker.events(2)
            broker.stop()
            server.interrupt()
            assert server.ends_within(3) is not None
            check_quiet(server)


def test_a_bad_redis_url_is_one_clear_line() -> None:
    command = [sys.executable, f"lessons/{NAME}.py", "--port", "0"]
    env = {**os.environ, "REDIS_URL": "localhost:6379"}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 3
    [line] = ended.stderr.splitlines()
    assert line.startswith("REDIS_URL is not the address of a Redis: ")


async def test_the_log_works_on_redis_cluster() -> None:
    """A script may use several keys only if they have the same hash slot."""
    broker = Redis("--cluster-enabled", "yes", "--databases", "1")
    admin: Any = redis.Redis(port=broker.port, decode_responses=True)
    with closing(broker), closing(admin):
        admin.cluster("ADDSLOTS", *range(16384))
        await until(lambda: admin.cluster("INFO")["cluster_state"] == "ok", "the cluster")
        with running(COMMAND, env={"REDIS_URL": broker.url(0)}) as server:
            await produce(server, "a", numbered(3))
            await produce(server, "b", numbered(1))
            async with consumer(server, "a", "0") as taker:
                assert len(await taker.events(3)) == 3
            stream = start_job(server, "two words")
            async with consumer(server, stream, "0") as taker:
                assert await ending(taker) == {"end": "done"}
            assert request(server, "GET", "/stats")[1]["streams"] == {"a": 3, "b": 1, stream: 4}


# The files


def test_the_server_with_redis_differs_in_one_class() -> None:
    """Outside the class Storage, only the configuration and the imports are different."""

    def without_storage(path: str) -> list[str]:
        source = without_docstring((ROOT / "lessons" / path).read_text())
        start, end = source.index("class Storage:"), source.index("def stop() -> None:")
        return (source[:start] + source[end:]).splitlines()

    memory, with_redis = without_storage("log_server.py"), without_storage(f"{NAME}.py")
    changed = [line for line in difflib.ndiff(memory, with_redis) if line[0] in "+-"]
    assert [line[2:].split(" import ")[0] for line in changed if line[0] == "-"] == [
        "from collections",
        "from collections.abc",
    ]
    last = changed[-1]
    assert last == '+ """', "only configuration, up to the end of the script"
