"""Real websocket clients, and ways to disconnect them."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import State

from tests.kit.commands import CONSUMER, PRODUCER
from tests.kit.servers import Server
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

CONNECTING = {
    "proxy": None,
    "compression": None,
    "open_timeout": TIMEOUT,
    "close_timeout": TIMEOUT,
    "ping_interval": None,  # so that what keeps a connection alive, or ends it, is the server
    "max_queue": None,
    "max_size": None,
}


@asynccontextmanager
async def client(server: Server, path: str, **options: object) -> AsyncIterator[ClientConnection]:
    """Connect to the server, without the conveniences that would hide what the server does.

    After six TIMEOUTs, the block inside ends with TimeoutError, so that no test hangs.
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
    """Return a connected socket with a small buffer, which is soon full if the client does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before connecting, or it has no effect
    sock.connect(("127.0.0.1", server.port))
    sock.setblocking(False)
    return sock


async def receive(websocket: ClientConnection) -> str:
    """Return the next text frame, or raise TimeoutError after TIMEOUT."""
    async with asyncio.timeout(TIMEOUT):
        return await websocket.recv(decode=True)


async def receive_all(websocket: ClientConnection) -> list[str]:
    """Return every text frame until the connection ends."""
    frames = []
    async with asyncio.timeout(TIMEOUT):
        with suppress(ConnectionClosed):
            while True:
                frames.append(await websocket.recv(decode=True))
    return frames


async def arrived(websocket: ClientConnection) -> list[str]:
    """Return the text frames that have come so far. A pong comes after all that was written before it."""
    frames = []
    async with asyncio.timeout(TIMEOUT):
        await (await websocket.ping())
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0):  # ends the first recv() that would have to wait
                frames.append(await websocket.recv(decode=True))
    return frames


def port(websocket: ClientConnection) -> int:
    """Return the client's port, which tells its connection from others at the server."""
    number: int = websocket.local_address[1]
    return number


async def gone(server: Server, ports: set[int]) -> None:
    """Wait until the server has noticed that the clients with these ports have left, without a reset."""
    await until(lambda: not ports & server.connections(), f"the server to let go of {ports}", 1 * SLOWNESS)


def sockets_of(server: Server, websockets: Iterable[ClientConnection]) -> set[int]:
    """Return the server's ends of these connections, for noticed()."""
    inodes = server.sockets()
    return {inodes[port(websocket)] for websocket in websockets}


async def noticed(server: Server, sockets: set[int]) -> None:
    """Wait until the server has closed these sockets. It also waits for connections that were reset."""
    await until(lambda: not sockets & server.open_sockets(), "the server to let go", 1 * SLOWNESS)


def write(websocket: ClientConnection, payloads: Iterable[str]) -> None:
    """Send payloads ahead in one write, so that they reach the server together.

    Raise ConnectionClosed if the connection has begun to close.
    """
    if websocket.state is not State.OPEN:
        raise ConnectionClosed(None, None)
    frames = (Frame(Opcode.TEXT, payload.encode()).serialize(mask=True) for payload in payloads)
    websocket.transport.write(b"".join(frames))


async def vanish(websocket: Connection) -> None:
    """Leave as a killed process does: the operating system closes the socket, without a close frame."""
    websocket.transport.abort()
    await websocket.wait_closed()


async def reset(websocket: Connection) -> None:
    """Leave with a TCP reset."""
    sock = websocket.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await vanish(websocket)


async def produce(server: Server, payloads: Sequence[str]) -> None:
    """Send all payloads ahead on a new connection. Each must come back as its receipt."""
    async with client(server, PRODUCER) as websocket:
        write(websocket, payloads)
        for payload in payloads:
            assert await receive(websocket) == payload


def numbered(count: int, size: int = 0, start: int = 0) -> list[str]:
    """Return payloads that are their own numbers, padded to `size` bytes."""
    return [json.dumps(str(number).ljust(size, "x")) for number in range(start, start + count)]


async def settled(server: Server) -> int:
    """Wait until the server can write no more to a consumer that has stopped reading. Returns what is queued.

    Each look is an answer of the server, so it has had a turn in which to write.
    """
    looks = [server.queued()]

    def unchanged() -> bool:
        looks.append(server.queued())
        return len(looks) > 10 and len(set(looks[-10:])) == 1

    await until(unchanged, "the consumer's socket to be full")
    return looks[-1]


def bytes_on_their_way(websocket: ClientConnection) -> int:
    """Return how many bytes the kernel holds for a client, at both ends of the connection."""
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


class Consumer:
    """Receives payloads, and acknowledges each of them if the server takes acknowledgements."""

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
    """Return the path of a consumer, with its prefetch if the server takes acknowledgements."""
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
