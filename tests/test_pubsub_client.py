"""The client of pubsub_server.py, as a module and as a command: with a real server, and with fake ones."""

import asyncio
import gc
import io
import json
import os
import re
import signal
import sys
import urllib.request
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.client import backoff
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Request, Response

from lessons import pubsub_client
from lessons.pubsub_client import Message, PubSubClient
from tests.kit.commands import uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.ports import free_port
from tests.kit.root import ROOT
from tests.kit.scripts import PROXIES, recording_proxy
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

COMMAND = uvicorn_command("lessons.pubsub_server:app")
FAST = {"initial_delay": 0.1, "min_delay": 0.1, "max_delay": 0.2}  # seconds between tries to connect
ENV = {**os.environ, **PROXIES, "PYTHONUTF8": "1"} | {
    f"WEBSOCKETS_BACKOFF_{name.upper()}": str(value) for name, value in FAST.items()
}
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
WELCOME = json.dumps({"type": "welcome", "id": "1", "host": "h", "pid": 7})


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect again without the pauses that spare a real server."""
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pubsub_client, "MAX_PAUSE", 0.05)
    monkeypatch.setattr(backoff, "__defaults__", (*FAST.values(), 1.5))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(COMMAND) as server:
        yield server
        assert tracebacks(server.log) == 0, server.log


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


async def test_callbacks_get_messages_in_order(server: Server, client: PubSubClient, topics: str) -> None:
    """They may be sync or async, and filters may overlap. Each gets a message once."""
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
    await confirm(client, client)
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


async def test_an_error_in_a_callback_is_logged(
    client: PubSubClient, topics: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next callback still gets the message, and the connection goes on."""
    got: list[Message] = []
    await client.wait_until_ready()
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


async def test_a_callback_may_use_the_client(client: PubSubClient, topics: str) -> None:
    """It may also do so in tasks of its own. Nothing waits for a message that only it can read."""
    got: list[Any] = []

    async def on_message(message: Message) -> None:
        got.append(message["data"])
        if message["data"] == 0:
            await client.wait_until_ready()
            await asyncio.gather(client.subscribe(f"{topics}/new", on_message), client.unsubscribe("other"))
            await client.publish(f"{topics}/new", 1)

    await client.subscribe(topics, on_message)
    await client.publish(topics, 0)
    await until(lambda: got == [0, 1], "its own message")


async def test_a_slow_callback_loses_messages_and_the_log_counts_them(
    topics: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs, the server drops messages for this client."""
    monkeypatch.setattr(pubsub_client, "INBOX", 10)  # so that the client stops reading
    command = with_options(
        with_constants("lessons.pubsub_server", BUFFER=50), "--ws-per-message-deflate", "false"
    )
    count = 1000  # of 60 kB: more than the kernel's buffers for a connection can grow to
    go_on = asyncio.Event()
    got: list[int] = []

    async def slow(message: Message) -> None:
        got.append(message["data"][0])
        await go_on.wait()

    with running(command) as server:
        async with (
            asyncio.timeout(6 * TIMEOUT),
            PubSubClient(server.url("/ws")) as publisher,
            PubSubClient(server.url("/ws")) as slowed,
        ):
            await slowed.subscribe(topics, slow)
            await confirm(slowed, publisher)
            for number in range(count):
                await publisher.publish(topics, [number, "x" * 60_000])
            await confirm(publisher, publisher)
            go_on.set()
            await until(lambda: got[-1] == count - 1, "the newest message")
    dropped = [
        re.fullmatch(r"callbacks are too slow: (\d+) messages were dropped", text) for text in logged(caplog)
    ]
    assert sum(int(match[1]) for match in dropped if match) == count - len(got) > 0


async def test_a_callback_may_subscribe_while_many_messages_wait(
    server: Server, topics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client goes on reading, or it would not see that the server has confirmed it."""
    monkeypatch.setattr(pubsub_client, "INBOX", 10)
    published, subscribed = asyncio.Event(), asyncio.Event()
    async with PubSubClient(server.url("/ws")) as publisher, PubSubClient(server.url("/ws")) as client:

        async def on_message(message: Message) -> None:
            if message["data"] == 0:
                await published.wait()
                await client.subscribe(f"{topics}/new", on_message)
                subscribed.set()

        await client.subscribe(topics, on_message)
        for number in range(100):
            await publisher.publish(topics, number)
        published.set()
        await until(subscribed.is_set, "the subscription")


async def test_a_closed_client_says_so(server: Server, topics: str) -> None:
    """A task that goes on using it gets an error, and is not cancelled without a word."""
    async with PubSubClient(server.url("/ws")) as client:
        await client.publish(topics, 0)
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.publish(topics, 1)


async def test_a_callback_may_await_a_task_that_is_cancelled(
    client: PubSubClient, topics: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log gets the error, and the next messages come."""
    got: list[Any] = []

    async def on_message(message: Message) -> None:
        got.append(message["data"])
        if message["data"] == 0:
            task = asyncio.create_task(asyncio.sleep(TIMEOUT))
            task.cancel()
            await task

    await client.subscribe(topics, on_message)
    await client.publish(topics, 0)
    await client.publish(topics, 1)
    await until(lambda: got == [0, 1], "both messages")
    assert f"a callback failed, with a message of {topics}" in logged(caplog)


async def test_a_refused_message_is_an_error(
    client: PubSubClient, topics: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bad JSON raises ValueError. Other reasons go to on_error, which logs them."""
    with pytest.raises(ValueError, match="Out of range"):
        await client.publish(topics, float("nan"))
    for wrong in ("", "a/#/b", "a#", "#/a", "a/+b", "++"):
        with pytest.raises(ValueError, match="not a topic filter"):
            await client.subscribe(wrong, print)
    await client.publish(topics, "x" * 1024 * 1024)
    await until(lambda: len(caplog.records) == 1, "a reason")
    assert "at most 1048576 bytes" in logged(caplog)[0]
    reasons: list[str] = []
    client.on_error = reasons.append
    await client.publish("a+", 1)
    await until(lambda: len(reasons) == 1, "a reason")


async def confirm(client: PubSubClient, other: PubSubClient) -> None:
    """Wait until the server has done what the client told it."""
    echoed = asyncio.Event()
    other.on_direct = lambda _: echoed.set()
    await other.wait_until_ready()
    await client.send(other.id, "done")
    await asyncio.wait_for(echoed.wait(), 2 * TIMEOUT)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


async def test_a_subscription_holds_when_subscribe_returns(server: Server, topics: str) -> None:
    """Another connection publishes from then on. This holds within a callback, too."""
    got: list[Any] = []
    async with PubSubClient(server.url("/ws")) as client, PubSubClient(server.url("/ws")) as other:

        async def further(message: Message) -> None:
            await asyncio.gather(client.subscribe(f"{topics}/further", lambda m: got.append(m["data"])))
            await other.publish(f"{topics}/further", "further")

        for number in range(20):
            await client.subscribe(f"{topics}/{number}", lambda message: got.append(message["data"]))
            await other.publish(f"{topics}/{number}", number)
        await client.subscribe(topics, further)
        await other.publish(topics, None)
        await until(lambda: len(got) == 21, "all messages")
    assert got == [*range(20), "further"]


async def test_a_call_may_have_a_list_of_topics(
    client: PubSubClient, topics: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that several of them match comes once."""
    got: list[Any] = []
    names = [f"{topics}/{number}" for number in range(300)]
    await client.subscribe([*names, f"{topics}/#"], lambda message: got.append(message["data"]))
    for name in (names[0], names[-1], f"{topics}/other"):
        await client.publish(name, name)
    await until(lambda: len(got) == 3, "all messages")
    await client.unsubscribe([*names[1:], f"{topics}/#"])
    await client.publish(names[-1], "not this")
    await client.publish(names[0], "but this")
    await until(lambda: len(got) == 4, "the last message")
    assert got == [names[0], names[-1], f"{topics}/other", "but this"]
    with pytest.raises(ValueError, match="not a topic filter"):
        await client.subscribe(["good", "#/bad"], print)
    await client.subscribe([], print)
    gc.collect()
    assert not caplog.records  # as of a task that failed


async def test_unsubscribe_ends_all_callbacks_of_the_filter(client: PubSubClient, topics: str) -> None:
    """Callbacks of other filters go on."""
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
    await confirm(client, client)
    assert got == [("+", 1), ("+ too", 1), ("#", 1), ("#", 2)]


async def test_send_reaches_on_direct_of_a_connection(
    server: Server, client: PubSubClient, topics: str
) -> None:
    """This is how to answer a message."""
    direct: list[Message] = []
    await client.subscribe(topics, lambda message: client.send(message["from"], message["data"] + 1))
    await confirm(client, client)
    async with PubSubClient(server.url("/ws")) as asker:
        asker.on_direct = direct.append
        await asker.publish(topics, 41)
        await until(lambda: len(direct) == 1, "the answer")
        assert direct == [{"type": "message", "topic": None, "data": 42, "from": client.id}]
        await client.send(["nobody", asker.id], "both")
        await until(lambda: len(direct) == 2, "the second")
        await client.send(client.id, "nobody listens")


async def test_the_client_connects_and_subscribes_again(caplog: pytest.LogCaptureFixture) -> None:
    """When the server is back, it subscribes to all filters. Calls meanwhile wait."""
    got: list[Any] = []

    def on_message(message: Message) -> None:
        got.append(message["data"])

    with running(COMMAND) as server:
        async with asyncio.timeout(6 * TIMEOUT), PubSubClient(server.url("/ws")) as client:
            for topic in ("a/#", "b", "c"):
                await client.subscribe(topic, on_message)
            await client.unsubscribe("c")
            await confirm(client, client)
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
                assert logged(caplog) == ["closed with 1006: the server went away; connecting again"]


async def test_a_subscription_holds_when_subscribe_returns_after_a_reconnect() -> None:
    """It waits for the new connection's answer, although the old connection had one."""
    confirmed = asyncio.Event()
    connections: list[ServerConnection] = []

    async def confirm_later(websocket: ServerConnection) -> None:
        connections.append(websocket)
        with suppress(ConnectionClosed):
            await websocket.recv()
            if len(connections) == 2:
                await confirmed.wait()
            await websocket.send('{"type": "subscribed", "topic": "t"}')
            await websocket.wait_closed()

    async with fake(confirm_later) as (url, _), asyncio.timeout(TIMEOUT), PubSubClient(url) as client:
        await client.subscribe("t", print)
        await connections[0].close(1012)
        await until(lambda: len(connections) == 2, "the second connection")
        await client.wait_until_ready()
        again = asyncio.create_task(client.subscribe("t", print))
        await asyncio.wait([again], timeout=SLOWNESS / 4)
        waited = not again.done()
        confirmed.set()
        await again
        assert waited, "subscribe() returned before the second server had confirmed"


async def test_close_code_1008_ends_the_client() -> None:
    """It does not reconnect. Everything that waits for it gets an error."""

    async def refuse(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.close(1008, "the token has expired")

    async with fake(refuse) as (url, requests), asyncio.timeout(TIMEOUT), PubSubClient(url) as client:
        with pytest.raises(PermissionError, match="closed with 1008: the token has expired"):
            await client.subscribe("a", print)
        for waiting in (client.subscribe("a", print), client.wait_until_ready(), client.publish("a", 1)):
            with pytest.raises(PermissionError, match="closed with 1008: the token has expired"):
                await waiting
        assert len(requests) == 1


async def test_the_token_goes_with_each_connection() -> None:
    """When the server no longer accepts it, the client ends."""
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
        await websocket.recv()

    async with fake(leave, process_request=check) as (url, _), asyncio.timeout(TIMEOUT):
        async with PubSubClient(url, token="s3cret") as client:
            await client.publish("a", 1)
            with pytest.raises(InvalidStatus, match="HTTP 401"):
                await client.closed
        async with PubSubClient(url, token="s3cret") as client:
            with pytest.raises(InvalidStatus, match="HTTP 401"):
                await client.wait_until_ready()
    assert taken == 4


async def test_the_command_says_why_its_publish_was_cut_off() -> None:
    """Close code 1008 comes when the command has sent all and waits. It ends at once, with the reason."""

    async def refuse(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.recv()  # the command's message to itself
        await websocket.close(1008, "the token has expired")

    async with fake(refuse) as (url, _):
        code, out, err = await run("publish", "t", "1", "--url", url)
        assert (code, out, err) == (1, "", f"{url}: closed with 1008: the token has expired\n")


async def test_an_address_without_a_server_is_an_error_at_once() -> None:
    async with PubSubClient(f"ws://127.0.0.1:{free_port()}/ws") as client:
        with pytest.raises(ConnectionRefusedError):
            await client.publish("a", 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_client_leaves_no_task_behind(server: Server, topics: str) -> None:
    """This holds inside a callback, too. An error in the body of `async with` is raised."""
    started = asyncio.Event()

    async def never(message: Message) -> None:
        started.set()
        await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with PubSubClient(server.url("/ws")) as client:
            await client.subscribe(topics, never)
            await client.publish(topics, 1)
            await started.wait()
            raise ZeroDivisionError
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_unknown_messages_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """Another version of the server may send them."""
    got: list[Message] = []

    async def handle(websocket: ServerConnection) -> None:
        for junk in ('{"type": "new"}', "[]", "0", '{"type": "error"}'):
            await websocket.send(junk)
        await websocket.send('{"type": "message", "topic": null, "data": 1, "from": null}')
        await websocket.wait_closed()

    async with fake(handle) as (url, _), asyncio.timeout(TIMEOUT), PubSubClient(url) as client:
        client.on_direct = got.append
        await until(lambda: len(got) == 1, "the message")
    assert not caplog.records


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


async def subscribed(server: Server, topic: str) -> None:
    """Wait until somebody has subscribed."""

    def reached() -> int:
        request = urllib.request.Request(server.url(f"/publish/{topic}", "http"), b'"subscribed?"')
        with DIRECTLY.open(request, timeout=TIMEOUT) as response:
            return int(json.load(response)["reached"])

    async with asyncio.timeout(2 * TIMEOUT):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(0.02)


async def shown(process: Process) -> str:
    """The next line, but for those of subscribed()."""
    while "subscribed?" in (text := await line(process.stdout)):
        pass
    return text


async def test_one_command_publishes_and_another_one_prints(server: Server, topics: str) -> None:
    """They take a value or lines, unchanged, until Ctrl+C."""
    url = ("--url", server.url("/ws"))
    async with script("subscribe", f"{topics}/#", f"{topics}/+", *url) as subscriber:
        assert re.fullmatch(r"connected as \w+ to process \d+ on \S+\n", await line(subscriber.stderr))
        await subscribed(server, f"{topics}/x")
        single, lines, wrong = await asyncio.gather(
            run("publish", f"{topics}/a", "21.5", *url),
            run("publish", f"{topics}/b", "-", *url, stdin='1\n\r\n  \n{"é":  2.50}\r\n["\u2028"]'),
            run("publish", f"{topics}/+", "-", *url, stdin="\n1\n2\n"),
        )
        assert single == lines == (0, "", "")
        assert wrong == (1, "", "a topic to publish to has no wildcards, + or #\n")
        got: dict[str, list[str]] = {"a": [], "b": []}
        for _ in range(4):
            text = await shown(subscriber)
            match = re.fullmatch(
                rf'{{"type": "message", "topic": "{topics}/(.)", "data": (.*), "from": "\w+"}}\n', text
            )
            assert match, text
            got[match[1]].append(match[2])
        assert got == {"a": ["21.5"], "b": ["1", '{"é": 2.5}', '["\u2028"]']}
        await interrupt(subscriber)
        assert await subscriber.communicate() == (b"", b"")
        assert subscriber.returncode == 130


async def test_the_commands_wait_for_the_server_and_go_on(topics: str) -> None:
    """Ctrl+C ends them while they wait for a line or for the server."""
    with running(COMMAND) as server:
        url = ("--url", server.url("/ws"))
        async with (
            script("subscribe", "#", *url) as subscriber,
            script("publish", topics, "-", *url, stdin=PIPE) as publisher,
        ):
            assert publisher.stdin
            assert "connected as" in await line(subscriber.stderr)
            await subscribed(server, "any")
            publisher.stdin.write(b"1\n")
            assert '"data": 1,' in await shown(subscriber)
            server.interrupt()
            for process in (subscriber, publisher):
                assert (
                    await line(process.stderr) == "closed with 1012: the server went away; connecting again\n"
                )
            publisher.stdin.write(b"2\n3\n")
            assert server.ends_within(5) is not None
            with running(COMMAND, server.port):
                assert "connected as" in await line(subscriber.stderr)
                await subscribed(server, "any")
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


async def test_the_subscriber_ends_quietly_if_its_output_closes(
    client: PubSubClient, server: Server, topics: str
) -> None:
    """It ends with the next message, as with `| head -1`."""
    reader, writer = os.pipe()
    async with script("subscribe", topics, "--url", server.url("/ws"), stdout=writer) as subscriber:
        os.close(writer)
        assert "connected as" in await line(subscriber.stderr)
        await subscribed(server, topics)
        os.close(reader)
        await client.publish(topics, 1)
        _, err = await subscriber.communicate()
        assert (subscriber.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("args", "stdin", "expected"),
    [
        (("publish", "a/+", "1"), "", "a topic to publish to has no wildcards, .*"),
        (("publish", "a", "{'a': 1}"), "", r"not JSON: \{'a': 1\}"),
        (("publish", "a", ""), "", "not JSON: "),
        (("publish", "a", "-"), "1\n\n[2\n3\n", r"not JSON: \[2\n"),
        (("publish", "a"), "1\n[2\n3\n", r"not JSON: \[2\n"),
        (("publish", "a", "-"), b'1\n"\xff"\n', ".*: 'utf-8' codec can't decode .*"),
        (("publish", "a", "-"), "NaN", ".*: Out of range float values are not JSON compliant.*"),
        (("publish", "a", "-"), "[" * 99999, "not JSON: nested too deep"),
        (("publish", "a", "-"), json.dumps("x" * 2**20), "a message has at most 1048576 bytes"),
        (("subscribe", "a", "a/#/b"), "", ".*: not a topic filter .*: a/#/b"),
        (("subscribe", "a", "--url", "{nobody}"), "", "{nobody}: .*Connect call failed.*"),
        (("publish", "a", "1", "--url", "{nothing}"), "", "{nothing}: server rejected .*: HTTP 403"),
        (("publish", "a", "1", "--url", "http://a"), "", "http://a: http://a isn't a valid URI: .*"),
        (("publish", "a", "1", "--url", "ws://a:99999"), "", "ws://a:99999: Port out of range.*"),
    ],
)
def test_each_error_of_the_command_is_one_clear_line(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    stdin: str | bytes,
    expected: str,
) -> None:
    """The exit code is 1."""
    urls = {"{nobody}": f"ws://127.0.0.1:{free_port()}/ws", "{nothing}": server.url("/nothing")}
    for name, url in urls.items():
        args = tuple(arg.replace(name, url) for arg in args)
        expected = expected.replace(name, re.escape(url))
    content = stdin if isinstance(stdin, bytes) else stdin.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    monkeypatch.setattr(sys, "argv", ["pubsub_client.py", args[0], "--url", server.url("/ws"), *args[1:]])
    with pytest.raises(SystemExit) as end:
        pubsub_client.main()
    assert isinstance(end.value.code, str)  # which Python prints, to exit with 1
    assert re.fullmatch(expected, end.value.code, re.DOTALL)


async def test_a_proxy_is_used_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is used for other hosts. All other tests show that it is ignored for 127.0.0.1."""
    async with recording_proxy() as (proxy, requests):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(WebSocketException):
            async with PubSubClient("ws://example.invalid:80/ws") as client:
                await client.wait_until_ready()
    assert requests == ["CONNECT example.invalid:80 HTTP/1.1"]
