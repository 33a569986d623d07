"""What a client may do to every server without harm to other clients, to the log or to the shutdown."""

import asyncio
import base64
import os
import signal
import socket
import struct
import sys
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.typing import Origin

from tests.checks import end
from tests.kit.clients import (
    client,
    consumer,
    consumer_path,
    gone,
    narrow,
    numbered,
    produce,
    settled,
    until_its_socket_is_full,
    vanish,
    write,
)
from tests.kit.commands import ACKING, CONSUMER, PRODUCER, SERVERS, uvicorn_command, with_options
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

MIB = 1024 * 1024
OPTIONS = ["--ws-per-message-deflate", "false", "--ws-max-size", str(MIB)]
OPTIONS += ["--ws", "lessons.robust_protocol:Protocol"]
ENDING = 3  # seconds: one that --timeout-graceful-shutdown gives a client that does not read, and some


# rooms_server.py has the endpoints of server.py.
TESTED = [name for name in SERVERS if name != "rooms_server.py"]
WITH_A_PAGE = [name for name in TESTED if name != "gateway_server.py"]


@pytest.fixture(scope="module", params=TESTED)
def command(request: pytest.FixtureRequest) -> list[str]:
    """The command of each server in turn, with OPTIONS, or with those of the environment."""
    options = os.environ["HOSTILE_OPTIONS"].split() if "HOSTILE_OPTIONS" in os.environ else OPTIONS
    if request.param == "multiproc_server.py":  # which never compresses
        options = [word for word in options if word not in OPTIONS[:2]]
    return with_options(SERVERS[request.param], *options)


@pytest.fixture(scope="module")
def shared(command: list[str]) -> Iterator[Server]:
    """Not the one of conftest.py, which other tests share and which runs without the options."""
    with running(command) as server:
        yield server


class RawClient:
    """A websocket client that sends exactly the bytes that a test wants."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer

    async def shake_hands(self, path: str, headers: str = "") -> str:
        """Send a handshake and return the status line of the answer. Raises TimeoutError without one."""
        key = base64.b64encode(os.urandom(16)).decode()
        request = f"GET {self.server.path(path)} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        request += "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        request += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
        self.writer.write(request.encode())
        async with asyncio.timeout(TIMEOUT / 3):
            answer = await self.reader.readuntil(b"\r\n\r\n")
        return answer.partition(b"\r\n")[0].decode()

    def send(self, opcode: Opcode, data: bytes, fin: bool = True) -> None:
        self.writer.write(Frame(opcode, data, fin).serialize(mask=True))

    async def close_frame(self) -> Close:
        """Return the close frame that comes, after whatever else comes. There must be one."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                first, length = await self.reader.readexactly(2)
                if length == 126:
                    (length,) = struct.unpack("!H", await self.reader.readexactly(2))
                elif length == 127:
                    (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
                data = await self.reader.readexactly(length)
                if first & 0x0F == Opcode.CLOSE:
                    return Close.parse(data)


@asynccontextmanager
async def raw_client(server: Server, sock: socket.socket | None = None) -> AsyncIterator[RawClient]:
    """A connection to the server. With `sock`, a small one, it stops reading when 64 kB have come."""
    if sock:
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield RawClient(server, reader, writer)
    finally:
        writer.transport.abort()


# Large handshakes

LARGE_HANDSHAKES = {
    "a request line of 9 kB": ("?topic=" + "x" * 9000, ""),
    "a cookie of 9 kB": ("", f"Cookie: session={'x' * 9000}\r\n"),
    "a token of 9 kB as a subprotocol": ("", f"Sec-WebSocket-Protocol: bearer, {'x' * 9000}\r\n"),
    "a cookie of 100 kB": ("", f"Cookie: session={'x' * 100_000}\r\n"),
    "200 headers": ("", "".join(f"X-{number}: x\r\n" for number in range(200))),
}


@pytest.mark.parametrize("large", LARGE_HANDSHAKES)
async def test_a_large_handshake_gets_an_answer(server: Server, large: str) -> None:
    """The server lets the client in, or says which part of its request is too large."""
    query, headers = LARGE_HANDSHAKES[large]
    async with raw_client(server) as raw:
        status = await raw.shake_hands(PRODUCER + query, headers)
    assert status.split()[1] in ("101", "400", "414", "431")


async def test_ctrl_c_works_while_the_sender_of_a_large_handshake_is_connected(fresh: Server) -> None:
    """The server ends without a traceback, and tells other clients with 1012."""
    query, headers = LARGE_HANDSHAKES["a cookie of 9 kB"]
    async with client(fresh, CONSUMER) as bystander, raw_client(fresh) as raw:
        with suppress(TimeoutError):
            await raw.shake_hands(PRODUCER + query, headers)
        assert await end(fresh, signal.SIGINT, ENDING) == 0
        await bystander.wait_closed()
        assert bystander.close_code == 1012


@pytest.mark.parametrize("script", ["server.py", "lessons/gateway_server.py"])
async def test_a_script_accepts_large_cookies(script: str) -> None:
    """The scripts raise the limit of websockets, which would not answer."""
    behind = [sys.executable, "server.py", "--port"]
    with running(behind) as upstream:
        command = [sys.executable, script, "--port"]
        with running(command, env={"UPSTREAM": upstream.url("")}) as server:
            async with raw_client(server) as raw:
                status = await raw.shake_hands(PRODUCER, LARGE_HANDSHAKES["a cookie of 9 kB"][1])
            assert status.split()[1] == "101"


# Full sockets


async def test_ctrl_c_works_after_a_consumer_that_does_not_read_has_sent_a_close_frame(fresh: Server) -> None:
    """Its socket is full, so uvicorn's answer to the close frame waits. Others are told with 1012."""
    payloads = numbered(300, 50_000)
    async with AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(client(fresh, PRODUCER))
        stuck = await stack.enter_async_context(consumer(fresh, 200, sock=narrow(fresh), max_queue=1))
        await produce(fresh, payloads)
        queued = await settled(fresh)
        assert 0 < queued < len(payloads)
        stuck.websocket.transport.write(Frame(Opcode.CLOSE, Close(1000, "").serialize()).serialize(mask=True))
        left = len(payloads) if fresh.acks else queued + 1
        await until(lambda: fresh.queued() == left, "the server to read the close frame")
        assert await end(fresh, signal.SIGINT, ENDING) == left
        await bystander.wait_closed()
        assert bystander.close_code == 1012
        stuck.websocket.transport.abort()


async def test_ctrl_c_works_while_producers_that_do_not_read_are_refused(fresh: Server) -> None:
    """Eight producers send 1 to 8 payloads of 1 MB and then bad JSON, and read nothing.

    At the first whose echoes fill the socket, close() has to wait.
    """
    payload = numbered(1, 1_000_000)[0]
    async with AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(client(fresh, PRODUCER))
        for count in range(1, 9):
            producer = await stack.enter_async_context(
                client(fresh, PRODUCER, sock=narrow(fresh), max_queue=1)
            )
            stack.callback(producer.transport.abort)
            write(producer, [payload] * count + ["{nonsense"])
        await until(lambda: "closed with 1007" in fresh.log, "the server to refuse the first")
        await settled(fresh)
        await end(fresh, signal.SIGINT, ENDING)
        await bystander.wait_closed()
        assert bystander.close_code == 1012


@pytest.mark.parametrize("command", ACKING, indirect=True)
async def test_ctrl_c_works_while_a_consumer_that_does_not_read_is_refused(fresh: Server) -> None:
    """With acknowledgements: it has many payloads, does not read, and sends something else."""
    payloads = numbered(300, 50_000)
    async with AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(client(fresh, PRODUCER))
        stuck = await stack.enter_async_context(consumer(fresh, 1000, sock=narrow(fresh), max_queue=1))
        await produce(fresh, payloads)
        await settled(fresh)
        stuck.websocket.transport.write(Frame(Opcode.TEXT, b"done").serialize(mask=True))
        await until(lambda: "closed with 1008" in fresh.log, "the server to refuse it")
        assert await end(fresh, signal.SIGINT, ENDING) == len(payloads)
        await bystander.wait_closed()
        assert bystander.close_code == 1012
        stuck.websocket.transport.abort()


# Frames that uvicorn refuses by itself

NOT_UTF8 = b'"\xff\xfe"'


@pytest.mark.parametrize("path", [PRODUCER, CONSUMER])
async def test_text_that_is_not_utf8_is_refused_with_a_reason(server: Server, path: str) -> None:
    """The client gets 1007 and a reason, and the log one line."""
    mark = len(server.log)
    async with raw_client(server) as raw:
        assert "101" in await raw.shake_hands(path)
        raw.send(Opcode.TEXT, NOT_UTF8)
        closed = await raw.close_frame()
    assert closed.code == 1007
    assert "UTF-8" in closed.reason
    log = server.log[mark:]
    assert tracebacks(log) == 0
    lines = [line for line in log.splitlines() if not line.startswith("INFO:")]
    assert len(lines) == 1
    assert f"closed with 1007: {closed.reason}" in lines[0]


@pytest.mark.parametrize("size", [2 * MIB, 20 * MIB], ids=["2 MiB", "20 MiB"])
async def test_a_message_over_the_limit_is_refused_with_a_reason(server: Server, size: int) -> None:
    """The client, which is still sending, sees 1009 and the reason, and not a TCP reset."""
    mark = len(server.log)
    async with client(server, PRODUCER) as producer:
        with suppress(ConnectionClosed):
            await producer.send("x" * size)
        await producer.wait_closed()
        assert producer.close_code == 1009
        assert producer.close_reason
        assert str(MIB) in producer.close_reason
    assert f"closed with 1009: {producer.close_reason}" in server.log[mark:]


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
async def test_messages_that_never_end_fill_no_memory(server: Server, compressed: bool) -> None:
    """Fifty clients each send 15 MiB of a message and no end. Memory grows by less than 150 MB."""
    data, headers = b"x" * 15 * MIB, ""
    if compressed:
        compressor = zlib.compressobj(wbits=-12)
        data = (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
        headers = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
    before = server.rss()
    async with AsyncExitStack() as stack:
        for _ in range(50):
            raw = await stack.enter_async_context(raw_client(server))
            assert "101" in await raw.shake_hands(PRODUCER, headers)
            frame = bytearray(Frame(Opcode.TEXT, data, fin=False).serialize(mask=True))
            frame[0] |= 0x40 * compressed  # the bit that marks a compressed message
            raw.writer.write(frame)
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(TIMEOUT):
                    await raw.writer.drain()
        await produce(server, ['"a sign that the server has read all"'])
        assert server.rss() - before < 150_000_000


async def test_a_flood_of_pings_fills_no_memory(server: Server) -> None:
    """A client sends 50 MB of pings and reads no pong. The server's memory grows by less than 20 MB."""
    pings = Frame(Opcode.PING, b"x" * 119).serialize(mask=True) * 8000  # 1 MB
    async with raw_client(server, narrow(server)) as raw:
        assert "101" in await raw.shake_hands(PRODUCER)
        before = most = server.rss()
        for _ in range(50):
            raw.writer.write(pings)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await raw.writer.drain()
            except (TimeoutError, OSError):
                break  # the server reads no more, or has closed the connection
            most = max(most, server.rss())
        assert most - before < 20_000_000
    await produce(server, ['"after"'])


# Shutdown


async def read_to_the_end(websocket: ClientConnection) -> int:
    """Read until the connection ends. Return how many frames came."""
    count = 0
    with suppress(ConnectionClosed):
        async for _ in websocket:
            count += 1
    return count


async def test_producers_that_are_sending_see_no_reset_at_a_shutdown(fresh: Server) -> None:
    """Ctrl+C with much to read from two producers: both read 1012 and then the end, not a TCP reset."""
    frames = b"".join(Frame(Opcode.TEXT, text.encode()).serialize(mask=True) for text in numbered(8000, 1000))
    async with AsyncExitStack() as stack:
        producers = [await stack.enter_async_context(raw_client(fresh)) for _ in range(2)]
        for producer in producers:
            assert "101" in await producer.shake_hands(PRODUCER)
        os.killpg(fresh.process.pid, signal.SIGSTOP)  # so that there is much to read when it stops
        for producer in producers:
            producer.writer.write(frames)
        fresh.interrupt()
        os.killpg(fresh.process.pid, signal.SIGCONT)
        for producer in producers:
            assert (await producer.close_frame()).code == 1012
            producer.send(Opcode.CLOSE, Close(1012, "").serialize())
            async with asyncio.timeout(TIMEOUT):
                assert await producer.reader.read() == b""
        assert fresh.ends_within(ENDING) is not None
        assert tracebacks(fresh.log) == 0


# Busy consumers


async def lost_by_a_busy_consumer(server: Server, **options: object) -> int:
    """1,500 payloads come to a consumer that works 1 ms on each and connects again when closed.

    Returns how many never arrive.
    """
    # Large enough, because asyncio reads up to 256 KiB at once, and websockets looks for a pong in all of it.
    payloads = numbered(1500, 1000)
    received: set[str] = set()

    async def work() -> None:
        while True:
            async with consumer(server, 1000, max_queue=16, close_timeout=0.1, **options) as taker:
                with suppress(ConnectionClosed):
                    while True:
                        received.add(await taker.payload())
                        await asyncio.sleep(0.001 * SLOWNESS)

    working = asyncio.create_task(work())
    for start in range(0, len(payloads), 500):
        await until(lambda: server.queued() < 400, "room")
        await produce(server, payloads[start : start + 500])
    size, quiet = -1, 0
    while quiet < 5:
        await asyncio.sleep(0.2 * SLOWNESS)
        quiet = quiet + 1 if size == len(received) and server.queued() == 0 else 0
        size = len(received)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return len(payloads) - len(received)


IMPATIENT = {"ping_interval": 0.2 * SLOWNESS, "ping_timeout": 0.3 * SLOWNESS}  # websockets': 20 s, 20 s


async def test_a_busy_consumer_that_expects_its_pongs_loses_payloads() -> None:
    """The pong waits behind the payloads, so the client closes with payloads in its socket."""
    with running(SERVERS["server.py"]) as server:
        assert await lost_by_a_busy_consumer(server, **IMPATIENT) > 100


async def test_a_busy_consumer_loses_nothing_without_a_ping_timeout(server: Server) -> None:
    """It sends pings as often, but does not close because a pong is late."""
    patient = {**IMPATIENT, "ping_timeout": None}
    assert await lost_by_a_busy_consumer(server, **patient) == 0


async def test_a_busy_consumer_that_acknowledges_loses_nothing() -> None:
    """It closes as often, but its unacknowledged payloads come again."""
    with running(SERVERS["ack_server.py"]) as server:
        assert await lost_by_a_busy_consumer(server, **IMPATIENT) == 0


# Connections


@pytest.mark.parametrize(
    "command", [with_options(SERVERS["server.py"], *OPTIONS, "--limit-concurrency", "20")]
)
async def test_a_limit_of_connections_holds_for_websockets(command: list[str]) -> None:
    """The next client gets HTTP 503. If a client leaves, there is a place again."""
    with running(command) as server:
        async with AsyncExitStack() as stack:
            taken = [await stack.enter_async_context(client(server, CONSUMER)) for _ in range(20)]
            with pytest.raises(InvalidStatus, match="503"):
                await connect(server.url(CONSUMER), proxy=None)
            assert "refused: there are 20 others" in server.log
            await taken[0].close()
            # The place is free when the server's endpoint has returned, a little after the close.
            async with asyncio.timeout(TIMEOUT):
                while True:
                    with suppress(InvalidStatus):
                        await stack.enter_async_context(client(server, CONSUMER))
                        break
                    await asyncio.sleep(0.01)


# Requests


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("lessons.auth_server", "/token"),
        ("lessons.limits_server", "/token"),
        ("lessons.log_server", "/jobs"),
        ("lessons.typed_server", "/boards/news"),
        ("tests.examples.auth_limits", "/token"),
        ("tests.examples.auth_pubsub", "/token"),
    ],
)
async def test_half_a_request_leaves_no_traceback(module: str, path: str, stops: bool) -> None:
    """The client leaves, or the server stops, before the body is complete.

    FastAPI reads the body of a POST before it calls a dependency, which could catch an exception.
    """
    with running(uvicorn_command(f"{module}:app")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        writer.write(head.encode() + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\nx")
        # The server says 100 when it begins to read.
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        if not stops:
            writer.close()
            await gone(server, {writer.get_extra_info("sockname")[1]})
        server.interrupt()
        assert await asyncio.to_thread(server.ends_within, ENDING) is not None
        if stops:
            assert b"HTTP/1.1 50" in await reader.read()
            writer.close()
        assert tracebacks(server.log) == 0, server.log


# Pages


async def test_a_page_by_another_name_of_this_host_is_told_what_to_do(server: Server) -> None:
    """A page at localhost may not connect to 127.0.0.1, and the log says which address to open."""
    origin = f"http://localhost:{server.port}"
    with pytest.raises(InvalidStatus, match="403"):
        await connect(server.url(CONSUMER), proxy=None, origin=Origin(origin))
    line = f"a page from {origin} may not connect to 127.0.0.1:{server.port}: open the page at that address"
    assert line in server.log


@pytest.mark.parametrize("command", WITH_A_PAGE, indirect=True)
def test_no_other_site_can_show_the_page_in_a_frame(server: Server) -> None:
    """Only a header can say so: browsers ignore `frame-ancestors` in a page's own meta element."""
    with urllib.request.urlopen(server.url("/", "http")) as response:
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["server.py", "ack_server.py", "redis_server.py"])
async def test_uvicorns_older_protocol_cancels_a_consumer_without_a_traceback(name: str) -> None:
    """With `--ws websockets`, uvicorn cancels the endpoint of a consumer that does not read its payloads."""
    with running(with_options(SERVERS[name], "--ws", "websockets")) as server:
        path = consumer_path(server, 300)
        async with client(server, path, sock=narrow(server), max_queue=1) as websocket:
            await produce(server, numbered(300, 50_000))
            await until_its_socket_is_full(server, websocket)
            server.interrupt()
            await until(lambda: "Cancel 1 running task(s)" in server.log, "uvicorn to cancel the endpoint")
            await vanish(websocket)
        assert await asyncio.to_thread(server.ends_within, 20) is not None
        assert "CancelledError" not in server.log, server.log
