"""The project's two clients, run as commands."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import IO

from tests.kit.commands import CONSUMER, PRODUCER
from tests.kit.root import ROOT
from tests.kit.waiting import TIMEOUT, until

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


class Script:
    """A client script that runs, and what it has printed so far."""

    def __init__(
        self,
        url: str,
        *options: str,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        piped: bool = False,
        place: Sequence[str] = (),
    ) -> None:
        """Start the client for the path in the URL. Its output goes to a file or, if `piped`, to a pipe.

        `place` goes before the command, to run it elsewhere.
        """
        path = CONSUMER if CONSUMER in url else PRODUCER
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*place, sys.executable, SCRIPTS[path], "--url", url, *options],
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
        """What it has printed on standard error, except for the first line of a consumer."""
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
        """Return what it has printed, as soon as that is `count` lines."""
        await until(lambda: self.out.count("\n") >= count, f"{count} lines; stderr:\n{self.err}")
        return self.lines

    async def waits(self) -> None:
        """Wait until it is connected and waits for payloads."""
        await until(lambda: WAITING.encode() in os.pread(self._err.fileno(), 2**30, 0), WAITING)

    async def says(self, text: str) -> None:
        """Wait until it says that on standard error."""
        await until(lambda: text in self.err, text)

    async def ends(self, timeout: float = TIMEOUT) -> int:  # noqa: ASYNC109
        """Wait until it ends. Returns its exit code."""
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
