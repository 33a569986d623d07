"""What multiproc_server.py promises beyond the contract: one queue for many workers, any of which may die."""

import asyncio
import itertools
import os
import pty
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.kit.clients import client, consumer, drain, narrow, numbered, produce, receive, settled, write
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS
from tests.kit.ports import free_port
from tests.kit.root import ROOT
from tests.kit.servers import Server, busy, running, tracebacks
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for

COMMAND = SERVERS["multiproc_server.py"]
NAIVE = [sys.executable, "lessons/naive/multiproc_server.py"]
# Do as a shell does: own the terminal on standard input, run a command in it, and die when it closes.
SHELL = "import fcntl, subprocess, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); " + (
    "subprocess.run(sys.argv[1:])"
)


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def workers(server: Server) -> list[psutil.Process]:
    """Return the workers: the children that share the parent's listening TCP socket."""
    return [
        child
        for child in children(server)
        if any(conn.status == psutil.CONN_LISTEN for conn in child.net_connections("tcp"))
    ]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def unix_sockets(process: psutil.Process) -> list[Path]:
    """Return the paths of the Unix sockets that the process has bound."""
    return [Path(str(conn.laddr)) for conn in process.net_connections("unix") if conn.laddr]


def manager(server: Server) -> psutil.Process:
    """Return the process that holds the queue: the child that has a Unix socket, and no TCP socket."""
    [process] = [child for child in children(server) if unix_sockets(child) and child not in workers(server)]
    return process


def serving(server: Server, count: int) -> bool:
    return server.log.count("Application startup complete") >= count


def press_ctrl_c(server: Server) -> None:
    """Send SIGINT to every process of the group, as a terminal does."""
    os.killpg(server.process.pid, signal.SIGINT)


def stop_service(server: Server) -> None:
    """Send SIGTERM to every process of the group, as systemd does."""
    os.killpg(server.process.pid, signal.SIGTERM)


def close_terminal(server: Server) -> None:
    """Send SIGHUP to every process of the group, as a terminal does that is closed."""
    os.killpg(server.process.pid, signal.SIGHUP)


def restart_workers(server: Server) -> None:
    """Ask uvicorn for a rolling restart: send SIGHUP to the parent alone, as `kill -HUP` does."""
    server.process.send_signal(signal.SIGHUP)


def kill_parent(server: Server) -> None:
    """Send SIGTERM to the parent alone, as `kill` does."""
    server.process.send_signal(signal.SIGTERM)


def assert_it_ended_quietly(server: Server) -> None:
    """Wait until the parent and all other processes have ended. None may print a traceback."""
    # uvicorn waits for a worker that is still importing.
    assert server.ends_within(15) is not None, server.log
    wait_for(lambda: not server.processes(), "all processes to end")
    assert tracebacks(server.log) == 0, server.log


@contextmanager
def starting(command: list[str]) -> Iterator[Server]:
    """Start a server, and do not wait until it accepts connections."""
    server = Server(command)
    try:
        yield server
    finally:
        server.kill()


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


async def test_waiting_consumers_cost_nothing(fresh: Server) -> None:
    """With 200 of them, payloads flow by the thousand, and idle workers use no CPU."""
    async with AsyncExitStack() as stack:
        for _ in range(200):
            await stack.enter_async_context(consumer(fresh))
        await until(lambda: busy(fresh, 0.5) < 0.05, "the workers to be idle")
        assert max(worker.num_threads() for worker in workers(fresh)) <= 5, "a thread for each consumer?"
    assert await rate(fresh, 100, 5000) > 1000


async def test_payloads_without_a_consumer_cost_nothing(fresh: Server) -> None:
    """A worker whose consumers have all left takes no payloads, or it would give them back without end."""
    async with AsyncExitStack() as stack:
        for _ in range(16):
            await stack.enter_async_context(consumer(fresh))
    await produce(fresh, numbered(100))
    await until(lambda: busy(fresh, 0.5) < 0.05, "the workers to be idle")


async def test_waiting_consumers_of_the_naive_version_take_all_threads(naive: Server) -> None:
    """Each of them holds a thread, so producers have to wait."""
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


async def test_the_naive_version_hangs_on_ctrl_c(naive: Server) -> None:
    """It waits forever for the threads of its consumers."""
    async with consumer(naive):
        naive.interrupt()
        assert await asyncio.to_thread(naive.ends_within, 2.5) is None


async def test_killing_all_workers_loses_no_queued_payload(fresh: Server) -> None:
    """Uvicorn replaces the workers, and 500 queued payloads arrive in order."""
    payloads = [str(number) for number in range(500)]
    await produce(fresh, payloads)
    for worker in workers(fresh):
        worker.kill()
    await until(lambda: serving(fresh, 4), "new workers")
    assert await drain(fresh) == payloads


async def test_a_worker_killed_under_load_loses_only_what_it_was_sending(fresh: Server) -> None:
    """At most a batch and one payload for each consumer are missing. No payload comes twice."""
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
    await until(lambda: len(echoed - set(received)) <= 64 + 6, "all but what a worker hands over")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(received) == len(set(received)), "a payload came twice"


@pytest.mark.parametrize("restart", [False, True], ids=["a worker dies", "rolling restart"])
async def test_the_server_stops_if_it_cannot_start_a_worker(fresh: Server, restart: bool) -> None:
    """The parent may open no more files. It says why, stops the other worker, and still has the queue."""
    await produce(fresh, ["1", "2"])
    parent = psutil.Process(fresh.process.pid)
    parent.rlimit(psutil.RLIMIT_NOFILE, (parent.num_fds(), parent.num_fds()))
    if restart:
        parent.send_signal(signal.SIGHUP)
    else:
        workers(fresh)[0].kill()
    assert_it_ended_quietly(fresh)
    assert fresh.process.returncode == 1
    lines = fresh.log.splitlines()
    assert lines[-2].endswith("2 payloads were still queued")
    assert lines[-1] == "a worker could not be started: [Errno 24] Too many open files"


async def test_killing_the_parent_ends_all_processes(fresh: Server) -> None:
    """The workers and the manager notice, and end within 5 s."""
    async with consumer(fresh):
        fresh.process.kill()
        fresh.process.wait()
        await until(lambda: not fresh.processes(), "the orphans to end", 5 * SLOWNESS)


@pytest.mark.parametrize("parked", [0, 3])
async def test_killing_the_manager_ends_all_processes(fresh: Server, parked: int) -> None:
    """Each worker says so in a line, and the exit code shows it."""
    async with AsyncExitStack() as stack:
        for _ in range(parked):
            await stack.enter_async_context(consumer(fresh))
        manager(fresh).kill()
        with suppress(OSError, HTTPException):
            while True:  # until no worker answers any more
                status, _, _ = await asyncio.to_thread(fresh.get, "/stats")
                assert status in (200, 503)
        assert await asyncio.to_thread(fresh.ends_within, 5) is not None
        assert fresh.process.returncode == 1
    await until(lambda: not fresh.processes(), "all to end")
    assert "the process that held the queue died" in fresh.log
    assert fresh.log.count("worker stops: ") <= 2
    assert tracebacks(fresh.log) == 0


async def test_killing_the_manager_prints_no_traceback_though_a_consumer_does_not_read(fresh: Server) -> None:
    """Its worker cannot give back the payload that was on its way."""
    async with consumer(fresh, sock=narrow(fresh), max_queue=1) as stuck:
        await produce(fresh, numbered(200, 50_000))
        await settled(fresh)
        manager(fresh).kill()
        assert await asyncio.to_thread(fresh.ends_within, 5) is not None
        stuck.websocket.transport.abort()
    await until(lambda: not fresh.processes(), "all to end")
    assert tracebacks(fresh.log) == 0


@pytest.mark.parametrize("module", ["_asyncio", "pydantic_core"])
def test_ctrl_c_ends_the_parent_while_it_imports(module: str) -> None:
    """It ends by SIGINT and prints nothing."""
    with starting(COMMAND) as server:
        maps = Path(f"/proc/{server.process.pid}/maps")
        wait_for(lambda: f"/{module}" in maps.read_text(), f"the import of {module}", longest=0.005)
        press_ctrl_c(server)
        assert_it_ended_quietly(server)
        assert server.process.returncode == -signal.SIGINT
        assert server.log == ""


@pytest.mark.parametrize("stop", [press_ctrl_c, stop_service, close_terminal, kill_parent])
def test_a_signal_ends_the_server_while_the_manager_starts(stop: Callable[[Server], None]) -> None:
    """No process is left, and no traceback is printed."""
    with starting(COMMAND) as server:
        # The first child is multiprocessing's resource tracker.
        wait_for(lambda: len(children(server)) == 2, "the manager's process", longest=0.005)
        stop(server)
        assert_it_ended_quietly(server)
        assert server.process.returncode == 0


@pytest.mark.parametrize("stop", [press_ctrl_c, stop_service, close_terminal, kill_parent])
def test_a_signal_ends_the_server_while_the_workers_start(stop: Callable[[Server], None]) -> None:
    """No process is left, and no traceback is printed."""
    with starting(COMMAND) as server:
        wait_for(lambda: len(children(server)) == 4, "both workers' processes", longest=0.005)
        stop(server)
        assert_it_ended_quietly(server)
        assert server.process.returncode == 0


@pytest.mark.parametrize("stop", [press_ctrl_c, stop_service, close_terminal, kill_parent])
def test_a_worker_that_dies_without_an_answer_does_not_delay_the_end(
    fresh: Server, stop: Callable[[Server], None]
) -> None:
    """The parent asks each worker twice a second whether it is alive, and waits half a minute."""
    worker = workers(fresh)[0]
    worker.suspend()
    time.sleep(1)  # so that the parent has asked it
    stop(fresh)
    worker.kill()
    assert fresh.ends_within(2) is not None, fresh.log
    assert_it_ended_quietly(fresh)
    assert fresh.process.returncode == 0


async def test_a_closed_terminal_stops_it_as_ctrl_c_does(fresh: Server) -> None:
    """Clients are closed with 1012, and the last line says how many payloads were still queued."""
    await produce(fresh, numbered(3))
    async with client(fresh, PRODUCER) as producer:
        close_terminal(fresh)
        await producer.wait_closed()
        assert producer.close_code == 1012
    await asyncio.to_thread(assert_it_ended_quietly, fresh)
    assert fresh.process.returncode == 0
    assert "3 payloads were still queued" in fresh.log
    assert "Received SIGHUP" not in fresh.log, "uvicorn began a rolling restart"


def test_no_process_outlives_its_terminal() -> None:
    """All processes end when a real terminal closes, although none of them can write to it any more."""
    terminal, inside = pty.openpty()
    command = [sys.executable, "-c", SHELL, *COMMAND, str(free_port())]
    shell = psutil.Popen(
        command, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    family: list[psutil.Process] = []
    try:
        printed = b""
        while printed.count(b"Application startup complete") < 2:
            printed += os.read(terminal, 10_000)
        family += shell.children(recursive=True)
        assert len(family) == 5
        os.close(terminal)
        assert shell.wait(TIMEOUT) == -signal.SIGHUP
        wait_for(lambda: not any(map(alive, family)), "all processes to end")
    finally:
        for process in [shell, *family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_worker_may_take_more_than_five_seconds_to_start(tmp_path: Path) -> None:
    """As on a busy machine. By default, uvicorn would kill it, and start it again and again."""
    slow = tmp_path / "multiproc_server.py"
    delay = "import os, time\nif 'QUEUE_ADDRESS' in os.environ:  # only a worker has it\n    time.sleep(6)\n"
    slow.write_text(delay + (ROOT / "multiproc_server.py").read_text())
    with starting([sys.executable, str(slow), "--workers", "1", "--port"]) as server:
        wait_for(lambda: serving(server, 1) or "died" in server.log, "the worker", 6 * TIMEOUT)
        assert "died" not in server.log


def test_a_worker_that_fails_to_start_ends_the_server_with_an_error(tmp_path: Path) -> None:
    """uvicorn's parent alone would end with exit code 0."""
    broken = tmp_path / "multiproc_server.py"
    source = (ROOT / "multiproc_server.py").read_text()
    broken.write_text(source.replace("    watch_parent()\n", "    raise OSError(28, 'full')\n"))
    with starting([sys.executable, str(broken), "--workers", "2", "--port"]) as server:
        assert server.ends_within(15) is not None, server.log
        assert server.process.returncode == 1
        assert server.log.splitlines()[-1] == "a worker failed to start"


def test_the_folder_for_temporary_files_may_have_a_long_name() -> None:
    """Up to where the manager's own socket, /pymp-12345678/listener-12345678 there, has 107 bytes."""
    folder = Path(f"/tmp/{'x' * 70}")
    folder.mkdir(exist_ok=True)
    try:
        with running(COMMAND, env={"TMPDIR": str(folder)}) as server:
            wait_for(lambda: serving(server, 2), "both workers")
    finally:
        shutil.rmtree(folder)


def test_a_wrong_protocol_class_is_refused_in_one_line() -> None:
    with starting([*COMMAND[:-1], "--ws", "nonsense:Protocol", "--port"]) as server:
        assert server.ends_within(15) is not None, server.log
        assert server.process.returncode == 2
        assert server.log.splitlines()[-1].endswith('error: --ws: Could not import module "nonsense".')


@pytest.mark.parametrize("options", [["--workers", "0"], ["--port", "65536"], ["--port", "-1"]])
def test_a_number_that_makes_no_sense_is_refused_in_one_line(options: list[str]) -> None:
    command = [sys.executable, "multiproc_server.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("and --port a number from 0 to 65535")


async def test_nohup_keeps_the_server_running() -> None:
    """When the terminal closes, the server replaces its workers. The queue stays."""
    with running(["nohup", *COMMAND]) as server:
        wait_for(lambda: serving(server, 2), "both workers")
        await produce(server, numbered(3))
        close_terminal(server)
        await until(lambda: serving(server, 4), "new workers")
        assert await drain(server) == numbered(3)


async def test_a_rolling_restart_loses_nothing(fresh: Server) -> None:
    """Under load, each client is closed with 1012 and reconnects. All payloads with a receipt arrive once."""
    received: list[int] = []
    echoed: list[int] = []
    numbers = itertools.count()
    codes: list[int | None] = []
    restarted = asyncio.Event()

    async def reconnecting(path: str, use: Callable[[ClientConnection], Awaitable[None]]) -> None:
        while True:
            with suppress(ConnectionClosed, OSError, InvalidHandshake):
                async with client(fresh, path) as websocket:
                    with suppress(ConnectionClosed):
                        await use(websocket)
                        return
                    await websocket.wait_closed()
                    codes.append(websocket.close_code)
            await asyncio.sleep(random.uniform(0, 0.2))  # jitter, so that not all come back at once

    async def take(websocket: ClientConnection) -> None:
        while True:
            received.append(int(await receive(websocket)))

    async def send(websocket: ClientConnection) -> None:
        while not restarted.is_set():
            batch = [str(next(numbers)) for _ in range(50)]
            write(websocket, batch)
            for payload in batch:
                assert await receive(websocket) == payload
                echoed.append(int(payload))

    takers = [asyncio.create_task(reconnecting(CONSUMER, take)) for _ in range(4)]
    senders = [asyncio.create_task(reconnecting(PRODUCER, send)) for _ in range(4)]
    await until(lambda: len(echoed) > 1000, "the flow")
    restart_workers(fresh)
    await until(lambda: fresh.log.count("Finished server process") == 2, "new workers", 3 * TIMEOUT)
    restarted.set()
    await asyncio.gather(*senders)
    await until(lambda: len(set(received)) >= len(echoed) and set(echoed) <= set(received), "all payloads")
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    assert len(codes) >= 8, "the clients stayed connected: this shows nothing"
    assert set(codes) == {1012}
    assert len(received) == len(set(received)), "a payload came twice"


def test_a_signal_ends_the_server_during_a_rolling_restart(fresh: Server) -> None:
    """The server does not finish the rolling restart first."""
    restart_workers(fresh)
    wait_for(lambda: "Received SIGHUP" in fresh.log, "the rolling restart")
    kill_parent(fresh)
    assert_it_ended_quietly(fresh)
    assert fresh.process.returncode == 0
    assert not serving(fresh, 4), "both workers were replaced"


@pytest.fixture(params=["fork", "forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Return an environment in which every Python has this default start method of multiprocessing.

    The default is forkserver on Linux since Python 3.14, and spawn on macOS.
    """
    (tmp_path / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({request.param!r})\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


async def test_the_server_works_with_any_default_start_method(start_method: dict[str, str]) -> None:
    """It forwards payloads, and ends quietly when systemd stops it."""
    with running(COMMAND, env=start_method) as server:
        wait_for(lambda: serving(server, 2), "both workers")
        await produce(server, numbered(9))
        async with consumer(server) as taker:
            assert await taker.payloads(9) == numbered(9)
        await produce(server, numbered(7))
        stop_service(server)
        await asyncio.to_thread(assert_it_ended_quietly, server)
        assert server.process.returncode == 0
        assert "7 payloads were still queued" in server.log


async def test_the_naive_version_starts_with_any_default_start_method(start_method: dict[str, str]) -> None:
    """It forwards payloads, so the tests of its faults run on every Python."""
    with running(NAIVE, env=start_method) as server:
        await produce(server, ["1"])
        async with client(server, CONSUMER) as taker:
            assert await receive(taker) == "1"


@pytest.mark.parametrize("stop", [press_ctrl_c, kill_parent])
def test_python_dev_mode_reports_nothing(stop: Callable[[Server], None]) -> None:
    """`python -X dev` prints no warning, so every socket and file was closed."""
    with starting([COMMAND[0], "-X", "dev", *COMMAND[1:]]) as server:
        wait_for(lambda: serving(server, 2), "both workers", 3 * TIMEOUT)  # -X dev makes imports slow
        stop(server)
        assert_it_ended_quietly(server)
    assert "Warning" not in server.log, server.log


def test_uvicorn_alone_says_what_to_run() -> None:
    """`uvicorn multiproc_server:app --workers 4` ends by itself, and each worker says what to run."""
    server = Server([sys.executable, "-m", "uvicorn", "multiproc_server:app", "--workers", "4", "--port"])
    try:
        # Most of it uvicorn waits, 5 s, for a sign of life; on a busy machine the workers import as long.
        assert server.ends_within(30) is not None
        wait_for(lambda: not server.processes(), "all to end")
        assert 1 <= len(re.findall("run python multiproc_server.py", server.log)) <= 4  # a worker each
        assert tracebacks(server.log) == 0
    finally:
        server.kill()


async def test_a_receipt_does_not_wait_for_a_tcp_acknowledgement(tmp_path: Path) -> None:
    """Without TCP_NODELAY, the second of two receipts waits for 40 ms, until the client's Linux sends one."""
    (tmp_path / "uvloop.py").write_text("raise ImportError")  # it sets TCP_NODELAY by itself
    with running(COMMAND, env={"PYTHONPATH": str(tmp_path)}) as server:
        seconds = []
        async with client(server, PRODUCER) as producer:
            for _ in range(50):
                connection = producer.transport.get_extra_info("socket")
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                start = time.monotonic()
                write(producer, ["1", "2"])
                await receive(producer)
                await receive(producer)
                seconds.append(time.monotonic() - start)
        assert min(seconds) < 0.03


def test_a_worker_that_waits_for_payloads_is_woken_once(tmp_path: Path) -> None:
    """The next payload wakes it again only if it has asked again."""
    queue = runpy.run_path(str(ROOT / "multiproc_server.py"), run_name="__mp_main__")["SharedQueue"]()
    address = str(tmp_path / "worker")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as worker, queue.socket:
        worker.bind(address)
        worker.setblocking(False)
        for payload in ("1", "2"):
            assert queue.take(address, 1) == []
            queue.put([payload])
            assert worker.recv(100)
            assert [text for _, text in queue.take("another worker", 1)] == [payload]
            queue.put([payload])
            with pytest.raises(BlockingIOError):
                worker.recv(100)
            queue.take("another worker", 1)


async def test_a_slow_consumer_moves_few_payloads_to_and_fro() -> None:
    """What it does not take goes back to the manager. That costs time, and its space is free meanwhile."""
    module = runpy.run_path(str(ROOT / "multiproc_server.py"), run_name="__mp_main__")
    channel, queue = module["Channel"](), module["SharedQueue"]()
    moved: list[str] = []
    taken: list[str] = []

    class Shared:
        put_back = staticmethod(queue.put_back)

        def take(self, *arguments: object) -> list[tuple[int, str]]:
            entries: list[tuple[int, str]] = queue.take(*arguments)
            moved.extend(payload for _, payload in entries)
            return entries

    async def work(payload: str) -> None:
        taken.append(payload)
        await asyncio.sleep(0.002)

    channel.shared = Shared()
    with queue.socket:
        queue.put(numbered(500))
        tasks = [asyncio.create_task(channel.fetch("")), asyncio.create_task(channel.deliver(work))]
        await until(lambda: len(taken) >= 100, "100 payloads")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert taken == numbered(len(taken))
    assert len(moved) < 64 + 3 * len(taken)


async def test_the_queue_is_closed_to_others(fresh: Server) -> None:
    """The manager listens on a socket in a folder that only its user can enter, and on no port."""
    paths = unix_sockets(manager(fresh))
    assert {path.parent.stat().st_mode & 0o777 for path in paths} == {0o700}
    assert not manager(fresh).net_connections("tcp")
