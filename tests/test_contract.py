"""What a client may rely on, whichever server is behind it. Every test runs once for each of SERVERS."""

import asyncio
import json
import random
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.client import ClientConnection as SyncConnection
from websockets.sync.client import connect as sync_connect

from tests.checks import (
    AT_ONCE,
    MIB,
    REFUSED,
    Leaving,
    check_a_consumer_that_spoke_gets_its_pong,
    check_broadcast,
    check_departed_consumers_swallow_nothing,
    check_departures_are_noticed,
    check_ends,
    check_fair,
    check_forbidden,
    check_foreign_page_is_refused,
    check_memory_is_bounded,
    check_refused,
    check_verbatim,
    check_waited_for_nobody,
    end,
    fails,
    flood,
    leave_politely,
    speak_and_vanish,
    visits,
)
from tests.kit.clients import (
    Consumer,
    bytes_on_their_way,
    client,
    consumer,
    drain,
    gone,
    narrow,
    noticed,
    numbered,
    port,
    produce,
    receive,
    receive_all,
    reset,
    settled,
    sockets_of,
    vanish,
)
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, with_options
from tests.kit.servers import Server, running
from tests.kit.waiting import TIMEOUT, until

PATHS = pytest.mark.parametrize("path", [PRODUCER, CONSUMER])


# Payloads


def spelled(whitespace: st.SearchStrategy[str], value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(whitespace, value, whitespace).map("".join)


def json_texts() -> st.SearchStrategy[str]:
    """JSON as nobody's serialiser would write it: every spelling that RFC 8259 allows.

    Save for lone surrogates, nesting over 200 deep and integers over 4,300 digits, which the check refuses.
    """
    whitespace = st.text(" \t\n\r", max_size=3)
    number = st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
    plain = st.characters(exclude_categories=["Cs"], exclude_characters='"\\').filter(lambda c: c >= " ")
    escape = st.sampled_from(["\\" + c for c in '"\\/bfnrt'])
    code = st.integers(0, 0xFFFF).filter(lambda n: not 0xD800 <= n < 0xE000)
    hexadecimal = code.flatmap(lambda n: st.sampled_from([f"\\u{n:04x}", f"\\u{n:04X}"]))
    pair = st.tuples(st.integers(0xD800, 0xDBFF), st.integers(0xDC00, 0xDFFF))
    surrogates = pair.map(lambda p: "".join(f"\\u{n:04x}" for n in p))
    characters = st.lists(st.one_of(plain, escape, hexadecimal, surrogates), max_size=10)
    string = characters.map(lambda pieces: f'"{"".join(pieces)}"')
    scalar = st.one_of(st.sampled_from(["true", "false", "null"]), number, string)

    def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        member = st.tuples(spelled(whitespace, string), inner).map(":".join)
        array = st.one_of(whitespace, st.lists(inner, min_size=1, max_size=4).map(",".join))
        table = st.one_of(whitespace, st.lists(member, min_size=1, max_size=4).map(",".join))
        return spelled(whitespace, st.one_of(array.map("[{}]".format), table.map("{{{}}}".format)))

    return spelled(whitespace, st.recursive(spelled(whitespace, scalar), containers, max_leaves=15))


@pytest.fixture
def pipe(server: Server) -> Iterator[tuple[SyncConnection, SyncConnection]]:
    """A producer and a consumer. Without pings of their own, whose randomness upsets Hypothesis."""
    with (
        sync_connect(server.url(PRODUCER), proxy=None, ping_interval=None) as producer,
        sync_connect(server.url(CONSUMER), proxy=None, ping_interval=None) as taker,
    ):
        yield producer, taker


@given(payloads=st.lists(json_texts(), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_payloads_arrive_byte_for_byte(
    server: Server, pipe: tuple[SyncConnection, SyncConnection], payloads: list[str]
) -> None:
    """Any JSON, in any spelling, comes to the consumer and back as the receipt, in order."""
    producer, taker = pipe
    for payload in payloads:
        producer.send(payload)
    for payload in payloads:
        assert producer.recv(TIMEOUT) == payload
    for payload in payloads:
        assert taker.recv(TIMEOUT) == payload
        if server.acks:
            taker.send("ack")


@pytest.mark.parametrize(
    "payload",
    [
        ' {"b" : 1.0e5,\t"a":"\\u00e9\\/", "a":-0 }\n',
        "9" * 4300,
        "[" * 200 + "]" * 200,
        "1e999",
        f'"{"x" * (1024 * 1024 - 2)}"',
        f'"{"é" * (512 * 1024 - 1)}"',
    ],
    ids=["odd spelling", "big number", "deep", "huge number", "1 MiB", "1 MiB of UTF-8"],
)
async def test_a_payload_is_never_rewritten(server: Server, payload: str) -> None:
    """Unusual but valid JSON, up to the limits, arrives as it was sent."""
    await check_verbatim(server, payload)


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_a_payload_may_come_in_fragments_and_compressed(
    server: Server, compression: str | None
) -> None:
    """How a client frames a payload is its own business."""
    async with (
        client(server, PRODUCER, compression=compression) as producer,
        consumer(server, compression=compression) as taker,
    ):
        await producer.send(["[1, ", '"two', '", 3]'])
        assert await receive(producer) == '[1, "two", 3]'
        assert await taker.payload() == '[1, "two", 3]'


async def test_receipts_come_in_order_to_a_producer_that_sends_ahead(server: Server) -> None:
    """A producer need not wait for a receipt before it sends the next payload."""
    payloads = numbered(900)
    async with client(server, PRODUCER) as producer:
        for payload in payloads:
            await producer.send(payload)
        assert [await receive(producer) for _ in payloads] == payloads
    assert await drain(server) == payloads


async def test_payloads_sent_before_closing_arrive(server: Server) -> None:
    """A producer may send, close at once, and read no receipt."""
    payloads = numbered(500)
    async with consumer(server) as taker:
        async with client(server, PRODUCER) as producer:
            for payload in payloads:
                await producer.send(payload)
        assert await taker.payloads(len(payloads)) == payloads


# Consumers


async def test_each_payload_goes_to_one_consumer(server: Server) -> None:
    """Consumers share all payloads, and each producer's payloads stay in order."""
    sent = [[json.dumps([name, number]) for number in range(400)] for name in ("a", "b")]
    shares: list[list[str]] = [[] for _ in range(3)]

    async def take(taker: Consumer, share: list[str]) -> None:
        with suppress(ConnectionClosed):
            while True:
                share.append(await taker.payload())

    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        for share in shares:
            group.create_task(take(await stack.enter_async_context(consumer(server)), share))
        await asyncio.gather(*(produce(server, payloads) for payloads in sent))
        await until(lambda: sum(map(len, shares)) >= 800, "all payloads to arrive")
    assert Counter(payload for share in shares for payload in share) == Counter(sent[0] + sent[1])
    for share in shares:
        for payloads in sent:
            assert [p for p in share if p in payloads] == [p for p in payloads if p in share]


async def test_consumers_compete(server: Server) -> None:
    """The server does not broadcast."""
    with fails("no broadcast"):
        await check_broadcast(server)


async def test_first_in_first_out(server: Server) -> None:
    """Payloads wait for a consumer in the order of their receipts."""
    payloads = numbered(300)
    for start in range(0, 300, 100):
        await produce(server, payloads[start : start + 100])
    assert await drain(server) == payloads


async def test_five_consumers_share_a_backlog_fairly(server: Server) -> None:
    """None gets three times as much as another one of the same worker."""
    await check_fair(server)


# Behind a gateway, a burst may trickle in two by two. That is no backlog to share.
DIRECT = [name for name in SERVERS if name != "gateway_server.py"]


@pytest.mark.parametrize("command", [*DIRECT, "yours"], indirect=True)
async def test_idle_consumers_share_a_small_burst_fairly(command: list[str]) -> None:
    """Some payloads come at once. Otherwise, the first consumer would take nearly all of them."""
    if "multiproc_server.py" in command:
        command = with_options(command, "--workers", "1")  # for the fastest worker may take all
    with running(command) as server:
        for prefetch in (None, 64) if server.acks else (None,):
            for count in (20, 100):
                await check_fair(server, count, prefetch)


async def speak_and_leave(websocket: ClientConnection) -> None:
    await websocket.send("hello")
    await websocket.close()
    assert websocket.close_code in (1000, 1008), "the close frame got no answer"


async def speak_and_reset(websocket: ClientConnection) -> None:
    await websocket.send("hello")
    await reset(websocket)


WAYS_TO_LEAVE: list[Leaving] = [
    leave_politely,
    vanish,
    reset,
    speak_and_leave,
    speak_and_vanish,
    speak_and_reset,
]


@pytest.mark.parametrize(
    "ways",
    [pytest.param([way], id=way.__name__) for way in WAYS_TO_LEAVE] + [pytest.param(WAYS_TO_LEAVE, id="all")],
)
async def test_departed_consumers_swallow_nothing(server: Server, ways: list[Leaving]) -> None:
    """After 100 consumers came and left, 200 payloads arrive, once, in order."""
    await check_departed_consumers_swallow_nothing(server, ways)


async def test_departures_are_noticed_at_once(server: Server) -> None:
    """However a consumer leaves, the server lets go of its connection."""
    await check_departures_are_noticed(server, WAYS_TO_LEAVE)


@asynccontextmanager
async def stuck(server: Server, payloads: list[str]) -> AsyncIterator[tuple[ClientConnection, int]]:
    """A consumer that does not read, its socket full, and how many of the payloads are queued.

    With acknowledgements, up to 200 payloads are unacknowledged, written or not.
    """
    async with consumer(server, 200, sock=narrow(server), max_queue=1) as taker:
        await produce(server, payloads)
        queued = await settled(server)
        assert 0 < queued < len(payloads)
        yield taker.websocket, queued
        taker.websocket.transport.abort()


async def test_payloads_not_written_to_a_consumer_go_back_to_the_front(server: Server) -> None:
    """The next consumer goes on where writing to one that stopped reading, and was then reset, ended.

    Where there are acknowledgements, at the first payload that was not acknowledged.
    """
    payloads = numbered(300, 50_000)
    async with stuck(server, payloads) as (websocket, queued):
        await reset(websocket)
        left = len(payloads) if server.acks else queued + 1
        await until(lambda: server.queued() == left, "what was taken but not written")
    assert await drain(server) == payloads[-left:]


async def test_a_consumer_that_closes_and_the_next_one_get_every_payload(
    server: Server,
) -> None:
    """A consumer that stopped reading, closes, and reads what is left: the next one goes on exactly there.

    Where there are acknowledgements, it gets all, for none of them was given.
    """
    payloads = numbered(300, 50_000)
    async with stuck(server, payloads) as (websocket, queued), asyncio.TaskGroup() as group:
        group.create_task(websocket.close())
        first = await receive_all(websocket)
    if server.acks:
        assert 0 < len(first) < len(payloads)
        assert first == payloads[: len(first)]
        await until(lambda: server.queued() == len(payloads), "what was read without an answer")
        assert await drain(server) == payloads
    else:
        assert len(first) == len(payloads) - queued - 1
        assert first + await drain(server) == payloads


async def test_a_consumer_that_stopped_reading_delays_nobody_else(server: Server) -> None:
    """The others get all but what was written to it, and the one payload that it would not take.

    If there are acknowledgements, they get all but what it may hold unacknowledged, and in the end that too.
    """
    payloads = numbered(300, 50_000)
    async with stuck(server, payloads) as (websocket, queued), consumer(server) as taker:
        assert await taker.payloads(queued) == payloads[-queued:]
        await reset(websocket)
        back = payloads[:-queued] if server.acks else payloads[-queued - 1 : -queued]
        assert await taker.payloads(len(back)) == back


async def test_a_consumer_that_spoke_gets_its_pongs(server: Server) -> None:
    """Each of its pings is answered at once."""
    await check_a_consumer_that_spoke_gets_its_pong(server)


# What a consumer may say to a server without acknowledgements, and to one with them not.
SAYINGS: dict[str, str | bytes | list[str]] = {
    "hello": "hello",
    "binary": b"\x00\xff",
    "nothing": "",
    "in parts": ["hel", "lo"],
    "half of some JSON": "{",
    "1 MiB": "x" * MIB,
    "ack in capitals": "ACK",
    "ack and a newline": "ack\n",
    "binary ack": b"ack",
    "two acks in one": "ackack",
}


async def check_ignored(server: Server, saying: str | bytes | list[str]) -> None:
    """Said before and after a payload, once or much, it is ignored: the next payload comes all the same."""
    async with client(server, CONSUMER) as talker:
        for payload in ("1", "2"):
            for _ in range(10):
                await talker.send(saying)
            async with asyncio.timeout(TIMEOUT):
                await (await talker.ping())
            await produce(server, [payload])
            assert await receive(talker) == payload
        await talker.send(saying)
        await talker.close()
        assert talker.close_code == 1000


@pytest.mark.parametrize("saying", SAYINGS)
async def test_a_message_from_a_consumer_harms_nobody(server: Server, saying: str) -> None:
    """It is ignored. If there are acknowledgements, it ends its connection, and nothing is lost."""
    if server.acks:
        await check_forbidden(server, SAYINGS[saying], unacknowledged=2)
    else:
        await check_ignored(server, SAYINGS[saying])


async def test_a_consumer_that_never_stops_sending_harms_nobody(server: Server) -> None:
    """It sends 10 MB. Payloads go to it or, with acknowledgements, to the next consumer."""
    async with client(server, CONSUMER) as talker:
        with suppress(ConnectionClosed):
            for _ in range(1000):
                await talker.send("x" * 10_000)
        if not server.acks:
            await produce(server, ["1"])
            assert await receive(talker) == "1"
            await talker.close()
            assert talker.close_code == 1000
    await check_verbatim(server, "2")


# Pressure


async def test_a_flood_fills_the_queue_and_not_the_memory(server: Server) -> None:
    """60,000 payloads of 10 kB meet no consumer. After a second comes 1013. Echoed payloads stay."""
    await check_memory_is_bounded(server, 60_000)


async def test_a_producer_waits_while_the_queue_is_full(server: Server) -> None:
    """Its payload gets a receipt as soon as there is space, or 1013 if that takes over a second."""
    payloads = numbered(server.capacity)
    await produce(server, payloads)
    assert server.queued() == server.capacity
    async with client(server, PRODUCER) as producer:
        await producer.send('"patient"')
        receipt = asyncio.create_task(receive(producer))
        for _ in range(3):  # turns for the server
            assert await asyncio.to_thread(server.queued) == server.capacity
        assert not receipt.done()
        async with consumer(server) as taker:
            rest = await taker.payloads(server.capacity)
            assert await receipt == '"patient"'
            assert [*rest, await taker.payload()] == [*payloads, '"patient"']


async def test_producers_that_wait_for_space_take_turns(command: list[str]) -> None:
    """Eight producers send into a full queue. While one waits for space, no other is served again and again.

    A server that looks for space from time to time must let its producers stand in line. If each looks for
    itself, one that looks just after another finds none, and is refused after a second.
    """
    count, size = 40, 20_000
    sent = [[json.dumps([name, number, "x" * size]) for number in range(count)] for name in "abcdefgh"]
    received: list[str] = []

    async def take(taker: Consumer) -> None:
        while True:
            received.append(await taker.payload())
            if len(received) < 150:
                await asyncio.sleep(0.02)

    if "multiproc_server.py" in command:
        command = with_options(command, "--workers", "1")  # for workers have a line each
    with running(command) as server:
        backlog = numbered(server.capacity, size)
        await produce(server, backlog)
        async with AsyncExitStack() as stack:
            producers = [await stack.enter_async_context(client(server, PRODUCER)) for _ in sent]
            flooding = asyncio.gather(*map(flood, producers, sent))

            def waits(producer: ClientConnection) -> bool:
                """Whether its payloads are there. On a busy machine, it may already have been refused."""
                return bytes_on_their_way(producer) > 10 * size or producer.close_code is not None

            if not server.gateway:  # which takes all payloads, and waits itself
                await until(lambda: all(map(waits, producers)), "all producers to wait for space")
            options = {"sock": narrow(server), "max_queue": 1}
            taking = asyncio.create_task(
                take(await stack.enter_async_context(consumer(server, 8, **options)))
            )
            floods = await flooding
            # A machine that is very busy makes no space for a second, and then somebody is refused.
            echoed = sum(number for number, _ in floods)
            await until(lambda: len(received) == len(backlog) + echoed, "all that was queued")
            taking.cancel()
    assert received[: len(backlog)] == backlog
    names = [payload[2] for payload in received[len(backlog) :]]
    turns = [name for name, _ in groupby(names)]
    for waiting in "abcdefgh":
        served = Counter[str]()
        # Before its first payload, it may not have begun. After its last one it waits no more: all of its
        # payloads are queued, or it was refused.
        places = [place for place, name in enumerate(turns) if name == waiting]
        for name in turns[places[0] : places[-1] + 1] if places else []:
            served[name] += 1
            if name == waiting:
                served.clear()
            assert max(served.values(), default=0) < 8, f"{waiting} waits too long: {''.join(turns)}"


async def test_two_floods_and_a_slow_consumer_are_all_served(server: Server) -> None:
    """Producers share the space that a slow consumer makes: neither starves. All arrives in order."""
    count = 1000
    sent = [[json.dumps([name, number, "x" * 4000]) for number in range(count)] for name in ("a", "b")]
    backlog = numbered(server.capacity)  # with it there is no room from the start
    received: list[str] = []

    async def take(taker: Consumer) -> None:
        for number in range(len(backlog) + 2 * count):
            received.append(await taker.payload())
            if number % 100 == 0:
                await asyncio.sleep(0.01)  # slow is what it is

    async def persist(payloads: list[str]) -> None:
        """Send all payloads. After a 1013, of a machine so busy that nothing moves for a second, go on."""
        while payloads:
            async with client(server, PRODUCER) as producer:
                echoed, _ = await flood(producer, payloads)
                payloads = payloads[echoed:]

    await produce(server, backlog)
    async with consumer(server, sock=narrow(server), max_queue=16) as taker, asyncio.TaskGroup() as group:
        group.create_task(take(taker))
        for payloads in sent:
            group.create_task(persist(payloads))
    assert received[: len(backlog)] == backlog
    for payloads in sent:
        assert [payload for payload in received if payload[:4] == payloads[0][:4]] == payloads
    # Where both were under way: not the first payloads, nor the last.
    shares = Counter(payload[2] for payload in received[len(backlog) + 300 : -300])
    assert min(shares["a"], shares["b"]) > count / 3, f"one starved: {shares}"


# Bad input


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_input_gets_a_reason_and_harms_nobody(server: Server, name: str) -> None:
    """The producer gets a close code and a reason, the log gets a line, and nobody else notices."""
    await check_refused(server, name)


JUNK = {
    "unmasked frame": b"\x81\x01\x31",
    "unknown opcode": b"\x83\x80\x00\x00\x00\x00",
    "reserved bits": b"\xf1\x80\x00\x00\x00\x00",
    "ping of 126 bytes": b"\x89\xfe\x00\x7e" + bytes(130),
    "continuation of nothing": b"\x80\x80\x00\x00\x00\x00",
    "close code 1": b"\x88\x82\x00\x00\x00\x00\x00\x01",
    "half a frame": b"\x81\xfe\x10\x00\x00\x00",
    "frame of 8 EiB": b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff",
    "random bytes": random.Random(2).randbytes(4096),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


@PATHS
@pytest.mark.parametrize("junk", JUNK)
async def test_junk_instead_of_frames_ends_that_connection_alone(
    server: Server, path: str, junk: str
) -> None:
    """The log has no traceback."""
    async with client(server, PRODUCER) as bystander:
        async with client(server, path) as offender:
            offender.transport.write(JUNK[junk])
            if junk == "half a frame":
                await vanish(offender)
            await offender.wait_closed()
            assert offender.close_code != 1000
            await gone(server, {port(offender)})
        await bystander.send("1")
        assert await receive(bystander) == "1"
    assert await drain(server) == ["1"]


async def test_junk_instead_of_http_ends_that_connection_alone(server: Server) -> None:
    """So does a client that leaves in the middle of the handshake."""
    before = server.connections()
    for junk in (
        random.Random(1).randbytes(4096),
        f"GET {PRODUCER} HTTP/1.1\r\nUpgrade: webso".encode(),
        b"",
    ):
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
            sock.sendall(junk)
    await until(lambda: server.connections() <= before, "the connections to end")
    await check_verbatim(server, "1")


# Origin


@PATHS
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
async def test_a_foreign_page_is_refused_before_the_handshake(server: Server, path: str, origin: str) -> None:
    """Otherwise, any site that a developer visits could drain the queue on their localhost."""
    await produce(server, ["1"])
    await check_foreign_page_is_refused(server, path, origin)
    assert await drain(server) == ["1"]


@PATHS
async def test_own_pages_and_scripts_are_let_in(server: Server, path: str) -> None:
    """A page that this server served has its origin, a script has none.

    The page has https if a proxy in front of the server takes care of TLS.
    """
    for origin in (server.url("", "http"), server.url("", "https"), None):
        async with client(server, path, origin=origin) as websocket:
            await (await websocket.ping())


# HTTP


async def test_stats_say_how_many_payloads_wait(server: Server) -> None:
    """GET /stats counts them as they come and go."""
    stats = server.stats()
    assert stats.keys() >= {"queued", "capacity", "acks"}
    assert (stats["queued"], type(stats["capacity"]), type(stats["acks"])) == (0, int, bool)
    if not server.yours:
        assert stats["capacity"] == 1000
    await produce(server, numbered(3))
    assert server.queued() == 3
    async with consumer(server) as taker:
        await taker.payloads(3)
        await until(lambda: server.queued() == 0, "the queue to be empty")


async def test_there_is_a_page(server: Server) -> None:
    """GET / serves a page for people."""
    status, content_type, body = server.get("/")
    assert status == 200, "GET / has no page"
    if not server.yours:
        assert content_type.startswith("text/html")
        assert "<html" in body


# The end


@pytest.mark.parametrize(
    ("number", "parked"), [(signal.SIGINT, 0), (signal.SIGINT, 100), (signal.SIGTERM, 100)]
)
async def test_the_server_ends_at_once(fresh: Server, number: signal.Signals, parked: int) -> None:
    """No consumer delays it, whether it waits, has spoken or has left. All are closed with 1012."""
    await produce(fresh, numbered(7))
    await drain(fresh)
    if parked:
        await visits(fresh, 12, WAYS_TO_LEAVE)
    await check_ends(fresh, number, AT_ONCE, parked)


async def test_the_server_says_how_many_payloads_were_left(fresh: Server) -> None:
    """They are lost, or wait for the next start. Its operator wants to know."""
    await visits(fresh, 6, WAYS_TO_LEAVE)
    await produce(fresh, numbered(7))
    left = await end(fresh, signal.SIGINT, AT_ONCE)
    assert left == 7, "its log does not say: 7 payloads were still queued"
    check_waited_for_nobody(fresh)


async def test_the_server_ends_while_payloads_flow(fresh: Server) -> None:
    """Each payload with a receipt was written to a consumer, or is counted in the log."""
    received: list[str] = []

    async def take(taker: Consumer) -> None:
        with suppress(ConnectionClosed):
            while True:
                received.append(await taker.payload())

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        producers = [await stack.enter_async_context(client(fresh, PRODUCER)) for _ in range(2)]
        takers = [await stack.enter_async_context(consumer(fresh)) for _ in range(2)]
        for taker in takers:
            group.create_task(take(taker))
        floods = [group.create_task(flood(producer, numbered(10_000))) for producer in producers]
        await until(lambda: len(received) > 1000, "payloads to flow")
        left = await end(fresh, signal.SIGINT, 5)
        echoed = sum([(await flooding)[0] for flooding in floods])
    codes = {taker.websocket.close_code for taker in takers}
    # A consumer that acknowledges sends all the time: see README.md, "1006 instead of 1012".
    assert codes <= ({1012, 1006} if fresh.acks else {1012})
    assert left is None or len(received) + left >= echoed


async def test_the_server_ends_while_a_producer_waits_for_space(fresh: Server) -> None:
    """A payload that waits for space has no receipt, and is not counted."""
    async with client(fresh, PRODUCER) as producer:
        flooding = asyncio.create_task(flood(producer, numbered(10_000)))
        await until(lambda: fresh.queued() == fresh.capacity, "the queue to be full")
        assert await end(fresh, signal.SIGTERM, 5) in (fresh.capacity, None)
        assert (await flooding)[0] <= fresh.capacity


async def test_the_server_ends_although_a_consumer_has_stopped_reading(fresh: Server) -> None:
    """A payload that was not written, or not acknowledged, is counted, too."""
    async with stuck(fresh, numbered(300, 50_000)) as (_, queued):
        assert await end(fresh, signal.SIGINT, 5) in (300 if fresh.acks else queued + 1, None)


async def test_the_server_ends_although_a_producer_reads_no_receipts(fresh: Server) -> None:
    """Its payloads go to consumers until its socket is full of receipts; then the server waits for it.

    How many payloads that takes is the kernel's business: it lets a socket's buffers grow to tens of MB, and
    behind a gateway there are twice as many sockets. So the producer sends until it can send no more.
    """
    sent = received = 0

    async def take(taker: Consumer) -> None:
        nonlocal received
        with suppress(ConnectionClosed):
            while True:
                await taker.payload()
                received += 1

    async def send(producer: ClientConnection) -> None:
        nonlocal sent
        payload = json.dumps("x" * 50_000)
        with suppress(ConnectionClosed):
            while True:
                await producer.send(payload)
                sent += 1

    async with asyncio.TaskGroup() as group:
        async with (
            client(fresh, PRODUCER, sock=narrow(fresh), max_queue=1) as producer,
            consumer(fresh) as taker,
        ):
            group.create_task(take(taker))
            sending = group.create_task(send(producer))
            counts: list[tuple[int, int]] = []

            def stalled() -> bool:
                assert fresh.queued() <= fresh.capacity  # a turn for the server
                counts.append((sent, received))
                return len(counts) > 20 and received > 0 and len(set(counts[-20:])) == 1

            await until(stalled, "the server to wait for its producer")
            assert not sending.done()
            left = await end(fresh, signal.SIGTERM, 5)
            # Behind a gateway, that ends too, and the server goes on with what it had read of it.
            assert left in (0, None) or fresh.gateway
            await vanish(producer)
        assert taker.websocket.close_code == 1012


# Chaos


@pytest.mark.parametrize("seed", range(3))
async def test_chaos_neither_loses_nor_duplicates_payloads(server: Server, seed: int) -> None:
    """Consumers come, leave and are reset at random while producers run: not one payload is lost or doubled.

    Delivery is at most once: what was written to a connection that dies unread is lost. This must hold all
    the same, because nothing is written to those that die. While payloads flow, consumers, some of them
    slow, leave by a closing handshake, and read on until the server has answered it, after its last payload.
    Between two flows, when every payload sent has been received, consumers are reset or vanish. The next flow
    starts as soon as the server has noticed: a payload that comes in the same instant as a reset may still be
    written to the dead connection.

    With acknowledgements it is at least once: consumers leave in every way at any time, and none is lost.
    """
    rng = random.Random(seed)
    received: Counter[str] = Counter()
    takers: dict[ClientConnection, asyncio.Task[None]] = {}
    ways_to_die = [vanish, reset, speak_and_vanish, speak_and_reset]

    async def take(taker: Consumer, slow: bool) -> None:
        with suppress(ConnectionClosed):
            while True:
                received[await taker.websocket.recv(decode=True)] += 1
                # On a connection that is closing, send() would wait for its end, and nobody would read
                # what comes before the server's answer.
                if taker.acks and taker.websocket.state is State.OPEN:
                    await taker.websocket.send("ack")
                if slow:
                    await asyncio.sleep(0.001)

    async def come(stack: AsyncExitStack) -> None:
        slow = rng.random() < 0.3
        options = {"sock": narrow(server), "max_queue": 1} if slow else {}
        prefetch = rng.choice([None, 8] if slow else [None, 8, 100])  # a megabyte would take it many seconds
        taker = await stack.enter_async_context(consumer(server, prefetch, **options))
        takers[taker.websocket] = asyncio.create_task(take(taker, slow))

    async def leave(websocket: ClientConnection, way: Leaving) -> None:
        taking = takers.pop(websocket)
        await way(websocket)
        await taking

    async def close(websocket: ClientConnection) -> None:
        await websocket.close()

    sent: list[str] = []

    def all_arrived() -> bool:
        if server.stats().get("dead"):
            server.retry()  # payloads with which five consumers happened to die
        return len(received) == len(sent)

    async with AsyncExitStack() as stack:
        for flow in range(6):
            flows = [
                numbered(150, rng.choice([10, 1000, 10_000]), start)
                for start in (flow * 1000, flow * 1000 + 500)
            ]
            sent.extend(flows[0] + flows[1])
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(produce(server, payloads)) for payloads in flows]
                while not all(task.done() for task in running):
                    if len(takers) < 3 or rng.random() < 0.5:
                        await come(stack)
                    else:
                        way = rng.choice([close, *ways_to_die]) if server.acks else close
                        group.create_task(leave(rng.choice(list(takers)), way))
                    await asyncio.sleep(rng.uniform(0, 0.01))
            try:
                await until(all_arrived, "all payloads to arrive")
            except AssertionError as error:
                missing, unknown = set(sent) - received.keys(), received.keys() - set(sent)
                found = [sorted(payload[:9] for payload in payloads) for payloads in (missing, unknown)]
                error.add_note(f"missing: {found[0]}, unknown: {found[1]}, stats: {server.stats()}")
                raise
            dying = rng.sample(list(takers), k=len(takers) * 2 // 3)
            sockets = sockets_of(server, dying)
            for websocket in dying:
                await leave(websocket, rng.choice(ways_to_die))
            await noticed(server, sockets)
        await asyncio.gather(*(leave(websocket, close) for websocket in list(takers)))
    assert received.keys() == set(sent)
    if not server.acks:
        assert server.queued() == 0
        assert max(received.values()) == 1
