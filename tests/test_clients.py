"""The two client scripts, run as processes: against a real server, and against one that misbehaves on cue."""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import IO

import psutil
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import ws_consumer_client
import ws_producer_client
from lessons import pubsub_client
from tests.kit import clients
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS
from tests.kit.ports import free_port
from tests.kit.scripts import SCRIPT_ENV, SCRIPTS, Script, recording_proxy
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import TIMEOUT, until

MIB = 1024 * 1024


@pytest.fixture
def start() -> Iterator[Callable[..., Script]]:
    """Starts scripts, which end with the test."""
    with ExitStack() as stack:

        def start(*args: str, stdin: int | IO[bytes] = subprocess.DEVNULL, piped: bool = False) -> Script:
            script = Script(*args, stdin=stdin, piped=piped)
            stack.callback(script.close)
            return script

        yield start


Start = Callable[..., Script]


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    with running(SERVERS["server.py"]) as server:
        yield server


@pytest.fixture
async def relay(started: Server) -> AsyncIterator[Server]:
    """A real server, whose queue is empty. It must come through the test without a traceback."""
    mark = len(started.log)
    yield started
    await clients.drain(started)
    assert tracebacks(started.log[mark:]) == 0, started.log[mark:]


def file(tmp_path: Path, content: bytes) -> IO[bytes]:
    path = tmp_path / "input"
    path.write_bytes(content)
    return path.open("rb")


@asynccontextmanager
async def fake(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that does to every connection what the handler says. Yields its address, without a path."""
    # Without max_queue, it would read no pong and no close frame behind payloads that the handler leaves.
    async with serve(handler, "127.0.0.1", 0, close_timeout=0.1, max_queue=None) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


async def echo(websocket: ServerConnection) -> None:
    async for payload in websocket:
        await websocket.send(payload)


# The producer


async def test_the_producer_makes_a_payload_a_second(relay: Server, start: Start) -> None:
    """It prints each payload and its receipt."""
    producer = start(relay.url(PRODUCER))
    lines = (await producer.prints(4))[:4]
    sent = [line.removeprefix("sent    ") for line in lines[::2]]
    assert lines[1::2] == [f"receipt {payload}" for payload in sent]
    first, second = map(json.loads, sent)
    assert (first["value"], second["value"]) == (1, 2)
    assert 0.9 < second["timestamp"] - first["timestamp"] < TIMEOUT
    producer.process.send_signal(signal.SIGINT)
    assert await producer.ends() == 130
    assert producer.err == ""
    assert (await clients.drain(relay))[:2] == sent


async def test_count_and_interval_are_obeyed(relay: Server, start: Start) -> None:
    """--count ends the producer after so many payloads. --interval is the time between them."""
    producer = start(relay.url(PRODUCER), "--count", "3", "--interval", "0.1")
    consumer = start(relay.url(CONSUMER), "--count", "3")
    assert await producer.ends() == 0
    assert await consumer.ends() == 0
    payloads = [json.loads(line) for line in consumer.lines]
    assert [payload["value"] for payload in payloads] == [1, 2, 3]
    assert payloads[2]["timestamp"] - payloads[0]["timestamp"] >= 0.19
    assert len(producer.lines) == 6
    assert producer.err + consumer.err == ""


async def test_lines_of_standard_input_arrive_byte_for_byte(relay: Server, start: Start) -> None:
    """Blank lines do not count."""
    largest = json.dumps("x" * (MIB - 2))
    text = '{"a": 1}\r\n\n  \n\t\r\n {"b":  2.50} \n"é\\u00e9"\n' + largest + '\r\n["last"]'
    producer = start(relay.url(PRODUCER), "-", stdin=subprocess.PIPE)
    consumer = start(relay.url(CONSUMER), "--count", "5")
    await asyncio.to_thread(producer.write, text)
    assert (await consumer.prints(4))[:3] == ['{"a": 1}', ' {"b":  2.50} ', '"é\\u00e9"']
    assert producer.process.stdin
    producer.process.stdin.close()
    assert await producer.ends() == 0
    assert await consumer.ends() == 0
    assert consumer.lines[3:] == [largest, '["last"]']
    assert producer.out + producer.err + consumer.err == ""


async def test_many_lines_arrive_in_order_and_fill_no_memory(
    relay: Server, start: Start, tmp_path: Path
) -> None:
    """There are 30,000 of them."""
    lines = [json.dumps({"value": value, "padding": "x" * 500}) for value in range(30_000)]
    with file(tmp_path, "\n".join(lines).encode()) as stdin:
        producer = start(relay.url(PRODUCER), "-", stdin=stdin)
        process = psutil.Process(producer.process.pid)
        consumer = start(relay.url(CONSUMER), "--count", str(len(lines)))
        await consumer.prints(1)
        grown, before = 0, process.memory_info().rss
        while producer.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                grown = max(grown, process.memory_info().rss - before)
            await asyncio.sleep(0.01)
    assert await consumer.ends() == 0
    assert consumer.lines == lines
    assert grown < 8 * MIB  # of 15 MiB of input
    assert producer.process.returncode == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b"{nonsense", "not JSON", id="not JSON"),
        pytest.param(b'"\xff"', "'utf-8' codec can't decode byte 0xff", id="not UTF-8"),
        pytest.param(b'"' + b"x" * (MIB - 1) + b'"', f"at most {MIB} bytes", id="too large"),
        pytest.param(b'"' + b"x" * 20 * MIB + b'"', f"at most {MIB} bytes", id="far too large"),
    ],
)
async def test_a_bad_line_is_reported_with_its_number(
    relay: Server, start: Start, tmp_path: Path, line: bytes, reason: str
) -> None:
    """The producer ends once all lines before it have arrived."""
    good = [str(number) for number in range(300)]
    content = "\n".join([*good[:200], "", *good[200:]]).encode() + b"\n" + line + b"\n3\n"
    with file(tmp_path, content) as stdin:
        producer = start(relay.url(PRODUCER), "-", stdin=stdin)
        assert await producer.ends() == 1
    assert producer.err.startswith("line 302")
    assert reason in producer.err
    assert producer.err.count("\n") == 1
    assert await clients.drain(relay) == good


async def test_a_bad_line_is_reported_after_a_reconnect(start: Start) -> None:
    """The connection is lost before the receipts of the earlier lines come."""
    received: list[list[str | bytes]] = []

    async def forgetful(websocket: ServerConnection) -> None:
        received.append([await websocket.recv(), await websocket.recv()])
        if len(received) == 2:
            for payload in received[1]:
                await websocket.send(payload)
            await websocket.wait_closed()

    async with fake(forgetful) as url:
        producer = start(url, "-", stdin=subprocess.PIPE)
        await asyncio.to_thread(producer.write, "1\n2\n")
        assert producer.process.stdin
        producer.process.stdin.write(b"\xff\n3\n")
        producer.process.stdin.close()
        assert await producer.ends() == 1
    assert received == [["1", "2"]] * 2
    assert producer.err.endswith(
        "line 3: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\n"
    )


async def test_the_producer_ends_at_once_without_input(relay: Server, start: Start, tmp_path: Path) -> None:
    """The input is /dev/null, an empty file or pipe, or blank lines."""
    with file(tmp_path, b"") as empty:
        nothing = [
            start(relay.url(PRODUCER), "-"),
            start(relay.url(PRODUCER), "-", stdin=empty),
            start(relay.url(PRODUCER), "-", stdin=subprocess.PIPE),
        ]
    nothing[2].write("\n \n")
    assert nothing[2].process.stdin
    nothing[2].process.stdin.close()
    for producer in nothing:
        assert await producer.ends() == 0
        assert producer.out + producer.err == ""


async def test_a_payload_with_a_receipt_is_not_sent_again(start: Start, tmp_path: Path) -> None:
    """After a lost connection, exactly the payloads without a receipt come, in order."""
    lines = [str(number) for number in range(2000)]
    received: list[list[str | bytes]] = []
    plan = [(3, False), (700, True)]  # how many to echo, and whether to say goodbye
    expected: list[str] = list(lines)

    async def dropping(websocket: ServerConnection) -> None:
        frames: list[str | bytes] = []
        received.append(frames)
        echoes, polite = plan.pop(0) if plan else (len(expected), True)
        with suppress(ConnectionClosed):
            while len(frames) < max(echoes, 1):
                frames.append(await websocket.recv())
                if len(frames) <= echoes:
                    await websocket.send(frames[-1])
            if not expected[echoes:]:
                await websocket.wait_closed()
            elif polite:
                await websocket.close(1012)
            else:
                await (await websocket.ping())  # the pong tells that the echoes have arrived
                websocket.transport.abort()
        assert frames == expected[: len(frames)]
        del expected[:echoes]

    async with fake(dropping) as url:
        with file(tmp_path, "\n".join(lines).encode()) as stdin:
            producer = start(url, "-", stdin=stdin)
            assert await producer.ends() == 0
    assert [len(frames) for frames in received] == [3, 700, 1297]
    assert expected == []
    assert producer.err.count("connecting again\n") == producer.err.count("\n") == 2


async def test_the_producer_waits_while_the_queue_is_full(
    relay: Server, start: Start, tmp_path: Path
) -> None:
    """After 1013, it sends a payload again until there is a consumer. The payload arrives once."""
    lines = [str(number) for number in range(3000)]
    with file(tmp_path, "\n".join(lines).encode()) as stdin:
        producer = start(relay.url(PRODUCER), "-", stdin=stdin)
        await producer.says("closed with 1013: the queue is full: try again later; connecting again\n")
    consumer = start(relay.url(CONSUMER), "--count", "3000")
    assert await producer.ends() == 0
    assert await consumer.ends() == 0
    assert consumer.lines == lines


async def test_the_producer_ends_quietly_if_its_output_closes(start: Start) -> None:
    """As with `| head -1`."""
    async with fake(echo) as url:
        producer = start(url, "--interval", "0.01", piped=True)
        assert producer.process.stdout
        assert b"sent" in await asyncio.to_thread(producer.process.stdout.readline)
        producer.process.stdout.close()
        assert await producer.ends() == 0
    assert producer.err == ""


async def test_a_receipt_for_nothing_ends_the_producer(start: Start) -> None:
    """It comes if the address is that of a consumer."""

    async def consume(websocket: ServerConnection) -> None:
        await websocket.send("1")
        await websocket.wait_closed()

    async with fake(consume) as url:
        producer = start(url, "-", stdin=subprocess.PIPE)
        assert await producer.ends() == 1
    assert producer.err == f"{url}: a receipt came for nothing: is this the address of a producer?\n"


async def test_the_producer_says_that_the_disk_is_full(relay: Server) -> None:
    """It does not wait for the receipt of a payload that it did not send."""
    to_a_full_disk = ["sh", "-c", 'exec "$@" > /dev/full', "sh"]
    with closing(Script(relay.url(PRODUCER), place=to_a_full_disk)) as producer:
        assert await producer.ends() == 1
        assert producer.err == f"{relay.url(PRODUCER)}: [Errno 28] No space left on device\n"


async def test_an_interval_without_an_end_is_one_clear_line(relay: Server, start: Start) -> None:
    producer = start(relay.url(PRODUCER), "--interval", "inf")
    assert await producer.ends() == 1
    assert producer.err.startswith("line 1: ")
    assert producer.err.count("\n") == 1


# The consumer


async def test_a_payload_is_printed_as_one_line(relay: Server, start: Start) -> None:
    """Line breaks between its parts are left out. Its value stays the same."""
    await clients.produce(relay, ['{\n"a":\r\n[1]}', '"\\n\u2028"'])
    consumer = start(relay.url(CONSUMER), "--count", "2")
    assert await consumer.ends() == 0
    assert consumer.out == '{ "a":  [1]}\n"\\n\u2028"\n'
    assert consumer.err == ""


async def test_count_ends_the_consumer_despite_a_backlog(relay: Server, start: Start) -> None:
    """--count ends the consumer at once, however much there is to come."""
    await clients.produce(relay, [json.dumps("x" * 10_000)] * 900)
    consumer = start(relay.url(CONSUMER), "--count", "3")
    assert await consumer.ends() == 0
    assert consumer.lines == [json.dumps("x" * 10_000)] * 3
    assert consumer.err == ""


async def test_the_consumer_ends_quietly_if_its_output_closes(relay: Server, start: Start) -> None:
    """It ends at the next payload, as with `| head -1`."""
    consumer = start(relay.url(CONSUMER), piped=True)
    await clients.produce(relay, ["1"])
    assert consumer.process.stdout
    assert await asyncio.to_thread(consumer.process.stdout.readline) == b"1\n"
    consumer.process.stdout.close()
    await clients.produce(relay, ["2"])
    assert await consumer.ends() == 0
    assert consumer.err == ""


@pytest.mark.parametrize(
    ("options", "answers"), [([], []), (["--ack"], ["ack"] * 3)], ids=["silent", "--ack"]
)
async def test_ack_answers_each_payload(start: Start, options: list[str], answers: list[str]) -> None:
    """Without --ack, the consumer sends nothing."""
    received: list[str | bytes] = []

    async def sending(websocket: ServerConnection) -> None:
        for payload in "123":
            await websocket.send(payload)
        received.extend([frame async for frame in websocket])

    async with fake(sending) as url:
        consumer = start(url + CONSUMER, "--count", "3", *options)
        assert await consumer.ends() == 0
        await until(lambda: received == answers, f"{answers}, not {received}")
    assert consumer.lines == ["1", "2", "3"]


async def test_the_consumer_ends_when_the_server_has_no_more_payloads(start: Start) -> None:
    """After a close with 1000, connecting again could print the same payloads once more."""

    async def finite(websocket: ServerConnection) -> None:
        await websocket.send("1")
        await websocket.close(1000)

    async with fake(finite) as url:
        consumer = start(url + CONSUMER)
        assert await consumer.ends() == 0
    assert consumer.lines == ["1"]
    assert consumer.err == ""


# Both


async def test_clients_lose_nothing_over_a_restart_of_the_server(start: Start) -> None:
    """Of 120 payloads, 120 are printed. Each client says one line about it."""
    lines = [json.dumps({"value": value}) for value in range(120)]
    command, port = SERVERS["server.py"], free_port()
    with running(command, port) as server:
        producer = start(server.url(PRODUCER), "-", stdin=subprocess.PIPE)
        consumer = start(server.url(CONSUMER), "--count", "120")
        producer.write("\n".join(lines[:60]) + "\n")
        await consumer.prints(60)
        server.interrupt()
        assert server.ends_within(TIMEOUT) is not None
        assert "0 payloads were still queued" in server.log
    producer.write("\n".join(lines[60:]) + "\n")
    await producer.says("connecting again")
    await consumer.says("connecting again")
    with running(command, port):
        assert producer.process.stdin
        producer.process.stdin.close()
        assert await producer.ends() == 0
        assert await consumer.ends() == 0
    assert consumer.lines == lines
    for script in (producer, consumer):
        assert script.err == "closed with 1012: the server went away; connecting again\n"


async def test_clients_try_again_after_1013(start: Start) -> None:
    """1013 right after the start is no reason to give up, and no receipt."""
    refused = set()

    async def busy(websocket: ServerConnection) -> None:
        assert websocket.request
        path = websocket.request.path
        if path not in refused:
            refused.add(path)
            await websocket.close(1013, "try again later")
        elif path == CONSUMER:
            await websocket.send("1")
            await websocket.wait_closed()
        else:
            await echo(websocket)

    async with fake(busy) as url:
        scripts = [start(url + path, "--count", "1") for path in SCRIPTS]
        for script in scripts:
            assert await script.ends() == 0
            assert script.err == "closed with 1013: try again later; connecting again\n"
    assert len(scripts[0].lines) == 2
    assert scripts[1].lines == ["1"]


async def test_clients_end_after_1008(start: Start) -> None:
    """They print the server's reason."""

    async def strict(websocket: ServerConnection) -> None:
        await websocket.close(1008, "you may not")

    async with fake(strict) as url:
        for script in [start(url + path) for path in SCRIPTS]:
            assert await script.ends() == 1
            assert script.err.endswith("closed with 1008: you may not\n")
            assert script.err.count("\n") == 1


async def test_clients_wait_for_an_unavailable_server_but_not_for_one_that_forbids(start: Start) -> None:
    """The server comes back after a restart with this HTTP error."""
    answers = [None, HTTPStatus.BAD_GATEWAY, HTTPStatus.BAD_GATEWAY, HTTPStatus.FORBIDDEN]

    async def leaving(websocket: ServerConnection) -> None:
        websocket.transport.abort()

    def answer(connection: ServerConnection, request: object) -> object:
        status = answers.pop(0)
        return status and connection.respond(status, "no\n")

    async with serve(leaving, "127.0.0.1", 0, process_request=answer) as server:  # type: ignore[arg-type]
        port = next(iter(server.sockets)).getsockname()[1]
        consumer = start(f"ws://127.0.0.1:{port}{CONSUMER}")
        assert await consumer.ends() == 1
    assert answers == []
    first, second = consumer.err.splitlines()
    assert first == "closed with 1006: the server went away; connecting again"
    assert second.endswith("HTTP 403 no")


def no_server() -> str:
    return f"ws://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("http://127.0.0.1", "isn't a valid URI", id="scheme"),
        pytest.param("ws://127.0.0.1:99999", "Port out of range", id="port"),
        pytest.param(no_server(), "Start the server first: python server.py", id="refused"),
    ],
)
async def test_an_address_without_a_server_is_one_clear_line(start: Start, url: str, reason: str) -> None:
    await check_no_connection(start, url, reason)


@pytest.mark.parametrize("status", [403, 404])
async def test_an_http_error_is_one_clear_line(start: Start, status: int) -> None:

    def answer(connection: ServerConnection, request: object) -> object:
        return connection.respond(HTTPStatus(status), "no\n")

    async with serve(echo, "127.0.0.1", 0, process_request=answer) as server:  # type: ignore[arg-type]
        port = next(iter(server.sockets)).getsockname()[1]
        await check_no_connection(start, f"ws://127.0.0.1:{port}", f"HTTP {status}")


async def check_no_connection(start: Start, url: str, reason: str) -> None:
    for script in [start(url + path) for path in SCRIPTS]:
        assert await script.ends() == 1
        assert script.err.startswith(url)
        assert reason in script.err
        assert script.err.count("\n") == 1
        assert script.out == ""


async def test_a_proxy_is_used_for_other_hosts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is used for other hosts. All other tests show that it is ignored for 127.0.0.1."""
    async with recording_proxy() as (proxy, requests):
        monkeypatch.setitem(SCRIPT_ENV, "HTTP_PROXY", proxy)
        monkeypatch.setitem(SCRIPT_ENV, "HTTPS_PROXY", proxy)
        await check_no_connection(start, "ws://example.invalid:80", "403")
    assert requests == ["CONNECT example.invalid:80 HTTP/1.1"] * len(SCRIPTS)


# Waiting


async def test_a_consumer_says_that_it_is_waiting(relay: Server, start: Start) -> None:
    """Otherwise a consumer without payloads would look like one that hangs."""
    consumer = start(relay.url(CONSUMER))
    await consumer.waits()
    assert consumer.out == ""


@pytest.mark.parametrize("client", [ws_producer_client, ws_consumer_client, pubsub_client])
def test_pauses_are_random_and_grow(client: ModuleType) -> None:
    """Otherwise, a thousand clients would come back at the same moment."""
    first = [client.pause(1) for _ in range(1000)]
    later = [client.pause(10) for _ in range(1000)]
    assert max(first) < 2 < max(later) < client.MAX_PAUSE
    for part in range(10):
        assert 50 < sum(part / 5 <= seconds < (part + 1) / 5 for seconds in first) < 200


async def test_many_clients_do_not_all_come_back_at_once(start: Start) -> None:
    """When their server ends, 20 consumers connect again at different times."""
    arrivals: list[float] = []

    async def restarting(websocket: ServerConnection) -> None:
        arrivals.append(time.monotonic())
        while len(arrivals) < 20:
            await asyncio.sleep(0.01)
        await websocket.close(1012)

    async with fake(restarting) as url:
        for _ in range(20):
            start(url + CONSUMER)
        await until(lambda: len(arrivals) >= 40, "all to come back")
    gaps = [later - earlier for earlier, later in pairwise(arrivals[20:40])]
    assert sum(gap > 0.02 for gap in gaps) > 5, gaps


# Ctrl+C


@pytest.fixture
def endless() -> Iterator[IO[bytes]]:
    """A pipe with lines as fast as they are read."""
    with subprocess.Popen(["yes", "1"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield process.stdout
        process.kill()


async def check_interrupt(*scripts: Script) -> None:
    """Ctrl+C ends them soon and without a word."""
    said = [script.err for script in scripts]
    for script in scripts:
        script.process.send_signal(signal.SIGINT)
    for script, before in zip(scripts, said, strict=True):
        assert await script.ends(TIMEOUT / 2) == 130
        assert script.err == before


async def test_ctrl_c_ends_clients_that_wait_for_payloads(start: Start) -> None:
    """One waits for those of the server, the other for those of an open pipe."""
    connected = []

    async def waiting(websocket: ServerConnection) -> None:
        assert websocket.request
        await websocket.send("1" if websocket.request.path == CONSUMER else await websocket.recv())
        connected.append(websocket)
        await websocket.wait_closed()

    async with fake(waiting) as url:
        producer, consumer = start(url + PRODUCER, "-", stdin=subprocess.PIPE), start(url + CONSUMER)
        producer.write("1\n")  # for one that has only just connected says no goodbye
        await consumer.prints(1)
        await until(lambda: len(connected) == 2, "both connections")
        await check_interrupt(producer, consumer)
        assert [websocket.close_code for websocket in connected] == [1000, 1000]


async def test_ctrl_c_ends_clients_while_payloads_flow(
    relay: Server, start: Start, endless: IO[bytes]
) -> None:
    """The stream has no end."""
    producer = start(relay.url(PRODUCER), "-", stdin=endless)
    consumer = start(relay.url(CONSUMER))
    await consumer.prints(1000)
    await check_interrupt(producer, consumer)


async def test_ctrl_c_does_not_wait_for_a_server_that_hangs(start: Start) -> None:
    """It has stopped reading, so it answers no close frame."""
    connected = []

    async def hung(websocket: ServerConnection) -> None:
        websocket.transport.pause_reading()
        connected.append(websocket)
        await websocket.wait_closed()

    async with fake(hung) as url:
        scripts = [start(url + path) for path in SCRIPTS]
        await until(lambda: len(connected) == 2, "both connections")
        await check_interrupt(*scripts)
        for websocket in connected:
            websocket.transport.abort()


async def test_ctrl_c_ends_clients_that_wait_for_their_server(start: Start) -> None:

    async def leaving(websocket: ServerConnection) -> None:
        websocket.transport.abort()

    async with fake(leaving) as url:
        scripts = [start(url + path) for path in SCRIPTS]
        for script in scripts:
            await script.says("connecting again")
    await check_interrupt(*scripts)
