"""Measure what compression (permessage-deflate) costs server.py: CPU and memory.

    pip install -r bench/requirements.txt
    python bench/deflate.py

It takes about two minutes and prints the table of steps/README.md. CPU is the server's own, so the
other work of the machine changes it little. Each figure is the median of five runs, in turn.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

if not __package__:  # run as a script: then `bench` would be this file, not the folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.bench import ROOT, accepts, free_port

ROUNDS = 5
COUNTS = {1: 10_000, 20: 6000, 200: 2000, 2000: 300}  # rows of a payload: payloads in a run
AHEAD = 100  # payloads in flight
CONSUMERS = 500  # idle ones, to measure memory


def payload(rng: random.Random, rows: int) -> str:
    """Make JSON of that many rows, about 50 bytes each."""
    return json.dumps([{"sensor": "temperature", "value": round(rng.random(), 6)} for _ in range(rows)])


@asynccontextmanager
async def started(deflate: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    """Start server.py, with compression "true" or "false". Yield its process and its address."""
    port = free_port()
    options = ["--log-level", "warning", "--ws-per-message-deflate", deflate, "--port", str(port)]
    command = [sys.executable, "-m", "uvicorn", "server:app", *options]
    with subprocess.Popen(command, cwd=ROOT) as process:  # noqa: ASYNC220
        try:
            url = f"ws://127.0.0.1:{port}/ws/"
            while not accepts(port):
                await asyncio.sleep(0.05)
            yield psutil.Process(process.pid), url
        finally:
            process.kill()


async def consume(websocket: ClientConnection, count: int, space: asyncio.Semaphore) -> None:
    for _ in range(count):
        await websocket.recv()
        space.release()


async def drop_receipts(websocket: ClientConnection) -> None:
    try:
        async for _ in websocket:
            pass
    except ConnectionClosed:
        pass


async def cpu_per_payload(deflate: str, batch: list[str]) -> float:
    """Send the payloads through a server. Return its CPU in microseconds per payload."""
    async with (
        started(deflate) as (process, url),
        connect(url + "consumer", proxy=None) as consumer,
        connect(url + "producer", proxy=None) as producer,
        asyncio.TaskGroup() as group,
    ):
        before = sum(process.cpu_times()[:2])
        space = asyncio.Semaphore(AHEAD)
        consuming = group.create_task(consume(consumer, len(batch), space))
        group.create_task(drop_receipts(producer))
        for payload in batch:
            await space.acquire()
            await producer.send(payload)
        await consuming
        used = sum(process.cpu_times()[:2]) - before
        await producer.close()
    return used / len(batch) * 1e6


async def memory_per_consumer(deflate: str) -> float:
    """Connect idle consumers. Return the server's memory in kB for each."""
    async with started(deflate) as (process, url), AsyncExitStack() as stack:
        before = process.memory_info().rss
        for _ in range(CONSUMERS):
            await stack.enter_async_context(connect(url + "consumer", proxy=None))
        return (process.memory_info().rss - before) / CONSUMERS / 1000


def row(name: str, unit: str, on: list[float], off: list[float]) -> str:
    with_it, without = statistics.median(on), statistics.median(off)
    return f"| {name} | {with_it:.0f} {unit} | {without:.0f} {unit} | {with_it / without:.1f} |"


async def main() -> None:
    print("| | with compression | without | ratio |")
    print("|---|--:|--:|--:|")
    for rows, count in COUNTS.items():
        rng = random.Random(rows)
        batch = [payload(rng, rows) for _ in range(count)]
        figures: dict[str, list[float]] = {"true": [], "false": []}
        for _ in range(ROUNDS):
            for deflate, samples in figures.items():
                samples.append(await cpu_per_payload(deflate, batch))
        length = f"{round(statistics.mean(map(len, batch)), -1):,.0f} bytes"
        print(row(f"CPU per payload of {length}", "µs", *figures.values()), flush=True)
    figures = {"true": [], "false": []}
    for _ in range(ROUNDS):
        for deflate, samples in figures.items():
            samples.append(await memory_per_consumer(deflate))
    print(row("memory per idle consumer", "kB", *figures.values()))


if __name__ == "__main__":
    asyncio.run(main())
