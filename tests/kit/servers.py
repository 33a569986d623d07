"""Real servers, each in its own process."""

import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kit.commands import CONSUMER, PRODUCER, uvicorn_command
from tests.kit.forked import Forked
from tests.kit.ports import free_port
from tests.kit.redis import shared_redis
from tests.kit.root import ROOT
from tests.kit.waiting import SLOWNESS, TIMEOUT, wait_for

# A shell ignores SIGINT for what it runs in the background (`pytest &`), and so would every process started
# here, which inherits that: no Ctrl+C would reach the servers.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Yours(list[str]):
    """The command that starts the server of --server, or the URL of one that runs already."""

    def __init__(
        self, command: list[str], folder: Path, producer_path: str, consumer_path: str, port: int | None
    ) -> None:
        super().__init__(command)
        self.folder = folder
        self.paths = {PRODUCER: producer_path, CONSUMER: consumer_path}
        self.port = port


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
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = env or {}
        with_redis = any(
            word.endswith((".redis_server:app", ".log_redis_server:app", ".partitioned_server:app"))
            for word in command
        )
        if with_redis and "REDIS_URL" not in env:
            env = {**env, "REDIS_URL": shared_redis().url()}  # a database, and so a queue, of its own
        command, env = [*command, str(self.port)], {**os.environ, **env}
        self.process: subprocess.Popen[bytes] | Forked
        # In a session of its own, and so a process group, for what Ctrl+C does in a terminal.
        if command[:3] == uvicorn_command("")[:3] and "--workers" not in command and not self.yours:
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
            # Open it again: the server shares our file position, so seeking would move the server's, too.
            self._logged = Path(f"/proc/self/fd/{self._log.fileno()}").read_text(errors="replace")
        return self._logged

    def wait_ready(self) -> None:
        """Return once it accepts connections. Raise AssertionError with its log if it never does."""

        def accepts() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                return False
            return True

        try:
            wait_for(accepts, f"the server to accept connections on port {self.port}")
        except AssertionError as error:
            if self.process.poll() is not None:
                raise
            why = str(error).partition("\nassert ")[0]
            raise AssertionError(f"{why}\n{self.log[-2000:]}") from None

    def get(self, path: str) -> tuple[int, str, str]:
        """Return status, content type and body of a page."""
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
        if not self.yours:
            status = self.get("/stats")[0]
            assert status != 503, "GET /stats: 503, so nobody knows whether its consumers acknowledge"
            return status == 200
        with suppress(OSError, HTTPException, ValueError):
            status, _, body = self.get("/stats")
            stats = json.loads(body)
            if status == 200 and isinstance(stats, dict):
                types = {name: type(stats.get(name)) for name in ("queued", "capacity", "acks")}
                return types == {"queued": int, "capacity": int, "acks": bool}
        return False

    @cached_property
    def acks(self) -> bool:
        """Whether its consumers acknowledge payloads. Without /stats, they do not."""
        return self.has_stats and bool(self.stats()["acks"])

    def processes(self) -> list[psutil.Process]:
        """Return its process and all that it started, even those whose parent has ended."""
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
        """Return the ports of the clients whose connections it holds, even if they have left.

        It cannot see a connection that was reset: the kernel forgets it before the server notices.
        """
        return set(self.sockets())

    def open_sockets(self) -> set[int]:
        """Return the inodes of the sockets that its processes have open."""
        inodes = set()
        for process in self.processes():
            with suppress(OSError):
                for link in Path(f"/proc/{process.pid}/fd").iterdir():
                    with suppress(OSError):
                        kind, _, number = str(link.readlink()).partition(":")
                        if kind == "socket":
                            inodes.add(int(number.strip("[]")))
        return inodes

    def sockets(self) -> dict[int, int]:
        """Return the inodes of its sockets, by the ports of the clients."""
        # As `ss` asks the kernel (sock_diag(7)); /proc/net/tcp, with all that time out, takes 20 ms to read.
        states = 0xFFF ^ 1 << 6 ^ 1 << 10  # all but those that time out, and those that listen
        request = struct.pack("=BBxxI", socket.AF_INET, socket.IPPROTO_TCP, states)
        request += struct.pack("!H", self.port) + bytes(38) + b"\xff" * 8
        header = struct.pack(
            "=IHHII", 16 + len(request), 20, 0x301, 0, 0
        )  # SOCK_DIAG_BY_FAMILY: request, dump
        inodes: dict[int, int] = {}
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:
            kernel.send(header + request)
            while answers := kernel.recv(2**20):
                while answers:
                    size, kind = struct.unpack_from("=IH", answers)
                    if kind == 3:  # the end
                        return inodes
                    assert kind == 20, f"an error of sock_diag: {answers!r}"
                    port, inode = (
                        struct.unpack_from("!H", answers, 22)[0],
                        struct.unpack_from("=I", answers, 84)[0],
                    )
                    if inode:  # else no process has it any more
                        inodes[port] = inode
                    answers = answers[size:]
        return inodes

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send SIGINT as a terminal does, to the whole process group; other signals as `kill` does."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ends_within(self, seconds: float) -> float | None:
        """Return how many seconds it took to end, or None if it did not end in time."""
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


def tracebacks(log: str) -> int:
    """Count the tracebacks in a log. If `"Traceback" not in log` fails, pytest takes minutes to say why."""
    return log.count("Traceback")


@contextmanager
def running(
    command: list[str], port: int | None = None, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, wait until it accepts connections, and kill it in the end."""
    if isinstance(command, Yours) and command.port:
        server: Server = Running(command)
    else:
        server = Server(command, port, env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def busy(server: Server, seconds: float) -> float:
    """Return the share of one core that the server uses."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in server.processes())

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds
