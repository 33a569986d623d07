"""The client of pubsub_server.py, as a module and as a command: with a real server, and with fake ones."""

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.client import backoff
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Request, Response

from lessons import pubsub_client
from lessons.pubsub_client import Message, PubSubClient, matches
from tests.harness import ROOT, SLOWNESS, TIMEOUT, Server, free_port, running, until, uvicorn_command

COMMAND = uvicorn_command("lessons.pubsub_server:app")
FAST = {"initial_delay": 0.1, "min_delay": 0.1, "max_delay": 0.2}  # seconds between tries to connect
ENV = {**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONUTF8": "1"} | {
    f"WEBSOCKETS_BACKOFF_{name.upper()}": str(value) for name, value in FAST.items()
}
WELCOME = json.dumps({"type": "welcome", "id": "1", "host": "h", "pid": 7})
LEVELS = ["", "a", "b", "$a"]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect again without the pauses that spare a real server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pubsub_client, "PAUSE", 0.05)
    monkeypatch.setattr(backoff, "__defaults__", (*FAST.values(), 1.5))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(COMMAND) as server:
        yield server
        assert "Traceback" not in server.log, server.log


@pytest.fixture
async def client(server: Server) -> AsyncIterator[PubSubClient]:
    async with asyncio.timeout(6 * TIMEOUT), PubSubClient(server.url("/ws")) as client:
        yield client


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> str:
    """The first level of the topics of a test, which no other test has."""
    name: str = request.node.name
    return name.replace("[", "-").replace("]", "")


@asynccontextmanager
async def fake(
    handler: Callable[[ServerConnection], Awaitable[None]], **options: Any
) -> AsyncIterator[tuple[str, list[Request]]]:
    """A server that welcomes clients, and does what the handler says. Yields its address, and who came."""
    requests: list[Request] = []

    async def welcome(websocket: ServerConnection) -> None:
        assert websocket.request
        requests.append(websocket.request)
        await websocket.send(WELCOME)
        await handler(websocket)

    async with serve(welcome, "127.0.0.1", 0, close_timeout=0.1, **options) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws", requests


# The module


@pytest.mark.parametrize(
    ("topic_filter", "yes", "no"),
    [
        (
            "sport/tennis/player1/#",
            ["sport/tennis/player1", "sport/tennis/player1/ranking"],
            ["sport/tennis"],
        ),
        ("sport/#", ["sport", "sport/a/b"], ["sports"]),
        ("sport/tennis/+", ["sport/tennis/a", "sport/tennis/"], ["sport/tennis", "sport/tennis/a/b"]),
        ("+/+", ["/finance", "a/b"], ["a"]),
        ("/+", ["/finance"], ["finance", "/finance/a"]),
        ("+", ["finance", ""], ["/finance"]),
        ("#", ["a", "/", "a/b"], ["$SYS", "$SYS/a"]),
        ("+/monitor/Clients", ["a/monitor/Clients"], ["$SYS/monitor/Clients"]),
        ("$SYS/#", ["$SYS", "$SYS/a/b"], ["SYS"]),
        ("$SYS/monitor/+", ["$SYS/monitor/Clients"], ["$SYS/monitor"]),
        ("a.c", ["a.c"], ["abc", "A.C"]),
    ],
)
def test_filters_of_the_specification(topic_filter: str, yes: list[str], no: list[str]) -> None:
    """The examples of MQTT 5, section 4.7."""
    assert [topic for topic in yes + no if matches(topic_filter, topic)] == yes


def test_all_short_filters() -> None:
    """All filters and topics of up to three levels match as the rules say, put as a regular expression."""
    for filter_levels in levels_of([*LEVELS, "+"]):
        for end in ([], ["#"]):
            topic_filter = "/".join([*filter_levels, *end])
            pattern = re.escape(topic_filter).replace(r"\+", "[^/]*").replace(r"/\#", "(/.*)?")
            if topic_filter.startswith("+"):
                pattern = r"(?!\$)" + pattern
            for topic in map("/".join, levels_of(LEVELS)):
                assert matches(topic_filter, topic) == bool(re.fullmatch(pattern, topic)), (
                    topic_filter,
                    topic,
                )


def levels_of(names: list[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.product(names, repeat=depth) for depth in (1, 2, 3))


async def test_callbacks_get_messages(server: Server, client: PubSubClient, topics: str) -> None:
    """Sync and async, several for a filter, and filters that overlap: each is called once, in order."""
    first: list[Message] = []
    second: list[Message] = []
    others: list[Message] = []

    async def later(message: Message) -> None:
        await asyncio.sleep(0)
        second.append(message)

    await client.subscribe(f"{topics}/+/temp", first.append)
    await client.subscribe(f"{topics}/#", first.append)
    await client.subscribe(f"{topics}/#", later)
    await client.subscribe(f"{topics}/1", others.append)
    async with PubSubClient(server.url("/ws")) as publisher:
        data: list[Any] = [21.5, None, "é\u2028", {"a": [True]}, 10**30]
        for value in data:
            await publisher.publish(f"{topics}/1/temp", value)
        await publisher.publish(f"{topics}/1", "last")
        await until(lambda: len(second) == 6, "all messages")
        expected = [
            {"type": "message", "topic": f"{topics}/1/temp", "data": value, "from": publisher.id}
            for value in data
        ]
        last = {"type": "message", "topic": f"{topics}/1", "data": "last", "from": publisher.id}
    assert first == second == [*expected, last]
    assert others == [last]


async def test_what_a_callback_raises_is_logged(
    client: PubSubClient, topics: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not keep the message from the next callback, nor the next message, nor end the connection."""
    got: list[Message] = []
    name = client.id

    def fail(message: Message) -> None:
        raise ZeroDivisionError

    async def fail_later(message: Message) -> None:
        raise LookupError

    for callback in (fail, fail_later, got.append):
        await client.subscribe(topics, callback)
    for number in range(2):
        await client.publish(topics, number)
    await until(lambda: len(got) == 2, "the messages")
    assert [message["data"] for message in got] == [0, 1]
    raised = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert raised == [ZeroDivisionError, LookupError] * 2
    assert client.id == name


async def test_a_slow_callback_holds_up_only_callbacks(
    server: Server, topics: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Commands are answered, also its own. Of what waits for it the newest is kept, and the rest counted."""
    monkeypatch.setattr(pubsub_client, "INBOX", 5)
    go_on, asked = asyncio.Event(), asyncio.Event()
    got: list[Any] = []

    async def slow(message: Message) -> None:
        got.append(message["data"])
        if message["data"] == 0:
            await slowed.subscribe(f"{topics}/new", slow)
            await slowed.publish(f"{topics}/new", "from a callback")
            asked.set()
            await go_on.wait()

    async with asyncio.timeout(TIMEOUT), PubSubClient(server.url("/ws")) as slowed:
        await slowed.subscribe(topics, slow)
        await slowed.publish(topics, 0)
        await asked.wait()
        for number in range(1, 20):
            await slowed.publish(topics, number)
        assert got == [0]
        go_on.set()
        await until(lambda: got[-1] == 19, "the newest message")
    assert got == [0, 15, 16, 17, 18, 19]
    [record] = caplog.records
    assert record.getMessage() == "callbacks are too slow: 15 messages were dropped"


async def test_what_the_server_does_not_take(client: PubSubClient, topics: str) -> None:
    """ValueError, with the server's reason or one's own."""
    for bad in ("a/#/b", "a+", ""):
        with pytest.raises(ValueError, match=r"wildcard|bytes"):
            await client.subscribe(bad, print)
    for data in (float("nan"), "\ud800"):
        with pytest.raises(ValueError, match=r"Out of range|surrogates"):
            await client.publish(topics, data)
    with pytest.raises(ValueError, match="at most 1048576 bytes"):
        await client.publish(topics, "x" * 1024 * 1024)
    with pytest.raises(ValueError, match="to"):
        await client.send(5, 1)  # type: ignore[arg-type]


async def test_errors_find_their_command(topics: str) -> None:
    """Where many tasks publish at the same time, more than fits into the socket, each gets its answer."""
    go_on = asyncio.Event()

    async def handle(websocket: ServerConnection) -> None:
        async for text in websocket:
            command = json.loads(text)
            if command["type"] == "unsubscribe":
                await websocket.send(json.dumps({"type": "unsubscribed", "topic": command["topic"]}))
            elif "+" in command["topic"]:
                await websocket.send(json.dumps({"type": "error", "reason": command["topic"]}))
            if command["topic"] == "$mark/":
                await go_on.wait()

    names = [f"{topics}/{number}" + "/+" * (number % 3 == 0) for number in range(15)]
    slow = fake(handle, compression=None, max_queue=1, max_size=None)
    async with slow as (url, _), asyncio.timeout(2 * TIMEOUT), PubSubClient(url) as client:
        publishing = (client.publish(name, "x" * 10**6) for name in names)
        results = asyncio.gather(*publishing, return_exceptions=True)
        transport = client._websocket.transport  # noqa: SLF001
        await until(lambda: transport.get_write_buffer_size() > 0, "the socket to be full")
        go_on.set()
        assert [str(result) for result in await results] == [
            name if "+" in name else "None" for name in names
        ]


async def test_unsubscribe(client: PubSubClient, topics: str) -> None:
    """All callbacks of the filter are called no more, those of others are."""
    got: list[tuple[str, Any]] = []
    await client.subscribe(f"{topics}/+", lambda message: got.append(("+", message["data"])))
    await client.subscribe(f"{topics}/+", lambda message: got.append(("+ too", message["data"])))
    await client.subscribe(f"{topics}/#", lambda message: got.append(("#", message["data"])))
    await client.publish(f"{topics}/1", 1)
    await until(lambda: len(got) == 3, "the first message")
    await client.unsubscribe(f"{topics}/+")
    await client.unsubscribe("never subscribed")
    await client.publish(f"{topics}/1", 2)
    await until(lambda: got[3:] == [("#", 2)], "the second message")
    await client.unsubscribe(f"{topics}/#")
    await client.publish(f"{topics}/1", 3)
    await asyncio.sleep(0)
    assert got == [("+", 1), ("+ too", 1), ("#", 1), ("#", 2)]


async def test_send(server: Server, client: PubSubClient, topics: str) -> None:
    """What is sent to a connection's id goes to its on_direct: the way to answer a message."""
    direct: list[Message] = []
    await client.subscribe(topics, lambda message: client.send(message["from"], message["data"] + 1))
    async with PubSubClient(server.url("/ws"), on_direct=direct.append) as asker:
        await asker.publish(topics, 41)
        await until(lambda: len(direct) == 1, "the answer")
        assert direct == [{"type": "message", "topic": None, "data": 42, "from": client.id}]
        await client.send(["nobody", asker.id], "both")
        await until(lambda: len(direct) == 2, "the second")
        await client.send(client.id, "nobody listens")


async def test_it_connects_and_subscribes_again(caplog: pytest.LogCaptureFixture) -> None:
    """When the server comes back, it subscribes to all filters again; what is asked meanwhile waits."""
    caplog.set_level(logging.INFO, pubsub_client.__name__)
    got: list[Any] = []

    def on_message(message: Message) -> None:
        got.append(message["data"])

    with running(COMMAND) as server:
        async with asyncio.timeout(6 * TIMEOUT), PubSubClient(server.url("/ws")) as client:
            for topic in ("a/#", "b", "c"):
                await client.subscribe(topic, on_message)
            await client.unsubscribe("c")
            before = client.id
            server.kill()
            await until(lambda: "connecting again" in caplog.text, "the end of the connection")
            waiting = asyncio.gather(
                client.subscribe("d", on_message), client.unsubscribe("b"), client.wait_until_ready()
            )
            await asyncio.sleep(0)
            with running(COMMAND, server.port):
                for topic in ("a/1", "b", "c", "d", "a/2"):
                    await client.publish(topic, topic)
                await waiting
                await until(lambda: "a/2" in got, "the messages")
                assert client.id != before
                assert got == ["a/1", "d", "a/2"]
                connected = r"connected as \w+ to process \d+ on \S+"
                closed = "closed with 1006: the server went away; connecting again"
                lines = "\n".join(record.getMessage() for record in caplog.records)
                assert re.fullmatch(f"{connected}\n{closed}\n{connected}", lines)


async def test_the_answer_is_lost(topics: str) -> None:
    """Where the connection breaks before the answer, publish() says so, and subscribe() asks again."""
    commands: list[str] = []

    async def handle(websocket: ServerConnection) -> None:
        async for text in websocket:
            command = json.loads(text)
            commands.append(command["type"])
            if command["type"] == "publish" or command["topic"] == "$mark/1":
                break
            await websocket.send(json.dumps({"type": "unsubscribed", "topic": command["topic"]}))

    async with fake(handle) as (url, _), asyncio.timeout(6 * TIMEOUT), PubSubClient(url) as client:
        with pytest.raises(ConnectionResetError, match="closed with 1000"):
            await client.publish(topics, 1)
        await client.wait_until_ready()
        await client.subscribe(topics, print)
    greeting, asking = ["unsubscribe"], ["subscribe", "unsubscribe"]
    assert commands == [*greeting, "publish", *greeting, *asking, "subscribe", *greeting, *asking]


async def test_a_policy_ends_it() -> None:
    """Closed with 1008, it does not come back, and whoever waits or asks is told."""

    async def refuse(websocket: ServerConnection) -> None:
        async for text in websocket:
            if json.loads(text)["type"] == "subscribe":
                return await websocket.close(1008, "the token has expired")
            await websocket.send(json.dumps({"type": "unsubscribed", "topic": json.loads(text).get("topic")}))

    async with fake(refuse) as (url, requests), asyncio.timeout(TIMEOUT), PubSubClient(url) as client:
        for waiting in (client.subscribe("a", print), client.wait_closed(), client.publish("a", 1)):
            with pytest.raises(PermissionError, match="closed with 1008: the token has expired"):
                await waiting
        assert len(requests) == 1


async def test_the_token() -> None:
    """It goes with each connection; where the server takes it no more, that is the end."""
    taken = 0

    def check(_: ServerConnection, request: Request) -> Response | None:
        nonlocal taken
        assert request.headers["Authorization"] == "Bearer s3cret"
        taken += 1
        if taken == 1:
            return None
        status = HTTPStatus.SERVICE_UNAVAILABLE if taken == 2 else HTTPStatus.UNAUTHORIZED
        return Response(status, status.phrase, Headers(), b"")

    async def leave(websocket: ServerConnection) -> None:
        await websocket.send(json.dumps({"type": "unsubscribed", "topic": "$mark/"}))
        while '"publish"' not in str(await websocket.recv()):
            pass

    async with fake(leave, process_request=check) as (url, _), asyncio.timeout(TIMEOUT):
        async with PubSubClient(url, token="s3cret") as client:
            with pytest.raises(ConnectionResetError):
                await client.publish("a", 1)
            with pytest.raises(InvalidStatus, match="HTTP 401"):
                await client.wait_closed()
        with pytest.raises(InvalidStatus, match="HTTP 401"):
            async with PubSubClient(url, token="s3cret"):
                pass
    assert taken == 4


async def test_no_such_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no server at the start, or another one, that is an error at once."""
    monkeypatch.setattr(pubsub_client, "WELCOME", 0.1)
    with pytest.raises(ConnectionRefusedError):
        await PubSubClient(f"ws://127.0.0.1:{free_port()}/ws").__aenter__()
    async with serve(lambda websocket: websocket.wait_closed(), "127.0.0.1", 0, close_timeout=0.1) as silent:
        port = next(iter(silent.sockets)).getsockname()[1]
        with pytest.raises(TimeoutError):
            await PubSubClient(f"ws://127.0.0.1:{port}/ws").__aenter__()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_it_leaves_nothing_behind(server: Server, topics: str) -> None:
    """At the end its tasks are over, whoever waits is told, and what the body raises comes through."""
    started = asyncio.Event()

    async def never(message: Message) -> None:
        started.set()
        await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with PubSubClient(server.url("/ws")) as client:
            await client.subscribe(topics, never)
            await client.publish(topics, 1)
            await started.wait()
            waiting = asyncio.create_task(client.publish(topics, 2))
            await asyncio.sleep(0)
            raise ZeroDivisionError
    with pytest.raises(ConnectionResetError):
        await waiting
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.publish(topics, 3)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """How many messages the server dropped, and to what it subscribes no more. Junk is passed over."""
    connections = itertools.count()

    async def handle(websocket: ServerConnection) -> None:
        first = next(connections) == 0
        for junk in ('{"type": "new"}', "[]", "0", '{"type": "message", "topic": 5}', '{"type": "error"}'):
            await websocket.send(junk)
        async for text in websocket:
            command = json.loads(text)
            if command["type"] == "subscribe" and (command["topic"] == "bad" or not first):
                await websocket.send('{"type": "error", "reason": "not any more"}')
            if command["type"] == "unsubscribe":
                await websocket.send(json.dumps({"type": "unsubscribed", "topic": command["topic"]}))
            if command["type"] == "publish":
                await websocket.send('{"type": "dropped", "count": 12}')
                await websocket.send('{"type": "error", "reason": "of a connection that is over"}')
                break

    async with fake(handle) as (url, _), asyncio.timeout(TIMEOUT), PubSubClient(url) as client:
        await client.subscribe("a", print)
        with pytest.raises(ValueError, match="not any more"):
            await client.subscribe("bad", print)
        with pytest.raises(ConnectionResetError):
            await client.publish("a", 1)
        await client.wait_until_ready()
    assert [record.getMessage() for record in caplog.records] == [
        "the connection is too slow: 12 messages were dropped",
        "closed with 1000: the server went away; connecting again",
        "not subscribed again: not any more",
    ]


# The command


@asynccontextmanager
async def script(*args: str, stdin: int = DEVNULL, stdout: int = PIPE) -> AsyncIterator[Process]:
    command = (sys.executable, "lessons/pubsub_client.py", *args)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=stdin, stdout=stdout, stderr=PIPE, cwd=ROOT, env=ENV
    )
    try:
        async with asyncio.timeout(2 * TIMEOUT):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def interrupt(process: Process) -> None:
    """Press Ctrl+C; and again, for Python can miss one that comes just before it goes to sleep."""
    while process.returncode is None:
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), SLOWNESS)


async def line(stream: asyncio.StreamReader | None) -> str:
    assert stream
    return (await stream.readline()).decode()


async def run(*args: str, stdin: str = "") -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error."""
    async with script(*args, stdin=PIPE) as process:
        out, err = await process.communicate(stdin.encode())
        return process.returncode, out.decode(), err.decode()


async def test_the_command(server: Server, topics: str) -> None:
    """What one publishes, a value or lines, the other prints, as it came, until Ctrl+C."""
    url = ("--url", server.url("/ws"))
    async with script("subscribe", f"{topics}/#", f"{topics}/+", *url) as subscriber:
        assert re.fullmatch(r"connected as \w+ to process \d+ on \S+\n", await line(subscriber.stderr))
        for end in "#+":
            assert await line(subscriber.stderr) == f"subscribed to {topics}/{end}\n"
        single, lines, wrong = await asyncio.gather(
            run("publish", f"{topics}/a", "21.5", *url),
            run("publish", f"{topics}/b", "-", *url, stdin='1\n\r\n  \n{"é":  2.50}\r\n["\u2028"]'),
            run("publish", f"{topics}/+", "-", *url, stdin="\n1\n2\n"),
        )
        assert single == lines == (0, "", "")
        assert wrong == (1, "", "line 2: a topic to publish to has no wildcards, + or #\n")
        got: dict[str, list[str]] = {"a": [], "b": []}
        for _ in range(4):
            text = await line(subscriber.stdout)
            match = re.fullmatch(
                rf'{{"type": "message", "topic": "{topics}/(.)", "data": (.*), "from": "\w+"}}\n', text
            )
            assert match, text
            got[match[1]].append(match[2])
        assert got == {"a": ["21.5"], "b": ["1", '{"é": 2.5}', '["\u2028"]']}
        await interrupt(subscriber)
        assert await subscriber.communicate() == (b"", b"")
        assert subscriber.returncode == 130


async def test_the_command_outlives_the_server(topics: str) -> None:
    """Both wait for it and go on; Ctrl+C ends them also while they wait for a line, or for the server."""
    with running(COMMAND) as server:
        url = ("--url", server.url("/ws"))
        async with (
            script("subscribe", "#", *url) as subscriber,
            script("publish", topics, "-", *url, stdin=PIPE) as publisher,
        ):
            assert publisher.stdin
            assert "connected as" in await line(subscriber.stderr)
            assert "subscribed to" in await line(subscriber.stderr)
            publisher.stdin.write(b"1\n")
            assert '"data": 1,' in await line(subscriber.stdout)
            server.interrupt()
            for process in (subscriber, publisher):
                assert (
                    await line(process.stderr) == "closed with 1012: the server went away; connecting again\n"
                )
            publisher.stdin.write(b"2\n3\n")
            assert server.ends_within(5) is not None
            with running(COMMAND, server.port):
                assert "connected as" in await line(subscriber.stderr)
                publisher.stdin.write(b"4\n")
                while '"data": 4,' not in await line(subscriber.stdout):
                    pass  # whether the first find the subscriber back is a race
                await interrupt(publisher)
                assert await publisher.communicate() == (b"", b"")
                assert publisher.returncode == 130
            assert "connecting again" in await line(subscriber.stderr)
            await interrupt(subscriber)
            assert await subscriber.communicate() == (b"", b"")
            assert subscriber.returncode == 130


async def test_broken_pipe(client: PubSubClient, server: Server, topics: str) -> None:
    """When its reader leaves, as `head -1` does, the subscriber ends with the next message, quietly."""
    reader, writer = os.pipe()
    async with script("subscribe", topics, "--url", server.url("/ws"), stdout=writer) as subscriber:
        os.close(writer)
        assert "connected as" in await line(subscriber.stderr)
        assert "subscribed to" in await line(subscriber.stderr)
        os.close(reader)
        await client.publish(topics, 1)
        _, err = await subscriber.communicate()
        assert (subscriber.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("args", "stdin", "expected"),
    [
        (("publish", "a/+", "1"), "", "a topic to publish to has no wildcards, .*"),
        (("publish", "a", "{'a': 1}"), "", r"not JSON: .*\(char 1\)"),
        (("publish", "a", "-"), "1\n\n[2\n3\n", "line 3: not JSON: .*"),
        (("publish", "a", "-"), b'1\n"\xff"\n', "line 2: not JSON: 'utf-8' codec can't decode .*"),
        (("publish", "a", "-"), "NaN", "line 1: Out of range float values are not JSON compliant"),
        (("publish", "a", "-"), "[" * 99999, "line 1: not JSON: .*recursion.*"),
        (("publish", "a", "-"), json.dumps("x" * 2**20), "line 1: a message has at most 1048576 bytes"),
        (("publish", "a", "-"), None, r"line 0: .*Is a directory.*"),
        (("subscribe", "a", "a/#/b"), "", "a/#/b: the wildcard # is the whole last level, .*"),
        (("subscribe", "a", "--url", "{nobody}"), "", "{nobody}: .*Connect call failed.*"),
        (("publish", "a", "1", "--url", "{nothing}"), "", "{nothing}: server rejected .*: HTTP 403"),
        (("publish", "a", "1", "--url", "http://a"), "", "http://a: http://a isn't a valid URI: .*"),
        (("publish", "a", "1", "--url", "ws://a:99999"), "", "ws://a:99999: Port out of range.*"),
    ],
)
def test_errors_of_the_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    stdin: str | bytes | None,
    expected: str,
) -> None:
    """Each is one clear line, with the line number, or the filter, or the address."""
    urls = {"{nobody}": f"ws://127.0.0.1:{free_port()}/ws", "{nothing}": server.url("/nothing")}
    for name, url in urls.items():
        args = tuple(arg.replace(name, url) for arg in args)
        expected = expected.replace(name, re.escape(url))
    monkeypatch.setattr(sys, "argv", ["pubsub_client.py", args[0], "--url", server.url("/ws"), *args[1:]])
    path = tmp_path
    if stdin is not None:
        path = tmp_path / "input"
        path.write_bytes(stdin if isinstance(stdin, bytes) else stdin.encode())
    with standard_input(path):
        problem = pubsub_client.main()
    assert isinstance(problem, str)
    assert re.fullmatch(expected, problem)


@contextmanager
def standard_input(path: Path) -> Iterator[None]:
    """Open what is to be read as standard input."""
    kept, opened = os.dup(0), os.open(path, os.O_RDONLY)
    os.dup2(opened, 0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(opened)
