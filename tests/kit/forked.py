"""Start servers ten times as fast, in processes that have already imported uvicorn.

multiprocessing's fork server forks the processes. After that, they behave like `python -m uvicorn`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTED = [
    "fastapi.responses", "redis.asyncio", "uvicorn.lifespan.on", "uvicorn.loops.auto", "uvicorn.main",
    "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.websockets_sansio_impl",
    "websockets.asyncio.client",
]  # fmt: skip
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


def main(command: list[str], cwd: Path, env: dict[str, str], output: str) -> None:
    """What is run in the new process."""
    os.setsid()
    os.chdir(cwd)
    sys.path[:] = ["", *(path for path in sys.path if path not in ("", str(cwd)))]  # as with `python -m`
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY)
    for number in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(file, number)
    sys.argv = command[2:]

    from uvicorn.main import main

    main()


class Forked:
    """A process of `python -m uvicorn ...`, with what the tests use of Popen."""

    def __init__(self, command: Sequence[str], cwd: Path, env: dict[str, str], output: str) -> None:
        self.args = command
        self._process = context.Process(target=main, args=(list(command), cwd, env, output))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
