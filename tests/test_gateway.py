"""What lessons/gateway_server.py promises beyond the contract, with upstreams of every kind."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus

import psutil
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from tests.checks import MIB, fails
from tests.kit.clients import client, narrow, receive, reset, vanish
from tests.kit.commands import uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.ports import free_port
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

PORT = free_port()  # of the upstream, which each test starts for itself
ENV = {"UPSTREAM": f"ws://127.0.0.1:{PORT}"}
COMMAND = uvicorn_command("lessons.gateway_server:app")
NAIVE = uvicorn_command("lessons.naive.gateway_server:app")
STALL = 0.5 * SLOWNESS  # seconds, instead of 40 or 5, where a test waits for it
IMPATIENT = with_constants("lessons.gateway_server", STALL_TIMEOUT=STALL, OPEN_TIMEOUT=STALL)
PATIENT = with_constants("lessons.gateway_server", OPEN_TIMEOUT=5 * SLOWNESS)  # for many connections at once
SOON = 1 * SLOWNESS  # seconds in which what goes at once has gone
Handler = Callable[[ServerConnection], Awaitable[None]]
Way = Callable[[ClientConnection], Awaitable[None]]


@pytest.fixture(scope="module")
def shared_gateway() -> Iterator[Server]:
    with running(PATIENT, env=ENV) as server:
        yield server


@pytest.fixture
async def gateway(shared_gateway: Server) -> AsyncIterator[Server]:
    """A gateway that must come through the test without a traceback, and keep no connection."""
    mark = len(shared_gateway.log)
    yield shared_gateway
    log = shared_gateway.log[mark:]
    assert tracebacks(log) == 0, log
    assert "ERROR" not in log, log
    await all_gone(shared_gateway)


@pytest.fixture
def own_gateway() -> Iterator[Server]:
    """One that the test may end."""
    with running(COMMAND, env=ENV) as server:
        yield server


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    with running(IMPATIENT, env=ENV) as server:
        yield server


@pytest.fixture(scope="module")
def naive_gateway() -> Iterator[Server]:
    """Tests need not share its connections: those that it keeps do no harm to the next."""
    with running(NAIVE, env=ENV) as server:
        yield server


@asynccontextmanager
async def upstream(handler: Handler, port: int = PORT, **options: object) -> AsyncIterator[None]:
    options = {"compression": None, "max_size": None, "close_timeout": SOON, **options}
    async with serve(handler, "127.0.0.1", port, **options):  # type: ignore[arg-type]
        yield


@asynccontextmanager
async def raw_upstream(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[None]:
    """One that gets the handshake's bytes, and answers what it likes."""
    async with await asyncio.start_server(handler, "127.0.0.1", PORT):
        yield


def held(gateway: Server) -> list[str]:
    """The gateway's connections, to clients and to the upstream."""
    connections = psutil.Process(gateway.process.pid).net_connections("tcp")
    return [str(connection) for connection in connections if connection.status != psutil.CONN_LISTEN]


async def all_gone(gateway: Server) -> None:
    await until(lambda: not held(gateway), "the gateway to let go of everything", 3 * SLOWNESS)


async def echo(websocket: ServerConnection) -> None:
    with suppress(ConnectionClosed):
        async for message in websocket:
            await websocket.send(message)


async def listen(websocket: ServerConnection) -> None:
    await websocket.wait_closed()


class Flood:
    """An upstream that sends 100 kB messages as fast as they are taken, and counts them."""

    sent = 0

    async def __call__(self, websocket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            while True:
                await websocket.send(bytes(100_000))
                self.sent += 1

    async def stalled(self) -> None:
        """Wait until it can send no more."""
        counts: list[int] = []

        def unchanged() -> bool:
            counts.append(self.sent)
            return self.sent > 0 and len(set(counts[-30:])) == 1 and len(counts) > 30

        await until(unchanged, "the flood to stall")


class Told:
    """An upstream that remembers how its connections ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[int | None, str | None]] = []

    async def __call__(self, websocket: ServerConnection) -> None:
        await websocket.wait_closed()
        self.ends.append((websocket.close_code, websocket.close_reason))

    async def end(self) -> tuple[int | None, str | None]:
        await until(lambda: bool(self.ends), "the upstream to be told: not told", SOON)
        return self.ends[0]


# Messages


@pytest.mark.parametrize(
    "message",
    ["text", "é\x00", "", b"\x00\xff", b"", "x" * 16 * MIB],
    ids=["text", "UTF-8", "empty text", "binary", "empty binary", "16 MiB"],
)
@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_a_message_goes_through_both_ways(
    gateway: Server, message: str | bytes, compression: str | None
) -> None:
    """It stays text or binary."""
    async with upstream(echo), client(gateway, "/ws/echo", compression=compression) as websocket:
        await websocket.send(message)
        async with asyncio.timeout(TIMEOUT):
            back = await websocket.recv()
        assert type(back) is type(message)
        assert back == message


async def test_a_message_may_come_in_fragments(gateway: Server) -> None:
    """Either side may send them, and a ping between two of them."""

    async def fragments(websocket: ServerConnection) -> None:
        await websocket.send(["one ", str(await websocket.recv()), " three"])
        await websocket.wait_closed()

    async with upstream(fragments), client(gateway, "/ws/x") as websocket:
        parts = [Frame(Opcode.TEXT, b"t", fin=False), Frame(Opcode.PING, b"?"), Frame(Opcode.CONT, b"wo")]
        websocket.transport.write(b"".join(part.serialize(mask=True) for part in parts))
        assert await receive(websocket) == "one two three"


async def test_both_directions_work_at_once(gateway: Server) -> None:
    """Each side sends 2,000 messages before it reads the first one."""
    messages = [json.dumps(number) for number in range(2000)]
    received: list[str] = []

    async def talk(websocket: ServerConnection) -> None:
        for message in messages:
            await websocket.send(message)
        received.extend([str(await websocket.recv()) for _ in messages])
        await websocket.close()

    async with upstream(talk), client(gateway, "/ws/x") as websocket:
        for message in messages:
            await websocket.send(message)
        assert [await receive(websocket) for _ in messages] == messages
        await websocket.wait_closed()
    assert received == messages


async def test_200_connections_are_open_at_once(gateway: Server) -> None:
    """All are answered."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(upstream(echo))
        opening = [stack.enter_async_context(client(gateway, "/ws/echo")) for _ in range(200)]
        websockets = await asyncio.gather(*opening)
        for number, websocket in enumerate(websockets):
            await websocket.send(str(number))
        answers = await asyncio.gather(*map(receive, websockets))
        assert answers == [str(number) for number in range(200)]
        await asyncio.gather(*(websocket.close() for websocket in websockets))


# The handshake


async def test_the_upstream_gets_path_query_and_chosen_headers(gateway: Server) -> None:
    """The encoding stays. It gets no other header from the client, but the client's address."""
    requests: list[Request] = []

    async def note(websocket: ServerConnection) -> None:
        assert websocket.request
        requests.append(websocket.request)

    path = "/ws/a%2Fb//@c;d=e/%C3%A9?x=1&y=%20%23&z"
    sent = [
        *(("Authorization", "Bearer token"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X-Request-ID", "7")),
        *(("X-Admin", "yes"), ("Origin", gateway.url("", "http"))),
    ]
    async with upstream(note), client(gateway, path, additional_headers=sent) as websocket:
        await websocket.wait_closed()
    [request] = requests
    assert request.path == path
    assert request.headers["Host"] == f"127.0.0.1:{PORT}"
    assert request.headers["Authorization"] == "Bearer token"
    assert request.headers.get_all("Cookie") == ["a=1", "b=2"]
    assert request.headers["X-Request-ID"] == "7"
    assert request.headers["X-Forwarded-For"] == "127.0.0.1"
    assert "X-Admin" not in request.headers
    assert "Origin" not in request.headers
    assert "Sec-WebSocket-Extensions" not in request.headers, "it would compress each message once more"


@pytest.mark.parametrize("base", ["/base", "/base/"])
async def test_the_upstream_may_have_a_path(base: str) -> None:
    """The client's path comes behind it."""
    paths: list[str] = []

    async def note(websocket: ServerConnection) -> None:
        assert websocket.request
        paths.append(websocket.request.path)

    with running(COMMAND, env={"UPSTREAM": ENV["UPSTREAM"] + base}) as gateway:
        async with upstream(note), client(gateway, "/ws/x?y=1") as websocket:
            await websocket.wait_closed()
    assert paths == ["/base/ws/x?y=1"]


async def test_the_gateway_uses_no_proxy() -> None:
    """The upstream is a server of the same network, although other traffic may need a proxy."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    env = {**ENV, "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""}
    with running(COMMAND, env=env) as gateway:
        async with upstream(echo), client(gateway, "/ws/echo") as websocket:
            await websocket.send("1")
            assert await receive(websocket) == "1"


@pytest.mark.parametrize(("known", "chosen"), [(["b", "c"], "b"), ([], None)])
async def test_the_upstream_chooses_the_subprotocol(
    gateway: Server, known: list[str], chosen: str | None
) -> None:
    """It chooses one that the client offers, or none."""
    offered = [Subprotocol(name) for name in "abc"]
    async with (
        upstream(listen, subprotocols=known),
        client(gateway, "/ws/x", subprotocols=offered) as websocket,
    ):
        assert websocket.subprotocol == chosen


async def refusal(gateway: Server, path: str = "/ws/x", **options: object) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with client(gateway, path, **options):
            pass
    response = caught.value.response
    return response.status_code, response.body.decode()


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
async def test_the_upstream_may_refuse_a_client(gateway: Server, status: int) -> None:
    """The client sees its status and its text."""

    def refuse(connection: ServerConnection, _: Request) -> Response:
        return connection.respond(HTTPStatus(status), "no, because")

    async with upstream(listen, process_request=refuse):
        assert await refusal(gateway) == (status, "no, because")


async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def no_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    writer.close()


async def no_websocket(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
    writer.close()


@pytest.mark.parametrize("answer", [hang_up, no_http, no_websocket], ids=lambda answer: answer.__name__)
async def test_an_upstream_that_speaks_no_websocket_is_a_bad_gateway(
    gateway: Server, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> None:
    """The client gets 502 before the handshake."""
    async with raw_upstream(answer):
        assert (await refusal(gateway))[0] == 502


async def test_an_upstream_that_is_not_there_is_a_bad_gateway(gateway: Server) -> None:
    """The client gets 502 before the handshake. Only the log has the address of the upstream."""
    status, why = await refusal(gateway)
    assert (status, why) == (502, "the upstream cannot be reached")
    assert f"WARNING:  {ENV['UPSTREAM']} cannot be reached: " in gateway.log


async def test_an_upstream_that_says_nothing_is_a_timeout(impatient: Server) -> None:
    """The client gets 504 before the handshake."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with raw_upstream(silent):
        assert (await refusal(impatient))[0] == 504
    await all_gone(impatient)


async def test_a_client_may_leave_before_the_upstream_answers(gateway: Server) -> None:
    """The gateway then closes its connection to the upstream."""
    connected, left = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        connected.set()
        with suppress(ConnectionResetError):
            await reader.read()
        left.set()
        writer.close()

    async with raw_upstream(silent):
        opening = asyncio.create_task(refusal(gateway))
        await connected.wait()
        opening.cancel()
        async with asyncio.timeout(SOON):
            await left.wait()


# Only the configured upstream


@pytest.mark.parametrize(
    "target",
    [
        "//EVIL/ws/x",
        "http://EVIL/ws/x",
        "ws://EVIL/ws/x",
        "/ws//EVIL/x",
        "/ws/@EVIL/x",
        "/ws/x?@EVIL/",
        "/ws/\\\\EVIL/x",
        "%2Fws%2F@EVIL/x",
        "%2Fws/@EVIL/x",
        "/ws/#@EVIL/",
        "/ws/http://EVIL/x",
    ],
)
async def test_no_path_leads_elsewhere(gateway: Server, target: str) -> None:
    """Whatever the path is, the TCP connection goes to the configured host and port."""
    elsewhere: list[str] = []

    async def note(websocket: ServerConnection) -> None:
        elsewhere.append(str(websocket.request))

    evil = free_port()
    async with upstream(echo), upstream(note, evil):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        path = target.replace("EVIL", f"localhost:{evil}")
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n".encode())
        writer.write(b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n")
        writer.write(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert (await reader.readline()).split()[1] in (b"101", b"400", b"403", b"502")
        writer.close()
    assert elsewhere == []


async def check_no_redirect_leads_elsewhere(gateway: Server) -> None:
    """The upstream answers with a redirect to another host, and that is not asked."""
    elsewhere: list[str] = []

    async def note(websocket: ServerConnection) -> None:
        elsewhere.append(str(websocket.request))

    evil = free_port()

    def redirect(_: ServerConnection, request: Request) -> Response:
        return Response(302, "Found", Headers({"Location": f"ws://127.0.0.1:{evil}{request.path}"}))

    async with upstream(listen, process_request=redirect), upstream(note, evil):
        with suppress(InvalidStatus):
            async with client(gateway, "/ws/x"):
                await until(lambda: bool(elsewhere), "the redirect to be followed")
    assert elsewhere == [], "led elsewhere"


async def test_no_redirect_leads_elsewhere(gateway: Server) -> None:
    """Unless told otherwise, a client of the websockets library follows redirects to any host."""
    await check_no_redirect_leads_elsewhere(gateway)


@pytest.mark.parametrize("locations", [["/elsewhere"], ["/ws/a", "/ws/b"]], ids=len)
async def test_no_redirect_leads_to_another_path(gateway: Server, locations: list[str]) -> None:
    """The upstream's other paths are not for clients. An answer with two locations makes no sense."""
    asked: list[str] = []

    def redirect(_: ServerConnection, request: Request) -> Response | None:
        asked.append(request.path)
        headers = Headers([("Location", location) for location in locations])
        return Response(302, "Found", headers) if request.path == "/ws/x" else None

    async with upstream(listen, process_request=redirect):
        assert (await refusal(gateway))[0] == 502
    assert asked == ["/ws/x"]


async def test_a_redirect_leads_the_naive_gateway_elsewhere(naive_gateway: Server) -> None:
    """Whoever can make the upstream redirect reaches what the gateway's machine can reach."""
    with fails("led elsewhere"):
        await check_no_redirect_leads_elsewhere(naive_gateway)


@pytest.mark.parametrize("path", ["/ws/../x", "/ws/a/../../x", "/ws/%2e%2e/x", "/ws/..%2Fx", "/ws/.."])
async def test_no_path_leaves_the_path_of_the_upstream(gateway: Server, path: str) -> None:
    """UPSTREAM may have a path. Clients do not reach anything beside it."""
    async with upstream(listen):
        assert (await refusal(gateway, path))[0] == 403


# The end of either side


async def check_the_client_is_told(gateway: Server, code: int, reason: str) -> None:
    """The upstream closes; so does the client's connection, with the same code and reason."""

    async def close(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.close(code, reason)

    async with upstream(close), client(gateway, "/ws/x", close_timeout=0.1) as websocket:
        await websocket.send("close!")
        with suppress(TimeoutError):
            async with asyncio.timeout(SOON):
                await websocket.wait_closed()
        assert websocket.close_code is not None, "the client is not told"
        assert (websocket.close_code, websocket.close_reason) == (code, reason), "another code"


CODES = [
    (1000, ""),
    (1001, "later"),
    (1008, "why"),
    (1011, ""),
    (1012, ""),
    (1013, "full"),
    (3000, ""),
    (4999, "é" * 61),
]


@pytest.mark.parametrize(("code", "reason"), CODES)
async def test_if_the_upstream_closes_the_client_is_told(gateway: Server, code: int, reason: str) -> None:
    """It gets the same code and reason at once."""
    await check_the_client_is_told(gateway, code, reason)


async def test_if_the_upstream_closes_the_naive_gateway_waits_forever(naive_gateway: Server) -> None:
    """gather() waits for the other direction, which waits for a message from the client."""
    with fails("the client is not told"):
        await check_the_client_is_told(naive_gateway, 1000, "")


async def test_a_close_frame_without_a_code_is_a_normal_end(gateway: Server) -> None:
    """1005 means that there was no code, and must not be sent."""

    async def close(websocket: ServerConnection) -> None:
        websocket.transport.write(b"\x88\x00")
        await websocket.wait_closed()

    async with upstream(close), client(gateway, "/ws/x") as websocket:
        async with asyncio.timeout(SOON):
            await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1000, "")


@pytest.mark.parametrize(
    "sent", [b"", b"\x81\x7f\x00\x00\x00\x00\x00\xff\xff\xff half a frame"], ids=["idle", "amid"]
)
async def test_an_upstream_that_dies_is_a_bad_gateway(gateway: Server, sent: bytes) -> None:
    """The client gets 1014, since 1006 must not be sent, even in the middle of a frame."""

    async def die(websocket: ServerConnection) -> None:
        await websocket.recv()
        websocket.transport.write(sent)
        websocket.transport.abort()

    async with upstream(die), client(gateway, "/ws/x") as websocket:
        with suppress(ConnectionClosed):
            async with asyncio.timeout(SOON):
                while True:
                    await websocket.send("x" * 10_000)
        assert (websocket.close_code, websocket.close_reason) == (1014, "the upstream went away")


async def test_an_upstream_that_is_lost_at_once_causes_no_traceback() -> None:
    """If it is lost before websockets begins to send pings, websockets does not stop them."""
    impatient = "from functools import partial; lesson.Connect = partial(lesson.Connect, ping_interval=0.01)"
    command = with_constants("lessons.gateway_server", impatient)
    with running(command, env=ENV) as gateway:
        # The gateway stands still until the connection is lost, and then sees all at once.

        def stop(_: ServerConnection, __: Request) -> None:
            gateway.process.send_signal(signal.SIGSTOP)

        async def ping_and_reset(websocket: ServerConnection) -> None:
            await websocket.ping()
            await reset(websocket)
            gateway.process.send_signal(signal.SIGCONT)

        async with upstream(ping_and_reset, process_request=stop):
            for _ in range(3):
                with suppress(InvalidStatus):
                    async with client(gateway, "/ws/x") as websocket:
                        await websocket.wait_closed()
        await all_gone(gateway)
        await asyncio.sleep(0.1)  # a ping that was not stopped has failed by then
        assert tracebacks(gateway.log) == 0


async def test_a_message_over_the_limit_ends_the_connection(gateway: Server) -> None:
    """The upstream sends more than 16 MiB."""

    async def much(websocket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            await websocket.send(bytes(16 * MIB + 1))
            await websocket.wait_closed()

    async with upstream(much), client(gateway, "/ws/x") as websocket:
        async with asyncio.timeout(TIMEOUT):
            await websocket.wait_closed()
        assert websocket.close_code in (1009, 1014)


async def check_the_upstream_is_told(gateway: Server, code: int, reason: str) -> None:
    """The client closes; so does the connection to the upstream, with the same code and reason."""
    told = Told()
    async with upstream(told):
        async with client(gateway, "/ws/x") as websocket:
            await websocket.close(code, reason)
        assert await told.end() == (code, reason)


@pytest.mark.parametrize(("code", "reason"), CODES)
async def test_if_the_client_closes_the_upstream_is_told(gateway: Server, code: int, reason: str) -> None:
    """It gets the same code and reason at once."""
    await check_the_upstream_is_told(gateway, code, reason)


async def test_if_the_client_closes_the_naive_gateway_waits_forever(naive_gateway: Server) -> None:
    """The upstream keeps sending, so the next payload goes to a consumer that has left."""
    with fails("the upstream to be told"):
        await check_the_upstream_is_told(naive_gateway, 1000, "")


async def half_a_frame(websocket: ClientConnection) -> None:
    websocket.transport.write(b"\x82\xff\x00\x00\x00\x00\x00\x10\x00\x00" + bytes(100_000))
    await reset(websocket)


async def close_without_a_code(websocket: ClientConnection) -> None:
    websocket.transport.write(Frame(Opcode.CLOSE, b"").serialize(mask=True))
    await websocket.wait_closed()


@pytest.mark.parametrize(
    "way", [vanish, reset, half_a_frame, close_without_a_code], ids=lambda way: way.__name__
)
async def test_if_the_client_dies_the_upstream_is_told(gateway: Server, way: Way) -> None:
    """It gets 1011, since 1005 and 1006 must not be sent, even in the middle of a frame."""
    told = Told()
    async with upstream(told):
        async with client(gateway, "/ws/x") as websocket:
            await way(websocket)
        assert await told.end() == (1011, "the client went away")


async def test_an_upstream_that_answers_no_close_frame_is_let_go(gateway: Server) -> None:
    """The gateway waits for the answer, but not for long."""
    release = asyncio.Event()

    async def deaf(websocket: ServerConnection) -> None:
        websocket.transport.pause_reading()
        await release.wait()
        websocket.transport.abort()

    async with upstream(deaf):
        try:
            async with client(gateway, "/ws/x"):
                pass
            await all_gone(gateway)
        finally:
            release.set()


async def test_messages_sent_before_a_close_frame_arrive(gateway: Server) -> None:
    """3 MB and a close frame go in each direction, to a side that reads slowly."""
    messages = [f"{number}".ljust(10_000) for number in range(300)]
    received: list[str] = []

    async def slow(websocket: ServerConnection) -> None:
        for message in messages:
            await websocket.send(message)
        await websocket.close(4000)
        with suppress(ConnectionClosed):
            while True:
                received.append(str(await websocket.recv()))

    async with upstream(slow), client(gateway, "/ws/x", sock=narrow(gateway), max_queue=1) as websocket:
        with suppress(ConnectionClosed):
            while True:
                received.append(str(await websocket.recv()))
                await asyncio.sleep(0.001)
        assert websocket.close_code == 4000
    assert received == messages


# Pressure


async def test_a_client_that_does_not_read_makes_the_upstream_wait(gateway: Server) -> None:
    """The gateway buffers next to nothing. When the client leaves, the upstream is told at once."""
    flood = Flood()
    before = gateway.rss()
    async with upstream(flood), client(gateway, "/ws/x", sock=narrow(gateway), max_queue=1) as websocket:
        await flood.stalled()
        assert gateway.rss() - before < 20 * MIB
        assert flood.sent < 500
        await vanish(websocket)
        await until(lambda: not held(gateway), "the flood's end", SOON)


async def test_an_upstream_that_does_not_read_makes_the_client_wait(gateway: Server) -> None:
    """The gateway buffers next to nothing."""
    release = asyncio.Event()
    received = 0

    async def deaf(websocket: ServerConnection) -> None:
        nonlocal received
        await release.wait()
        with suppress(ConnectionClosed):
            while True:
                await websocket.recv()
                received += 1

    before = gateway.rss()
    async with upstream(deaf, max_queue=1), client(gateway, "/ws/x") as websocket:
        sent = 0
        with suppress(TimeoutError):
            while sent < 1000:
                async with asyncio.timeout(0.3 * SLOWNESS):
                    await websocket.send(bytes(100_000))
                sent += 1
        assert 0 < sent < 500
        assert gateway.rss() - before < 20 * MIB
        release.set()
        await until(lambda: received >= sent, "what was sent to arrive")


async def test_a_client_that_does_not_read_is_disconnected(impatient: Server) -> None:
    """After STALL_TIMEOUT, the upstream is free, although the client is still there."""
    flood = Flood()
    ended = asyncio.Event()

    async def flooding(websocket: ServerConnection) -> None:
        await flood(websocket)
        ended.set()

    async with (
        upstream(flooding),
        client(impatient, "/ws/x", sock=narrow(impatient), max_queue=1) as websocket,
    ):
        async with asyncio.timeout(STALL + 2 * SOON):
            await ended.wait()
        websocket.transport.abort()
    assert "was cut off: it does not read" in impatient.log
    assert tracebacks(impatient.log) == 0
    await all_gone(impatient)


async def test_an_upstream_that_does_not_read_is_disconnected(impatient: Server) -> None:
    """After STALL_TIMEOUT, the client gets 1014."""

    async def deaf(websocket: ServerConnection) -> None:
        await websocket.wait_closed()

    async with upstream(deaf, max_queue=1), client(impatient, "/ws/x") as websocket:
        with suppress(ConnectionClosed):
            async with asyncio.timeout(STALL + 3 * SOON):
                while True:
                    await websocket.send(bytes(100_000))
        assert websocket.close_code == 1014
    assert tracebacks(impatient.log) == 0
    await all_gone(impatient)


# A client that breaks the rules


async def send_early(gateway: Server, early: bytes) -> bytes:
    """Send a handshake and, while the upstream keeps it waiting, more bytes. Return what comes back."""
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def silent(_: ServerConnection, request: Request) -> None:
        waiting.set()
        await ended.wait()

    handshake = "GET /ws/x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    handshake += f"Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    async with upstream(listen, process_request=silent):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        try:
            writer.write(handshake.encode())
            await waiting.wait()
            writer.write(early)
            with suppress(ConnectionResetError):
                async with asyncio.timeout(TIMEOUT):
                    return await reader.read()
            return b""
        finally:
            ended.set()
            writer.transport.abort()


EARLY = {
    "junk": b"\xff" * 9,
    "text": Frame(Opcode.TEXT, b"early").serialize(mask=True),
    "not UTF-8": Frame(Opcode.TEXT, b"\xff").serialize(mask=True),
    "close": Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True),
}


async def test_a_client_that_does_not_wait_for_its_handshake_is_cut_off() -> None:
    """With lessons/robust_protocol.py, nothing of it stays. Without, uvicorn logs a traceback."""
    robust = with_options(COMMAND, "--ws", "lessons.robust_protocol:Protocol")
    with running(robust, env=ENV) as gateway:
        for early in EARLY.values():
            assert await send_early(gateway, early) == b""
            await all_gone(gateway)
        assert tracebacks(gateway.log) == 0
        assert "ERROR" not in gateway.log
    with running(COMMAND, env=ENV) as gateway:
        await send_early(gateway, EARLY["junk"])
        assert tracebacks(gateway.log) == 1


# Ctrl+C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_both_sides_are_told_when_the_gateway_ends(own_gateway: Server, number: signal.Signals) -> None:
    """Both get 1012. The gateway ends within a second, even during a handshake."""
    told = Told()
    opening, ended = asyncio.Event(), asyncio.Event()

    async def silent(_: ServerConnection, request: Request) -> None:
        if request.path == "/ws/silent":
            opening.set()
            await ended.wait()

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(upstream(told, process_request=silent))
        websockets = [await stack.enter_async_context(client(own_gateway, "/ws/x")) for _ in range(50)]
        pending = asyncio.create_task(refusal(own_gateway, "/ws/silent"))
        await opening.wait()
        own_gateway.interrupt(number)
        assert await asyncio.to_thread(own_gateway.ends_within, 1) is not None, own_gateway.log
        ended.set()
        for websocket in websockets:
            await websocket.wait_closed()
            assert websocket.close_code == 1012
        assert (await pending)[0] == 500
        await until(lambda: len(told.ends) == 50, "the upstream to be told")
        assert {code for code, _ in told.ends} == {1012}
    assert tracebacks(own_gateway.log) == 0
    assert "Cancel" not in own_gateway.log, "a task was left behind"


async def test_the_gateway_ends_although_a_client_does_not_read(own_gateway: Server) -> None:
    """It ends after --timeout-graceful-shutdown."""
    flood = Flood()
    async with (
        upstream(flood),
        client(own_gateway, "/ws/x", sock=narrow(own_gateway), max_queue=1) as websocket,
    ):
        await flood.stalled()
        own_gateway.interrupt()
        assert await asyncio.to_thread(own_gateway.ends_within, 2.5) is not None, own_gateway.log
        websocket.transport.abort()
    assert tracebacks(own_gateway.log) == 0


async def test_the_gateway_ends_although_the_upstream_does_not_read(own_gateway: Server) -> None:
    """Uvicorn cancels the endpoint, which waits for the upstream."""

    async def deaf(websocket: ServerConnection) -> None:
        await websocket.wait_closed()

    async with upstream(deaf, max_queue=1), client(own_gateway, "/ws/x") as websocket:
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.3 * SLOWNESS):
                    await websocket.send(bytes(100_000))
        own_gateway.interrupt()
        assert await asyncio.to_thread(own_gateway.ends_within, 2.5) is not None, own_gateway.log
        websocket.transport.abort()
    assert "Cancel 1 running task(s)" in own_gateway.log
    assert tracebacks(own_gateway.log) == 0
