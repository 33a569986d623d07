"""Real servers in processes of their own, and real clients for them."""

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path

import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

ROOT = Path(__file__).parent.parent
SLOWNESS = float(os.environ.get("TEST_SLOWNESS", "1"))  # every timeout is multiplied by it
TIMEOUT = 10 * SLOWNESS  # seconds after which a condition that must come true never will
CONNECTING = {
    "proxy": None,
    "compression": None,
    "open_timeout": TIMEOUT,
    "close_timeout": TIMEOUT,
    "ping_interval": None,  # so that what keeps a connection alive, or ends it, is the server
    "max_queue": None,
    "max_size": None,
}
PRODUCER, CONSUMER = "/ws/producer", "/ws/consumer"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def uvicorn_command(app: str) -> list[str]:
    """The command line for an app such as `server:app`, as the README gives it; the port follows."""
    return [sys.executable, "-m", "uvicorn", app, "--timeout-graceful-shutdown", "1", "--port"]


def with_options(command: list[str], *options: str) -> list[str]:
    """A command of uvicorn_command() with more options."""
    return [*command[:-1], *options, command[-1]]


# name -> the command that starts the server, to which a port is appended.
SERVERS = {
    "server.py": uvicorn_command("server:app"),
    "multiproc_server.py": [sys.executable, "multiproc_server.py", "--workers", "2", "--port"],
}
NAIVE = uvicorn_command("tests.naive.server:app")


class Server:
    """A server, its processes, its address, and what it has logged so far."""

    def __init__(
        self, command: list[str], port: int | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.port = port or free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, str(self.port)],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, for what Ctrl+C does in a terminal
        )

    def url(self, path: str, scheme: str = "ws") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    @property
    def log(self) -> str:
        if not self._log.closed:
            # Opened anew, because seeking in ours would move the server's position too.
            self._logged = Path(f"/proc/self/fd/{self._log.fileno()}").read_text()
        return self._logged

    def wait_ready(self) -> None:
        """Return once it accepts connections; raise AssertionError with its log where it never does."""

        def accepts() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                return False
            return True

        wait_for(accepts, "the server to accept connections")

    def get(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body of a page."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.getheader("content-type", ""), response.read().decode()
        finally:
            connection.close()

    def stats(self) -> dict[str, int]:
        status, _, body = self.get("/stats")
        assert status == 200, f"GET /stats: {status} {body}"
        stats: dict[str, int] = json.loads(body)
        return stats

    def queued(self) -> int:
        return self.stats()["queued"]

    @cached_property
    def capacity(self) -> int:
        return self.stats()["capacity"]

    @cached_property
    def acks(self) -> bool:
        """Whether its consumers acknowledge payloads. A server without /stats knows nothing of that."""
        status, _, body = self.get("/stats")
        return status == 200 and bool(json.loads(body)["acks"])

    def processes(self) -> list[psutil.Process]:
        """Its process and all that came of it, also those whose parent has ended."""
        family = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    family.append(process)
        return family

    def rss(self) -> int:
        """Resident memory in bytes, over all its processes."""
        return sum(process.memory_info().rss for process in self.processes())

    def connections(self) -> set[int]:
        """The other ends' ports of the TCP connections that it holds, of those too that have left."""
        return {
            connection.raddr.port
            for process in self.processes()
            for connection in process.net_connections("tcp")
            if connection.raddr
        }

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send SIGINT as a terminal does, to the whole process group; other signals as `kill` does."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ends_within(self, seconds: float) -> float | None:
        """How long it took to end, in seconds, or None where it did not within `seconds`."""
        start = time.monotonic()
        try:
            self.process.wait(seconds * SLOWNESS)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - start

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._logged = self.log
        self._log.close()


@contextmanager
def running(
    command: list[str], port: int | None = None, env: dict[str, str] | None = None
) -> Iterator[Server]:
    server = Server(command, port, env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def wait_for(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Wait until the condition holds. AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:  # noqa: ASYNC109
    """wait_for(), without stopping the loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def client(server: Server, path: str, **options: object) -> AsyncIterator[ClientConnection]:
    """A websocket to the server, without the conveniences that would hide what the server does.

    Ends what goes on inside it with TimeoutError after six TIMEOUTs, so that no test hangs.
    """
    websocket = await connect(server.url(path), **{**CONNECTING, **options})  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(6 * TIMEOUT):
            yield websocket
    except BaseException:
        websocket.transport.abort()  # a server that failed a test may not answer a closing handshake
        raise
    finally:
        await websocket.close()


def narrow(server: Server) -> socket.socket:
    """A connected socket with little room, for a client that stops reading and must be noticed soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before connecting, or it has no effect
    sock.connect(("127.0.0.1", server.port))
    sock.setblocking(False)
    return sock


async def receive(websocket: ClientConnection) -> str:
    """The next text frame, within TIMEOUT."""
    async with asyncio.timeout(TIMEOUT):
        return await websocket.recv(decode=True)


async def receive_all(websocket: ClientConnection) -> list[str]:
    """Every text frame until the connection ends."""
    frames = []
    async with asyncio.timeout(TIMEOUT):
        with suppress(ConnectionClosed):
            while True:
                frames.append(await websocket.recv(decode=True))
    return frames


def port(websocket: ClientConnection) -> int:
    """Its own port, by which the server's connection to it is known."""
    number: int = websocket.local_address[1]
    return number


async def gone(server: Server, ports: set[int]) -> None:
    """Wait until the server has noticed that these have left."""
    await until(lambda: not ports & server.connections(), f"the server to let go of {ports}", 1 * SLOWNESS)


def write(websocket: ClientConnection, payloads: Iterable[str]) -> None:
    """Send payloads ahead in one write, so that they reach the server together."""
    frames = (Frame(Opcode.TEXT, payload.encode()).serialize(mask=True) for payload in payloads)
    websocket.transport.write(b"".join(frames))


async def vanish(websocket: ClientConnection) -> None:
    """Leave as a killed process does: the operating system closes the socket, nobody sends a close frame."""
    websocket.transport.abort()
    await websocket.wait_closed()


async def reset(websocket: ClientConnection) -> None:
    """Leave with a TCP reset."""
    sock = websocket.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await vanish(websocket)


async def produce(server: Server, payloads: Sequence[str]) -> None:
    """Send all payloads ahead on a connection of their own; each must come back as its receipt."""
    async with client(server, PRODUCER) as websocket:
        write(websocket, payloads)
        for payload in payloads:
            assert await receive(websocket) == payload


class Consumer:
    """Payloads come out of it. Where the server takes acknowledgements, it acknowledges each."""

    def __init__(self, websocket: ClientConnection, acks: bool) -> None:
        self.websocket, self.acks = websocket, acks

    async def payload(self) -> str:
        payload = await receive(self.websocket)
        if self.acks:
            with suppress(ConnectionClosed):
                await self.websocket.send("ack")
        return payload

    async def payloads(self, count: int) -> list[str]:
        return [await self.payload() for _ in range(count)]


@asynccontextmanager
async def consumer(server: Server, **options: object) -> AsyncIterator[Consumer]:
    acks = server.acks
    async with client(server, CONSUMER, **options) as websocket:
        yield Consumer(websocket, acks)


async def drain(server: Server) -> list[str]:
    """Take all that is queued."""
    count = server.queued()
    async with consumer(server) as taker:
        return await taker.payloads(count)
