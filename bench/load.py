"""The load: producers that send ahead, consumers, and a record of what is missing."""

import asyncio
import gc
import itertools
import re
import statistics
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

AHEAD = 64  # payloads in flight for each producer: fewer than a server queues, so none has to wait
SECONDS = 0.3  # for which payloads are sent
START = 20  # seconds that a server has to accept connections, and to be idle after that
STALL = 5  # seconds without an arrival or an echo, after which what is missing never comes
OFFER = "permessage-deflate; client_max_window_bits"  # what browsers send
END = b"\x00\x00\xff\xff"  # of each compressed message, not sent
LINGER = 0.1  # seconds in which a payload that comes twice would come again
TICK = 0.01  # seconds of CPU, the operating system's unit: a run should take 30 and more


class Failed(Exception):
    """A server did not do the work; the message says what was wrong."""


class Connection(WSListener):
    """A producer's or a consumer's websocket."""

    path = "/ws/{role}"

    def __init__(self, load: "Load", role: str) -> None:
        self.load, self.role = load, role
        self.ready = asyncio.Event()
        self.unechoed: deque[bytes] = deque()  # what a producer has sent and not got back
        self.transport: WSTransport
        # For compression, if the client offers it and the server agrees.
        self.deflate: Any = None
        self.inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    async def connect(self, deflate: bool) -> None:
        url = f"ws://127.0.0.1:{self.load.port}" + self.path.format(role=self.role)
        offer = {"Sec-WebSocket-Extensions": OFFER} if deflate else {}
        self.transport, _ = await ws_connect(
            lambda: self, url, websocket_handshake_timeout=STALL, extra_headers=offer
        )
        async with asyncio.timeout(STALL):
            await self.ready.wait()

    def send(self, payload: bytes) -> None:
        if self.deflate:
            payload = self.deflate.compress(payload) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
            # The end of each message is implied (RFC 7692, section 7.2.1).
            self.transport.send(WSMsgType.TEXT, payload.removesuffix(END), rsv1=True)
        else:
            self.transport.send(WSMsgType.TEXT, payload)

    def heard(self, payload: bytes) -> None:
        if self.role == "producer":
            self.load.echoed(self, payload)
        else:
            self.load.arrived(self, payload)

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        answer = transport.response.headers.get("Sec-WebSocket-Extensions", "")
        if "permessage-deflate" in answer:
            bits = re.search(r"client_max_window_bits=(\d+)", answer)
            window = int(bits[1]) if bits else zlib.MAX_WBITS
            self.deflate = zlib.compressobj(wbits=-window)
        self.ready.set()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            payload = frame.get_payload_as_bytes()
            if frame.rsv1:
                payload = self.inflate.decompress(payload + END)
            self.heard(payload)
        elif frame.msg_type == WSMsgType.CLOSE:
            reason = (frame.get_close_message() or b"").decode()
            self.load.fail(f"a {self.role} was closed: {frame.get_close_code()} {reason}")

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.load.fail(f"a {self.role} lost its connection")


class Acknowledging(Connection):
    """The same for a server that waits for acknowledgements."""

    path = "/ws/{role}?prefetch=64"

    def heard(self, payload: bytes) -> None:
        if self.role == "consumer":
            super().send(b"ack")
        super().heard(payload)


class SocketIO(Connection):
    """The same in Socket.IO's frames: greeting, events, heartbeats. Its own client would be too slow."""

    path = "/socket.io/?EIO=4&transport=websocket&role={role}"
    event = b'42["payload",'

    def send(self, payload: bytes) -> None:
        super().send(self.event + payload + b"]")

    def heard(self, payload: bytes) -> None:
        if payload.startswith(self.event):
            super().heard(payload[len(self.event) : -1])
        elif payload.startswith(b"40"):
            self.ready.set()
        elif answer := {b"0": b"40", b"2": b"3"}.get(payload[:1]):
            super().send(answer)

    def on_ws_connected(self, transport: WSTransport) -> None:
        super().on_ws_connected(transport)
        self.ready.clear()  # until the server has greeted


@dataclass(frozen=True)
class Server:
    name: str
    command: Sequence[str]  # a port is appended
    uvloop: bool = False
    connection: type[Connection] = Connection
    package: str = ""  # which a peer needs
    load: "type[Load] | None" = None  # another than Load


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    payloads: int  # in a round, where they can be sent within SECONDS
    producers: int = 1
    consumers: int = 1
    size: int = 85  # bytes of a payload
    ahead: int = AHEAD
    deflate: bool = False  # clients offer compression

    def count(self, scale: float) -> int:
        return max(10, int(self.payloads * scale))


class Load:
    """The clients of one server: producers that send ahead, consumers, and a record of what is missing."""

    def __init__(self, server: Server, port: int, pid: int) -> None:
        self.server, self.port, self.pid = server, port, pid
        self.connections: dict[str, list[Connection]] = {"producer": [], "consumer": []}
        self.numbers = itertools.count(1_000_000)
        self.failure = ""
        self.begin(Work("", "", 0), [])

    def begin(self, work: Work, payloads: list[bytes]) -> None:
        self.work, self.payloads, self.missing = work, payloads, set(payloads)
        self.sent = self.echoes = 0
        self.began = time.perf_counter()
        self.latencies: list[float] = []
        self.turns = itertools.cycle(self.connections["producer"][: work.producers])
        self.done = asyncio.get_running_loop().create_future()

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        if not self.done.done():
            self.done.set_result(None)

    def arrived(self, consumer: Connection, payload: bytes) -> None:
        if payload not in self.missing:
            return self.fail(f"came twice, or was never sent: {payload[:80]!r}")
        self.missing.remove(payload)
        if self.work.ahead == 1:
            self.latencies.append(time.perf_counter() - self.sent_at)
        self.advance()

    def echoed(self, producer: Connection, payload: bytes) -> None:
        if not producer.unechoed or producer.unechoed.popleft() != payload:
            return self.fail(f"not the next echo: {payload[:80]!r}")
        self.echoes += 1
        self.advance()

    def advance(self) -> None:
        """Send as many payloads as may be in flight. If all have arrived, say so."""
        if self.done.done():
            return
        if self.sent < len(self.payloads) and time.perf_counter() > self.began + SECONDS:
            self.missing.difference_update(self.payloads[self.sent :])
            del self.payloads[self.sent :]
        finished = min(self.echoes, len(self.payloads) - len(self.missing))
        if finished == len(self.payloads):
            self.ended = time.perf_counter()
            self.done.set_result(None)
        else:
            limit = min(len(self.payloads), finished + self.work.ahead * self.work.producers)
            while self.sent < limit:
                producer = next(self.turns)
                payload = self.payloads[self.sent]
                self.sent += 1
                self.sent_at = time.perf_counter()
                producer.unechoed.append(payload)
                producer.send(payload)

    def unfinished(self) -> str:
        unechoed = len(self.payloads) - self.echoes
        return f"of {len(self.payloads)} payloads {len(self.missing)} never arrived, {unechoed} had no echo"

    async def connect(self, role: str, count: int, deflate: bool = False) -> None:
        """Connect more of them, up to `count`; one by one, so that a server's workers share them."""
        connections = self.connections[role]
        while len(connections) < count:
            connection = self.server.connection(self, role)
            try:
                await connection.connect(deflate)
            except (OSError, TimeoutError, WSError) as error:
                raise Failed(f"a {role} cannot connect: {error!r}") from None
            connections.append(connection)

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu(self) -> float:
        """Return the seconds of CPU that the server has used, over all its processes."""
        return sum(cpu_seconds(process) for process in self.processes())

    async def settle(self, seconds: float) -> None:
        """Wait until the server is idle: its workers have started, its connections are made."""
        used, deadline = -1.0, time.monotonic() + START
        while (now := self.cpu()) > used + TICK and time.monotonic() < deadline:
            used = now
            await asyncio.sleep(seconds)

    async def run(self, work: Work, scale: float = 1) -> dict[str, float]:
        """Do the work and return its figures. Raises Failed."""
        await self.connect("producer", work.producers, work.deflate)
        await self.connect("consumer", work.consumers, work.deflate)
        await self.settle(0.1)
        payloads = [payload(next(self.numbers), work.size) for _ in range(work.count(scale))]
        gc.collect()
        cpu, own = self.cpu(), time.process_time()
        self.begin(work, payloads)
        self.advance()
        progress = None
        while not self.done.done() and progress != (progress := (self.echoes, len(self.missing))):
            await asyncio.wait([self.done], timeout=STALL)
        cpu, own = self.cpu() - cpu, time.process_time() - own
        if not self.done.done():
            self.fail(self.unfinished())
        await asyncio.sleep(LINGER)
        if self.failure:
            raise Failed(self.failure)
        figures: dict[str, float] = {
            "payloads": len(payloads),
            "cpu_us": cpu / len(payloads) * 1e6,
            "rate": len(payloads) / (self.ended - self.began),
            "memory_mb": sum(process.memory_info().rss for process in self.processes()) / 1e6,
            "load_busy": own / (self.ended - self.began),
        }
        if self.latencies:
            figures["p50_us"], figures["p99_us"] = (
                statistics.quantiles(self.latencies, n=100)[percent - 1] * 1e6 for percent in (50, 99)
            )
        return figures


def cpu_seconds(process: psutil.Process) -> float:
    """Return a process's CPU time: on Linux in nanoseconds, elsewhere in steps of 10 ms."""
    seconds = 0.0
    try:
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            seconds += int((thread / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return sum(process.cpu_times()[:2])
    return seconds


def payload(number: int, size: int) -> bytes:
    """JSON that a server which parses and writes it again does not change."""
    head = f'{{"timestamp":1700000000.123,"value":{number},"text":"'
    return (head + "x" * (size - len(head) - 2) + '"}').encode()
