"""Show how lessons/partitioned_server.py spreads a queue over three nodes of a Redis Cluster.

    pip install -r bench/requirements.txt
    python bench/partitions.py

It takes about half a minute, and prints what lessons/partitioned_server.md shows: each node's share of the
memory for queued payloads, and of the CPU time that Redis needs for a stream of payloads. It needs
redis-server and redis-cli. All nodes are on this machine, so they cannot be faster than one; the shares say
what each would have to do on a machine of its own.
"""

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from websockets.asyncio.client import connect

if not __package__:  # run as a script: then `bench` would be this file, not the folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.bench import ROOT, accepts, free_port

NODES = 3
KEYS = 80  # producers, each with a key of its own
QUEUED = 10  # payloads of each producer that wait while the memory is measured
FLOWING = 100  # payloads of each producer that come and go while the CPU time is measured
SIZE = 10_000  # bytes of a payload
AHEAD = 500  # payloads that are on their way at the same time
PATIENCE = 60  # seconds


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "not ready"
        time.sleep(0.05)


@contextmanager
def started(command: list[str], port: int, **options: str) -> Iterator[None]:
    """Run a program, and end it afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=options or None)
    try:
        wait_for(lambda: accepts(port) or process.poll() is not None)
        assert process.poll() is None, f"ended with {process.returncode}: {' '.join(command)}"
        yield
    finally:
        process.kill()
        process.wait()


def is_ok(port: int) -> bool:
    """Whether a node serves its slots, and takes all other slots for served."""
    with Redis(port=port) as connection:
        client: Any = connection
        return bool(client.cluster("INFO")["cluster_state"] == "ok")


@contextmanager
def cluster() -> Iterator[list[int]]:
    """Start a Redis Cluster, and yield the ports of its nodes."""
    with ExitStack() as stack:
        ports = []
        for _ in range(NODES):
            # A node also uses the port that is 10,000 higher.
            port = next(port for port in iter(free_port, None) if port < 55_536)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            command = ["redis-server", "--port", str(port), "--dir", folder, "--cluster-enabled", "yes"]
            stack.enter_context(started([*command, "--save", ""], port))
            ports.append(port)
        nodes = [f"127.0.0.1:{port}" for port in ports]
        create = ["redis-cli", "--cluster", "create", *nodes, "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        wait_for(lambda: all(is_ok(port) for port in ports))
        yield ports


def info(ports: list[int], section: str, *fields: str) -> list[float]:
    """Return the sum of these fields of INFO, for each node."""
    sums = []
    for port in ports:
        with Redis(port=port) as client:
            values = client.info(section)
        sums.append(sum(float(values[field]) for field in fields))
    return sums


def shares(before: list[float], after: list[float]) -> str:
    """Return how much of the growth each node has."""
    grown = [max(0.0, later - earlier) for earlier, later in zip(before, after, strict=True)]
    return "  ".join(f"{amount / sum(grown):4.0%}" for amount in grown)


async def produce(url: str, key: int, count: int, room: asyncio.Semaphore) -> None:
    payload = '"' + "x" * (SIZE - 2) + '"'
    async with connect(f"{url}/ws/producer?key={key}", proxy=None, compression=None) as websocket:
        for _ in range(count):
            await room.acquire()
            await websocket.send(payload)
            await websocket.recv()


async def consume(url: str, count: int, room: asyncio.Semaphore) -> None:
    path = "/ws/consumer?prefetch=200"
    async with connect(f"{url}{path}", proxy=None, compression=None) as websocket:
        for _ in range(count):
            await websocket.recv()
            await websocket.send("ack")
            room.release()


async def measure(url: str, ports: list[int]) -> tuple[str, str]:
    """Return the nodes' shares of the memory and of the CPU time."""
    empty = info(ports, "memory", "used_memory")
    room = asyncio.Semaphore(KEYS * QUEUED)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for key in range(KEYS):
            group.create_task(produce(url, key, QUEUED, room))
    memory = shares(empty, info(ports, "memory", "used_memory"))
    async with asyncio.timeout(PATIENCE):
        await consume(url, KEYS * QUEUED, room)
    times = "used_cpu_user", "used_cpu_sys"
    idle = info(ports, "cpu", *times)
    room = asyncio.Semaphore(AHEAD)
    async with asyncio.timeout(2 * PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(consume(url, KEYS * FLOWING, room))
        for key in range(KEYS):
            group.create_task(produce(url, key, FLOWING, room))
    return memory, shares(idle, info(ports, "cpu", *times))


async def run(partitions: int) -> tuple[str, str]:
    """Measure the server with this number of partitions, on a new cluster."""
    code = (ROOT / "lessons" / "partitioned_server.py").read_text()
    code, count = re.subn(r"(?m)^PARTITIONS = \d+", f"PARTITIONS = {partitions}", code)
    assert count == 1
    with cluster() as ports, tempfile.TemporaryDirectory() as folder:
        server = Path(folder) / "partitioned_server.py"
        server.write_text(code)
        port = free_port()
        command = [sys.executable, str(server), "--log-level", "error", "--port", str(port)]
        with started(command, port, REDIS_URL=f"redis+cluster://127.0.0.1:{ports[0]}"):
            return await measure(f"ws://127.0.0.1:{port}", ports)


async def main() -> None:
    print(f"{'':14}   memory of each node   CPU time of each node")
    for partitions in (1, 8):
        memory, cpu = await run(partitions)
        print(f"PARTITIONS = {partitions}   {memory:21} {cpu:>21}")


if __name__ == "__main__":
    asyncio.run(main())
