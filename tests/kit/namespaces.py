"""Give a test its own network and its own list of processes, and a network cable to pull (Linux only)."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from tests.kit.redis import redis_executable
from tests.kit.root import ROOT
from tests.kit.waiting import wait_for

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
    """Make a place with ports and a list of processes of its own, for enter().

    Yields the id of a process there. If the system has no such places, yields None, and a lock keeps other
    tests out.
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
    """Return the words that go before a command, so that it runs in a place of alone()."""
    return [] if place is None else [*ENTER, str(place), "setsid"]


def interrupt(process: subprocess.Popen[str], place: int | None) -> None:
    """Press Ctrl+C for a command in a place of alone(), and for all that it started, as in a terminal."""
    started = psutil.Process(process.pid)
    if place is not None:
        [started] = started.children()  # what nsenter waits for; it would end before that has
    os.killpg(started.pid, signal.SIGINT)


OTHER_NETWORK = ["nsenter", "--net", "--target"]


def run(*command: str) -> None:
    subprocess.run(command, check=True)


class Cable:
    """A second network, at the other end of a cable that can be pulled. Pulled, it drops all packets."""

    def __init__(self) -> None:
        run(sys.executable, "-c", LOOPBACK_UP)
        run("ip", "link", "add", "here", "type", "veth", "peer", "name", "there")
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{self.holder.pid}/ns/net")
        wait_for(lambda: ours.readlink() != theirs.readlink(), "a second network")
        run("ip", "link", "set", "there", "netns", str(self.holder.pid))
        run("ip", "address", "add", "10.9.0.1/24", "dev", "here")
        run("ip", "link", "set", "here", "up")
        self.there("ip", "address", "add", "10.9.0.2/24", "dev", "there")
        self.plug()
        self.processes = [self.holder]

    def place(self) -> list[str]:
        """Return the words that go before a command, so that it runs at the other end."""
        return [*OTHER_NETWORK, str(self.holder.pid)]

    def there(self, *command: str) -> None:
        run(*self.place(), *command)

    def start_redis(self, folder: str) -> None:
        options = ["--bind", "10.9.0.2", "--protected-mode", "no", "--save", "", "--dir", folder]
        command = [*self.place(), redis_executable(), *options]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def plug(self) -> None:
        self.there("ip", "link", "set", "there", "up")

    def pull(self) -> None:
        self.there("ip", "link", "set", "there", "down")

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@cache
def has_cables() -> bool:
    """Whether this system gives a process networks of its own, with a cable between them."""
    add = ["ip", "link", "add", "here", "type", "veth", "peer", "name", "there"]
    return bool(
        isolates() and shutil.which("ip") and subprocess.call([*ALONE, *add], stderr=subprocess.DEVNULL) == 0
    )
