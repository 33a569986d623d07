"""Measure what a payload costs each server: CPU, time, memory. Every payload and every echo is checked.

    pip install -r bench/requirements.txt
    python bench/bench.py                      all of it, in less than six minutes, to bench/results.json
    python bench/bench.py latency server.py    some workloads or servers only, by name; shown, not saved
    python bench/bench.py --readme             write bench/README.md and bench/plot.svg from results.json

CPU is the main figure: unlike time, it is the server's own, over all its processes, whatever else runs. But
on a busy machine each instruction takes longer. So all servers do the same work within seconds of each other,
round by round, and the lowest figure of the rounds counts.
"""

import argparse
import asyncio
import json
import logging
import os
import platform
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from typing import IO, Any

import psutil
import uvloop

BENCH = Path(__file__).resolve().parent
ROOT, RESULTS, PLOT = BENCH.parent, BENCH / "results.json", BENCH / "plot.svg"
README = BENCH / "README.md"
if not __package__:  # run as a script: then `bench` would be this file, not the folder
    sys.path[0] = str(ROOT)

from bench.load import START, Acknowledging, Failed, Load, Server, SocketIO, Work  # noqa: E402
from bench.report import digits, plot, section, table, with_section  # noqa: E402

ROUNDS = 4
FILES = 4096  # open at a time: a thousand connections, and some
UVICORN = (sys.executable, "-m", "uvicorn", "--log-level", "warning")
# A server and a Redis of its own, which counts with it: in the same process tree, and killed with it.
WITH_REDIS = (
    "sh",
    "-c",
    """folder=$(mktemp -d); export REDIS_URL=unix://$folder/socket
    redis-server --port 0 --unixsocket $folder/socket --dir $folder --save '' --appendonly yes &
    until [ -S $folder/socket ]; do sleep 0.05; done
    exec "$@" """,
    "sh",
)
SERVERS = [
    Server("server.py", (*UVICORN, "server:app", "--port")),
    Server("server.py on uvloop", (*UVICORN, "server:app", "--port"), uvloop=True),
    Server("multiproc_server.py", (sys.executable, "multiproc_server.py", "--workers", "2", "--port")),
    Server("ack_server.py", (*UVICORN, "lessons.ack_server:app", "--port"), connection=Acknowledging),
    Server(
        "redis_server.py",
        (*WITH_REDIS, *UVICORN, "lessons.redis_server:app", "--port"),
        connection=Acknowledging,
    ),
    Server("gateway + server.py", ("env", "BEHIND=server:app", *UVICORN, "tests.gateway_app:app", "--port")),
    Server("naive", (*UVICORN, "steps.step0_naive:app", "--port")),
    Server("naive multiproc", (sys.executable, "lessons/naive/multiproc_server.py")),
    Server("bare websockets", (sys.executable, "bench/bare_websockets.py")),
]
PEERS = [
    Server(
        "python-socketio",
        (sys.executable, "bench/socketio_relay.py"),
        connection=SocketIO,
        package="python-socketio",
    ),
]
# In this order, consumers only ever join a server, because a naive one loses a payload to each that has left.
# `large` gets a fresh server, because what it leaves behind would count as others' memory. So does `deflate`,
# because its clients offer compression.
WORKS = [
    Work("one", "1 producer, 1 consumer", 15_000),
    Work("latency", "one payload at a time", 4_000, ahead=1),
    Work("four", "4 producers, 4 consumers", 15_000, 4, 4),
    Work("hundred", "1 producer, 100 consumers", 15_000, consumers=100),
    Work("crowd", "4 producers, 100 consumers", 15_000, 4, 100),
    Work("parked", "4 producers, 1,000 consumers", 15_000, 4, 1000),
    Work("large", "1 producer, 1 consumer, 10 kB", 10_000, size=10_000),
    Work("deflate", "1 producer, 1 consumer, compression offered", 15_000, deflate=True),
]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def launch(server: Server, port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    """Start it in a session of its own: so Ctrl+C reaches only us, and we can kill all that comes of it."""
    env = dict(os.environ)
    if not server.uvloop:
        env["PYTHONPATH"] = str(BENCH / "without_uvloop")
    command = [*server.command, str(port)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


@asynccontextmanager
async def started(server: Server) -> AsyncIterator[Load]:
    """A server that is ready. In the end it is killed: a naive one would wait for its clients."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = launch(server, port, log)
        try:
            deadline = time.monotonic() + START
            while not accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise Failed(f"did not start: {(log.read().splitlines() or ['no output'])[-1]}")
                await asyncio.sleep(0.02)
            load = (server.load or Load)(server, port, process.pid)
            await load.settle(0.2)
            yield load
        finally:
            kill(process.pid)
            process.wait()


def kill(pid: int) -> None:
    """Kill a process and all that came of it: its group, and descendants with a session of their own."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def visit(
    server: Server, works: Iterable[Work], scale: float = 1
) -> AsyncGenerator[tuple[str, dict[str, float] | str]]:
    """Yield the figures of each work, or why it failed. Starts the server as often as it must."""
    todo = deque(works)
    while todo:
        work = todo[0]
        try:
            async with started(server) as load:
                figures = await load.run(todo.popleft(), scale)
                while todo and todo[0].consumers >= work.consumers and todo[0].deflate == work.deflate:
                    yield work.name, figures
                    work = todo[0]
                    figures = await load.run(todo.popleft(), scale)
            yield work.name, figures
        except (Failed, psutil.Error) as failure:
            if todo and todo[0] is work:
                todo.popleft()
            yield work.name, str(failure)


def say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


async def measure(works: list[Work], servers: list[Server], rounds: int, scale: float) -> dict[str, Any]:
    """All rounds, as results.json has them. What has failed once is not tried again."""
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[tuple[str, str], str] = {}
    load_average, _, _ = os.getloadavg()
    began = time.monotonic()
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}, after {time.monotonic() - began:.0f} s; µs of CPU per payload:\n")
        async with AsyncExitStack() as stack:
            visits = {}
            for server in servers:
                todo = [work for work in works if (work.name, server.name) not in failed]
                visits[server.name] = await stack.enter_async_context(aclosing(visit(server, todo, scale)))
            for work in works:
                say(f"  {work.name}:")
                # In turn, so that no server always has the best place in the row.
                for name in visits if number % 2 else reversed(visits):
                    if (work.name, name) in failed:
                        continue
                    _, figures = await anext(visits[name])
                    if isinstance(figures, str):
                        failed[work.name, name] = figures
                        say(f" {name} FAILED ({figures})")
                    else:
                        samples.setdefault((work.name, name), []).append(figures)
                        say(f" {name} {figures['cpu_us']:.1f}")
                say("\n")
    seconds = round(time.monotonic() - began)
    say(f"took {seconds} s\n")
    results: dict[str, dict[str, Any]] = {}
    for work in works:
        rows: dict[str, Any] = {}
        results[work.name] = rows
        for server in servers:
            key = work.name, server.name
            reference = samples.get((work.name, servers[0].name), [])
            rows[server.name] = {"failed": failed[key]} if key in failed else summary(samples[key], reference)
    packages = ["uvicorn", "fastapi", "websockets", "uvloop", "picows"]
    packages += [server.package for server in servers if server.package]
    return {
        "date": str(date.today()),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "rounds": rounds,
        "seconds": seconds,
        "load_average": digits(load_average),
        "works": {work.name: {**vars(work), "payloads": work.count(scale)} for work in works},
        "results": results,
    }


def summary(rounds: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest over the rounds, and the lowest compared with the reference's lowest.

    What else the machine does can only make a figure higher, so the lowest is the one that it affects least.
    """
    found: dict[str, dict[str, float]] = {}
    for figure in rounds[0]:
        values = [values[figure] for values in rounds]
        found[figure] = {
            "median": digits(statistics.median(values)),
            "min": digits(min(values)),
            "max": digits(max(values)),
        }
        # No ratio if the reference failed, or its figure is too small to be measured.
        if reference and (least := min(values[figure] for values in reference)):
            found[figure]["ratio"] = digits(min(values) / least)
    return found


def installed() -> set[str]:
    return {distribution.name for distribution in distributions()}


def cpu_model() -> str:
    with suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def main(
    servers: list[Server],
    peers: list[Server],
    works: list[Work],
    saved: Path,
    write: Callable[[dict[str, Any]], None],
) -> int:
    """Measure, or `write` what is saved to a README. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what a payload costs each server.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workloads or servers, instead of all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds ({ROUNDS})")
    parser.add_argument("--scale", type=float, default=1, metavar="X", help="part of the payloads (1)")
    parser.add_argument("--peers", action="store_true", help="other packages too; see requirements-peers.txt")
    parser.add_argument("--save", type=Path, metavar="FILE", help=f"where to save; a whole run: {saved.name}")
    parser.add_argument("--readme", action="store_true", help="measure nothing: write the README's section")
    args = parser.parse_args()
    if args.readme:
        write(json.loads(saved.read_text()))
        return 0
    known = servers + peers * args.peers
    names = [work.name for work in works] + [server.name for server in known]
    if unknown := set(args.names) - {*names}:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    missing = {server.package for server in known} - {"", *installed()}
    if missing:
        say(f"{', '.join(missing)} missing: pip install -r bench/requirements-peers.txt\n")
        return 2
    works = [work for work in works if work.name in args.names] or works
    servers = [server for server in known if server.name in args.names] or known
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:  # many systems let a process have no more than 1024, or 256, unless it asks
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    logging.getLogger("picows").setLevel(logging.ERROR)  # not: how full its buffers are
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            results = runner.run(measure(works, servers, args.rounds, args.scale))
    except KeyboardInterrupt:
        say("\nstopped\n")
        return 130
    print(table(results))
    whole = not args.names and args.scale == 1 and args.rounds >= ROUNDS
    if path := args.save or (saved if whole else None):
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return int(any("failed" in row for rows in results["results"].values() for row in rows.values()))


def write(results: dict[str, Any]) -> None:
    README.write_text(with_section(README.read_text(), "bench", section(results)))
    PLOT.write_text(plot(results))


if __name__ == "__main__":
    sys.exit(main(SERVERS, PEERS, WORKS, RESULTS, write))
