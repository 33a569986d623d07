"""Show when 1,000 consumers come back after a restart of server.py: all after one second, or at random times.

    pip install -r bench/requirements.txt
    python bench/reconnect.py

It takes about fifteen seconds and prints the diagram of lessons/deploy.md: the attempts to connect in each
tenth of a second, and how long a handshake takes. Clients and server share the machine.
"""

import asyncio
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

if not __package__:  # run as a script: then `bench` would be this file, not the folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.bench import ROOT, accepts, free_port
from ws_consumer_client import pause

CLIENTS = 1000
PATIENCE = 10  # seconds that a handshake may take
SHOWN = 24  # tenths of a second in the diagram
BAR = 20  # attempts for each character of a bar
WIDTH = 45  # characters of the longest bar


def one_second(failures: int) -> float:
    """Wait as simple clients do."""
    return 1


class Client(WSListener):
    """A consumer that connects again when its server goes away."""

    def __init__(self, url: str, wait: Callable[[int], float]) -> None:
        self.url = url
        self.wait = wait
        self.closed = asyncio.Event()
        self.attempts: list[float] = []  # when, as time.monotonic() counts
        self.handshakes: list[float] = []  # seconds
        self.transport: WSTransport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.closed.set()

    async def connect(self) -> bool:
        """Try once. Return whether there is a connection."""
        started = time.monotonic()
        self.attempts.append(started)
        self.closed.clear()
        try:
            self.transport, _ = await ws_connect(lambda: self, self.url, websocket_handshake_timeout=PATIENCE)
        except (OSError, WSError):
            return False
        self.handshakes.append(time.monotonic() - started)
        return True

    async def come_back(self) -> None:
        """Wait until the server goes away, and then until there is a connection again."""
        await self.closed.wait()
        self.attempts.clear()
        self.handshakes.clear()
        failures = 1
        await asyncio.sleep(self.wait(failures))
        while not await self.connect():
            failures += 1
            await asyncio.sleep(self.wait(failures))


async def start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "server.py", "--log-level", "error", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)  # noqa: ASYNC220
    while not accepts(port):
        await asyncio.sleep(0.02)
    return process


async def restart(wait: Callable[[int], float]) -> tuple[Counter[int], list[float]]:
    """Restart a server with clients. Return the attempts in each tenth of a second, and the handshakes."""
    port = free_port()
    process = await start(port)
    try:
        clients = [Client(f"ws://127.0.0.1:{port}/ws/consumer", wait) for _ in range(CLIENTS)]
        for client in clients:
            assert await client.connect()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.come_back())
            stopped = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
            process = await start(port)
    finally:
        process.kill()
        process.wait()
    attempts = [int((when - stopped) * 10) for client in clients for when in client.attempts]
    return Counter(attempts), [seconds for client in clients for seconds in client.handshakes]


async def main() -> None:
    counts = []
    for name, wait in {"each waits one second": one_second, "each waits a random time": pause}.items():
        attempts, handshakes = await restart(wait)
        counts.append(attempts)
        middle, worst = statistics.median(handshakes), max(handshakes)
        print(f"{name}: at most {max(attempts.values())} attempts in 0.1 s,", end=" ")
        print(f"a handshake takes {middle:.2f} s in the median, {worst:.2f} s at most")
    print()
    for tenth in range(SHOWN):
        bars = ["#" * round(attempts[tenth] / BAR) for attempts in counts]
        print(f"{tenth / 10:6.1f} s  {bars[0]:{WIDTH}} {bars[1]}".rstrip())
    later = [sum(count for tenth, count in attempts.items() if tenth >= SHOWN) for attempts in counts]
    print(f"{'later':>8}  {later[0]:<{WIDTH}} {later[1]}")


if __name__ == "__main__":
    asyncio.run(main())
