"""What multiproc_server.py promises beyond the contract: one queue for many workers, any of which may die."""

import asyncio
import itertools
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from tests.harness import (
    PRODUCER,
    SERVERS,
    SLOWNESS,
    Server,
    busy,
    client,
    consumer,
    drain,
    produce,
    receive,
    running,
    until,
    wait_for,
)

COMMAND = SERVERS["multiproc_server.py"]
NAIVE = [sys.executable, "tests/naive/multiproc_server.py"]


def workers(server: Server) -> list[psutil.Process]:
    """The processes that hold uvicorn's workers."""
    return [process for process in server.processes() if "spawn_main" in " ".join(process.cmdline())]


def manager(server: Server) -> psutil.Process:
    """The process that holds the queue: the parent's fork, so it has the parent's command line."""
    parent = psutil.Process(server.process.pid)
    [process] = [child for child in parent.children() if child.cmdline() == parent.cmdline()]
    return process


def serving(server: Server, count: int) -> bool:
    return server.log.count("Application startup complete") >= count


@pytest.fixture
def fresh() -> Iterator[Server]:
    with running(COMMAND) as server:
        wait_for(lambda: serving(server, 2), "both workers")
        yield server


@pytest.fixture
def naive() -> Iterator[Server]:
    with running(NAIVE) as server:
        wait_for(lambda: serving(server, 2), "both workers")
        yield server


async def rate(server: Server, parked: int, count: int) -> float:
    """Payloads a second, `count` of them sent ahead, while `parked` consumers wait."""
    received = 0

    async def take(stack: AsyncExitStack) -> None:
        nonlocal received
        taker = await stack.enter_async_context(consumer(server))

        async def count_payloads() -> None:
            nonlocal received
            with suppress(ConnectionClosed):
                while await taker.payload():
                    received += 1

        tasks.append(asyncio.create_task(count_payloads()))

    tasks: list[asyncio.Task[None]] = []
    async with AsyncExitStack() as stack:
        for _ in range(parked):
            await take(stack)
        start = time.monotonic()
        await produce(server, [str(number) for number in range(count)])
        await until(lambda: received == count, f"{count} payloads, with {parked} parked consumers")
        seconds = time.monotonic() - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return count / seconds


async def test_payloads_go_from_any_worker_to_any(fresh: Server) -> None:
    """With 16 producers over both workers and one consumer, all their payloads arrive."""
    async with AsyncExitStack() as stack:
        producers = [await stack.enter_async_context(client(fresh, PRODUCER)) for _ in range(16)]
        for number, producer in enumerate(producers):
            await producer.send(str(number))
            assert await receive(producer) == str(number)
        held = [
            {conn.raddr.port for conn in worker.net_connections("tcp") if conn.raddr}
            for worker in workers(fresh)
        ]
        assert all(held), "all producers are at one worker: this shows nothing"
    assert await drain(fresh) == [str(number) for number in range(16)]


async def test_parked_consumers_cost_nothing(fresh: Server) -> None:
    """With 200 parked consumers, payloads still flow by the thousand, and idle workers use no CPU."""
    async with AsyncExitStack() as stack:
        for _ in range(200):
            await stack.enter_async_context(consumer(fresh))
        await until(lambda: busy(fresh, 0.5) < 0.05, "the workers to be idle")
        assert max(worker.num_threads() for worker in workers(fresh)) <= 5, "a thread for each consumer?"
    assert await rate(fresh, 100, 5000) > 1000


async def test_naive_parked_consumers_take_all_threads(naive: Server) -> None:
    """The naive version's producers wait behind its parked consumers, each of which holds a thread."""
    async with AsyncExitStack() as stack:
        for _ in range(40):
            await stack.enter_async_context(consumer(naive))
        for _ in range(20):  # until one is at the worker where most consumers are
            producer = await stack.enter_async_context(client(naive, PRODUCER))
            await producer.send("1")
            try:
                async with asyncio.timeout(2):
                    await producer.recv()
            except TimeoutError:
                return
    raise AssertionError("every producer got its receipt")


async def test_naive_hangs_on_ctrl_c(naive: Server) -> None:
    """The naive version waits for the threads of its parked consumers for ever."""
    async with consumer(naive):
        naive.interrupt()
        assert await asyncio.to_thread(naive.ends_within, 2.5) is None


async def test_all_workers_killed_lose_nothing_queued(fresh: Server) -> None:
    """All workers killed with 500 payloads queued: uvicorn replaces them, and the 500 arrive in order."""
    payloads = [str(number) for number in range(500)]
    await produce(fresh, payloads)
    for worker in workers(fresh):
        worker.kill()
    await until(lambda: serving(fresh, 4), "new workers")
    assert await drain(fresh) == payloads


async def test_a_worker_killed_under_load_loses_what_it_was_handing_over(fresh: Server) -> None:
    """A worker killed in full flow: at most a batch and one a consumer are missing, and none comes twice."""
    received: list[int] = []
    echoed: set[int] = set()
    numbers = itertools.count()

    async def take() -> None:
        with suppress(ConnectionClosed):
            async with consumer(fresh) as taker:
                while True:
                    received.append(int(await taker.payload()))

    async def send() -> None:
        with suppress(ConnectionClosed):
            async with client(fresh, PRODUCER) as producer:
                while len(echoed) < 20_000:
                    batch = [str(next(numbers)) for _ in range(50)]
                    for payload in batch:
                        await producer.send(payload)
                    for payload in batch:
                        assert await receive(producer) == payload
                        echoed.add(int(payload))

    tasks = [asyncio.create_task(task()) for task in [take] * 4 + [send] * 4]
    await until(lambda: len(echoed) > 2000, "the flow")
    workers(fresh)[0].kill()
    await until(lambda: serving(fresh, 3), "a new worker")
    tasks += [asyncio.create_task(task()) for task in [take] * 2 + [send] * 2]
    await until(lambda: len(echoed) >= 20_000 and fresh.queued() == 0, "the rest", 20 * SLOWNESS)
    await until(lambda: len(set(received)) > len(echoed) - 260, "what is on its way")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(received) == len(set(received)), "a payload came twice"
    assert len(echoed - set(received)) <= 256 + 6, "more was lost than a worker hands over"


async def test_the_parent_killed_ends_all(fresh: Server) -> None:
    """When the parent is killed, its workers and the manager notice, and are gone within 5 s."""
    async with consumer(fresh):
        fresh.process.kill()
        fresh.process.wait()
        await until(lambda: not fresh.processes(), "the orphans to end", 5 * SLOWNESS)


@pytest.mark.parametrize("parked", [0, 3])
async def test_the_manager_killed_ends_all(fresh: Server, parked: int) -> None:
    """When the manager is killed, the workers say so in a line each, all end, and the exit code tells."""
    async with AsyncExitStack() as stack:
        for _ in range(parked):
            await stack.enter_async_context(consumer(fresh))
        manager(fresh).kill()
        assert await asyncio.to_thread(fresh.ends_within, 5) is not None
        assert fresh.process.returncode == 1
    await until(lambda: not fresh.processes(), "all to end")
    assert "the process that held the queue died" in fresh.log
    assert fresh.log.count("worker stops: ") <= 2
    assert "Traceback" not in fresh.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_workers_start(number: signal.Signals) -> None:
    """A signal to the whole group while the workers import ends all without a traceback."""
    with running(COMMAND) as server:
        for process in server.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        assert server.ends_within(15) is not None  # uvicorn may be waiting 5 s for a sign of life
        wait_for(lambda: not server.processes(), "all to end")
        assert "Traceback" not in server.log


def test_uvicorn_alone_says_what_to_run() -> None:
    """`uvicorn multiproc_server:app --workers 4` ends by itself, and says what to run in one line."""
    server = Server([sys.executable, "-m", "uvicorn", "multiproc_server:app", "--workers", "4", "--port"])
    try:
        # Most of it uvicorn waits, 5 s, for a sign of life; on a busy machine the workers import as long.
        assert server.ends_within(30) is not None
        wait_for(lambda: not server.processes(), "all to end")
        assert len(re.findall("run python multiproc_server.py", server.log)) == 1
        assert "Traceback" not in server.log
    finally:
        server.kill()


async def test_the_queue_is_closed_to_others(fresh: Server) -> None:
    """The manager listens on a socket in a folder that only its user can enter, and on no port."""
    listening = [conn for conn in manager(fresh).net_connections("unix") if conn.laddr]
    folders = {Path(str(conn.laddr)).parent for conn in listening if "listener" in str(conn.laddr)}
    assert folders, "the socket is not found: this shows nothing"
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert not manager(fresh).net_connections("tcp")
