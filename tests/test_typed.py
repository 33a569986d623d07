"""Messages with types: calls, replies, pushes, errors, and questions from the server."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.frames import Frame, Opcode

from lessons import typed_server
from lessons.typed_server import Call, Client, Router
from tests.checks import Leaving, check_foreign_page_is_refused
from tests.kit.clients import arrived, client, narrow, receive, reset, vanish, write
from tests.kit.commands import uvicorn_command
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

MEGABYTE = 1024 * 1024
POST = {"id": 1, "type": "post", "board": "news", "text": "x"}


@pytest.fixture(scope="module")
def boards() -> Iterator[Server]:
    """The lesson, with routers of other files: handlers that go wrong, and questions."""
    env = {"ANSWER_TIMEOUT": str(SLOWNESS)}
    with running(uvicorn_command("tests.typed_more:app"), env=env) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """The lesson as it is."""
    with running(uvicorn_command("lessons.typed_server:app")) as server:
        yield server


async def ask(websocket: ClientConnection, **call: object) -> dict[str, Any]:
    """The next message after a call, its reply where nothing else comes."""
    await websocket.send(json.dumps(call))
    return json.loads(await receive(websocket))  # type: ignore[no-any-return]


async def lives_on(websocket: ClientConnection) -> None:
    assert await ask(websocket, id=99, type="echo", text="?") == {"id": 99, "type": "echoed", "text": "?"}


# Calls


@pytest.mark.parametrize("number", [0, 7, 2**53 - 1])
async def test_a_reply_has_the_id_of_its_call(boards: Server, number: int) -> None:
    """From the smallest id to the largest that JavaScript can count to."""
    async with client(boards, "/ws") as websocket:
        reply = await ask(websocket, id=number, type="post", board="jobs", text="!")
        assert reply == {"id": number, "type": "watchers", "count": 0}


async def test_calls_sent_ahead_are_answered_in_order(boards: Server) -> None:
    """There are more of them than fit in the outbox."""
    async with client(boards, "/ws") as websocket:
        write(websocket, [json.dumps({"id": n, "type": "echo", "text": "x"}) for n in range(3000)])
        assert [json.loads(await receive(websocket))["id"] for _ in range(3000)] == list(range(3000))


async def test_a_note_is_pushed_to_the_watchers_of_its_board(boards: Server) -> None:
    """Nobody else gets it. It says who posted it, which the endpoint's dependency found out."""
    async with client(boards, "/ws") as one, client(boards, "/ws") as other, client(boards, "/ws") as poster:
        await ask(one, id=1, type="watch", board="news")
        await ask(other, id=1, type="watch", board="jobs")
        reply = await ask(poster, id=2, type="post", board="news", text="ä")
        assert reply == {"id": 2, "type": "watchers", "count": 1}
        author = f"127.0.0.1:{poster.local_address[1]}"
        note = {"type": "note", "board": "news", "author": author, "text": "ä"}
        assert [json.loads(text) for text in await arrived(one)] == [note]
        assert await arrived(other) == await arrived(poster) == []


async def test_a_burst_cuts_nobody_off(boards: Server) -> None:
    """More notes come than fit in an outbox. A watcher that reads gets all, and so does the poster."""
    notes = 3000
    async with client(boards, "/ws") as reader, client(boards, "/ws") as poster:
        for websocket in (reader, poster):
            await ask(websocket, id=1, type="watch", board="news")
        write(poster, [json.dumps(POST)] * notes)
        for _ in range(notes):
            assert json.loads(await receive(reader))["type"] == "note"
        types = Counter([json.loads(await receive(poster))["type"] for _ in range(2 * notes)])
        assert types == {"note": notes, "watchers": notes}


# Mistakes


@pytest.mark.parametrize(
    ("frame", "number", "loc", "says"),
    [
        ("hello", None, [], "Invalid JSON: expected value at line 1 column 1"),
        ("", None, [], "Invalid JSON: EOF"),
        ("[" * 100_000, None, [], "Invalid JSON: recursion limit exceeded"),
        ("9" * 100_000, None, [], "Invalid JSON: number out of range"),
        ('{"id": 1, "type": "\\ud800"}', None, [], "Invalid JSON: "),
        ('"echo"', None, [], "should be an object"),
        ('{"id": 1, "text": "x"}', 1, ["type"], "Field required"),
        ('{"id": 2, "type": "ech"}', 2, ["type"], "not one of watch, post, user.answer, echo, fail"),
        ('{"id": 3, "type": "%s"}' % ("x" * 100_000), 3, ["type"], "not one of watch, "),
        ('{"id": 4, "type": {}}', 4, ["type"], "should be a valid string"),
        ('{"id": 5, "type": "echo"}', 5, ["text"], "Field required"),
        ('{"id": 6, "type": "watch", "board": "lost"}', 6, ["board"], "should be 'news' or 'jobs'"),
        ('{"id": 7, "type": "post", "board": "news", "text": ""}', 7, ["text"], "at least 1 character"),
        (json.dumps({**POST, "id": 7, "text": "x" * 1001}), 7, ["text"], "at most 1000 characters"),
        ('{"id": 8, "type": "answer", "yes": true}', 8, ["type"], "user.answer"),
        ('{"id": 9, "type": "user.answer"}', 9, ["yes"], "Field required"),
        ('{"type": "fail"}', None, ["id"], "Field required"),
        ('{"id": "1", "type": "fail"}', None, ["id"], "should be a valid integer"),
        ('{"id": true, "type": "fail"}', None, ["id"], "should be a valid integer"),
        ('{"id": 9007199254740992, "type": "fail"}', None, ["id"], "less than 9007199254740992"),
        ('{"id": -1, "type": "fail"}', None, ["id"], "greater than or equal to 0"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else None,
)
async def test_a_bad_message_gets_an_error(
    boards: Server, frame: str, number: int | None, loc: list[str], says: str
) -> None:
    """It has Pydantic's details, shortened, and the id if there is one. The connection lives on."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        await websocket.send(frame)
        error = json.loads(await receive(websocket))
        [detail] = error.pop("details")
        assert error == {"type": "error", "id": number, "reason": "not a valid call"}
        assert detail["loc"] == loc
        assert says in detail["msg"]
        assert len(detail["msg"]) <= 200
        await lives_on(websocket)
    assert tracebacks(boards.log[mark:]) == 0


async def test_a_binary_frame_gets_an_error(boards: Server) -> None:
    async with client(boards, "/ws") as websocket:
        await websocket.send(b'{"id": 1, "type": "watch", "board": "news"}')
        error = json.loads(await receive(websocket))
        assert (error["type"], error["reason"]) == ("error", "a binary frame: send messages as text")
        await lives_on(websocket)


async def test_a_message_over_a_mebibyte_ends_the_connection(boards: Server) -> None:
    """The close code is 1009. A message of exactly 1 MiB is accepted."""
    async with client(boards, "/ws") as websocket:
        frame = '{"id": 1, "type": "echo", "text": "ä"}'
        frame += " " * (MEGABYTE - len(frame.encode()))
        await websocket.send(frame)
        assert json.loads(await receive(websocket))["type"] == "echoed"
        await websocket.send(frame + " ")
        await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1009, "a message has at most 1048576 bytes")


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("fail", "ValueError: a handler's mistake"),
        ("sleep", "TimeoutError"),
        ("list", "pydantic_core._pydantic_core.PydanticSerializationError"),
        ("wait", "asyncio.exceptions.CancelledError"),
    ],
)
async def test_a_handler_that_fails_or_hangs_is_an_error(boards: Server, kind: str, cause: str) -> None:
    """The caller gets an error with its id, the log gets one entry, and the connection lives on.

    A reply that cannot be serialized is a failure too, and so is a wait for a task that somebody cancels.
    """
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        error = await ask(websocket, id=5, type=kind)
        assert error == {"type": "error", "id": 5, "reason": "the server failed", "details": []}
        await lives_on(websocket)
    log = boards.log[mark:]
    assert log.count("ERROR") == 1
    assert "ERROR:    call 5 of 127.0.0.1:" in log
    assert f"\n{cause}" in log


async def test_a_handler_that_fails_after_its_client_is_cut_off_changes_no_close_code(boards: Server) -> None:
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        await websocket.send('{"id": 5, "type": "leave"}')
        await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1013, "enough")
    assert "Exception in ASGI application" not in boards.log[mark:]


async def test_a_validator_that_fails_is_an_error(boards: Server) -> None:
    """The caller gets an error with its id, if the validator raises anything but a ValueError."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        assert (await ask(websocket, id=4, type="pick", text="known"))["type"] == "echoed"
        error = await ask(websocket, id=5, type="pick", text="unknown")
        assert error == {"type": "error", "id": 5, "reason": "the server failed", "details": []}
        await lives_on(websocket)
    log = boards.log[mark:]
    assert log.count("ERROR") == 1
    assert "ERROR:    a validator failed on call 5\n" in log


@pytest.mark.parametrize("subscribers", [0, 2])
async def test_a_push_that_cannot_be_serialized_fails_and_harms_no_subscriber(
    boards: Server, subscribers: int
) -> None:
    """The client whose handler pushes it gets an error, even if there are no subscribers."""
    async with AsyncExitStack() as stack:
        pusher = await stack.enter_async_context(client(boards, "/ws"))
        watchers = [await stack.enter_async_context(client(boards, "/ws")) for _ in range(subscribers)]
        for watcher in watchers:
            await ask(watcher, id=1, type="watch", board="news")
        error = await ask(pusher, id=5, type="tell")
        assert (error["id"], error["reason"]) == (5, "the server failed")
        assert (await ask(pusher, **POST))["count"] == subscribers
        for watcher in watchers:
            assert json.loads(await receive(watcher))["text"] == "x"


# Connections


async def test_a_client_is_forgotten_whatever_ends_its_endpoint() -> None:
    """Even a mistake in the endpoint itself."""
    websocket: Any = AsyncMock(client=None)
    websocket.receive.side_effect = KeyError("a mistake")
    with pytest.raises(ExceptionGroup) as failure:
        await typed_server.endpoint(websocket)
    assert failure.group_contains(KeyError, match="a mistake")
    assert not typed_server.clients


async def test_a_watcher_that_does_not_read_is_cut_off_and_delays_nobody_else(boards: Server) -> None:
    """Its outbox is full. The other watcher gets each note, and memory is bounded."""
    notes, text = 5000, "€" * 1000
    mark = len(boards.log)
    async with (
        client(boards, "/ws", sock=narrow(boards), max_queue=1) as stuck,
        client(boards, "/ws") as reader,
        client(boards, "/ws") as poster,
    ):
        await ask(stuck, id=1, type="watch", board="jobs")
        await ask(reader, id=1, type="watch", board="jobs")
        before = boards.rss()
        for start in range(0, notes, 50):
            calls = [dict(id=start + n, type="post", board="jobs", text=text) for n in range(50)]
            write(poster, map(json.dumps, calls))
            for call in calls:
                assert json.loads(await receive(poster))["id"] == call["id"]
                assert json.loads(await receive(reader))["text"] == text
        cut = f"127.0.0.1:{stuck.local_address[1]} closed with 1013: you read too slowly: connect again"
        await until(lambda: cut in boards.log[mark:], "the stuck one to be cut off")
        assert (await ask(poster, id=1, type="post", board="jobs", text="x"))["count"] == 1
        assert boards.rss() - before < 8 * MEGABYTE  # of the 15 that were sent to it
        stuck.transport.abort()
    assert tracebacks(boards.log[mark:]) == 0


async def test_a_client_that_is_cut_off_watches_no_more() -> None:
    """It does not count for the next push, although its endpoint has not ended yet."""
    websocket: Any = SimpleNamespace(client=None)
    slow = Client(websocket)
    slow.endpoint = None  # or this test would be cancelled
    slow.topics.add("news")
    typed_server.clients.add(slow)
    message = Call(id=1, type="x")
    counts = [typed_server.push("news", message) for _ in range(typed_server.OUTBOX + 2)]
    assert counts == [1] * (typed_server.OUTBOX + 1) + [0]


async def test_a_client_that_reads_no_replies_is_not_read(boards: Server) -> None:
    """Once it reads, it gets all of them. It is not cut off, because it delays only itself."""
    calls, text = 3000, "€" * 3000
    async with client(boards, "/ws", sock=narrow(boards), max_queue=1) as websocket:
        write(websocket, [json.dumps({"id": n, "type": "echo", "text": text}) for n in range(calls)])
        unsent = [websocket.transport.get_write_buffer_size()]
        while unsent[-50:] != unsent[-1:] * 50:
            async with client(boards, "/ws") as other:
                await lives_on(other)
            unsent.append(websocket.transport.get_write_buffer_size())
        assert unsent[-1], "the server has read all 54 MB"
        assert [json.loads(await receive(websocket))["id"] for _ in range(calls)] == list(range(calls))


@pytest.mark.parametrize("leave", [vanish, reset], ids=["killed", "reset"])
async def test_a_killed_client_watches_no_more(boards: Server, leave: Leaving) -> None:
    """The log has no traceback."""
    mark = len(boards.log)
    async with client(boards, "/ws") as one, client(boards, "/ws") as poster:
        await ask(one, id=1, type="watch", board="news")
        assert (await ask(poster, id=1, type="post", board="news", text="x"))["count"] == 1
        await leave(one)
        async with client(boards, "/ws") as last:
            for _ in range(100):
                if (await ask(last, id=2, type="post", board="news", text="x"))["count"] == 0:
                    break
            else:
                pytest.fail("it still watches")
    assert tracebacks(boards.log[mark:]) == 0


async def test_the_last_calls_of_a_client_that_has_left_are_handled(boards: Server) -> None:
    """There are more of them than fit in its outbox, and nobody takes the replies."""
    calls = [json.dumps({"id": 1, "type": "echo", "text": ""})] * 1100
    async with client(boards, "/ws") as watcher, client(boards, "/ws") as poster:
        await ask(watcher, id=1, type="watch", board="news")
        frames = [Frame(Opcode.TEXT, call.encode()) for call in [*calls, json.dumps(POST)]]
        frames.append(Frame(Opcode.CLOSE, b""))
        # In one write, so that the server reads the close frame before it replies.
        poster.transport.write(b"".join(frame.serialize(mask=True) for frame in frames))
        assert json.loads(await receive(watcher))["text"] == "x"


@pytest.mark.parametrize(
    "text",
    ["NaN", "[1e999]", r'{"a": "\ud800"}', r'"\ud800"', '""', json.dumps("x" * 1001), "["],
    ids=["NaN", "infinity", "a surrogate in an object", "a surrogate", "empty", "too long", "not JSON"],
)
async def test_a_bad_body_gets_422(boards: Server, text: str) -> None:
    """The answer does not repeat it, because JSON cannot hold all of them. The log has no traceback."""
    mark = len(boards.log)
    async with client(boards, "/ws") as watcher:
        await ask(watcher, id=1, type="watch", board="news")
        with closing(HTTPConnection("127.0.0.1", boards.port)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/boards/news", f'{{"text": {text}}}', headers)
            assert connection.getresponse().status == 422
    assert tracebacks(boards.log[mark:]) == 0


@pytest.mark.parametrize("path", ["/ws", "/boards/news"])
async def test_a_foreign_page_is_refused(plain: Server, path: str) -> None:
    """As in server.py. A page may not push a message over HTTP either."""
    if path == "/ws":
        await check_foreign_page_is_refused(plain, path, "http://example.com")
    else:
        assert http(plain, path, {"text": "x"}, Origin="http://example.com")[0] == 403
        assert http(plain, path, {"text": "x"}, Origin=plain.url("", "http"))[0] == 200


# Pushes and questions from the server


def http(server: Server, path: str, body: object, **headers: str) -> tuple[int, Any]:
    """Post JSON. Return the status and the JSON that comes back."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    try:
        headers["Content-Type"] = "application/json"
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


async def test_an_http_route_pushes_to_a_topic(boards: Server) -> None:
    """Its subscribers get the message. Nobody else does."""
    async with client(boards, "/ws") as one, client(boards, "/ws") as other:
        await ask(one, id=1, type="watch", board="news")
        await ask(other, id=1, type="watch", board="jobs")
        answer = await asyncio.to_thread(http, boards, "/boards/news", {"text": "ä"})
        assert answer == (200, {"watchers": 1})
        note = {"type": "note", "board": "news", "author": "the server", "text": "ä"}
        assert json.loads(await receive(one)) == note
        assert await arrived(one) == await arrived(other) == []


async def asked(websocket: ClientConnection) -> int:
    """Wait for a question. Return its id."""
    question = json.loads(await receive(websocket))
    assert (question["type"], question["text"]) == ("question", "Shall we?")
    number: int = question["id"]
    return number


async def test_the_server_asks_its_clients(boards: Server) -> None:
    """An answer counts for the question with its id, and only from the client that was asked.

    A client that does not answer in time counts for nothing, and an answer that comes too late is ignored.
    """
    mark = len(boards.log)
    async with AsyncExitStack() as stack:
        yes, no, silent, stranger = [await stack.enter_async_context(client(boards, "/ws")) for _ in range(4)]
        for websocket in (yes, no, silent):
            await ask(websocket, id=1, type="watch", board="jobs")
        path = "/boards/jobs/questions"
        posting = asyncio.create_task(asyncio.to_thread(http, boards, path, {"text": "Shall we?"}))
        numbers = {websocket: await asked(websocket) for websocket in (silent, no, yes)}
        assert len(set(numbers.values())) == 3
        answer = {"type": "user.answer", "yes": True}
        await stranger.send(json.dumps({**answer, "id": numbers[silent]}))
        await no.send(json.dumps({**answer, "id": numbers[no], "yes": False}))
        await yes.send(json.dumps({**answer, "id": numbers[yes]}))
        await yes.send(json.dumps({**answer, "id": numbers[yes], "yes": False}))
        assert await posting == (200, {"yes": 1, "no": 1})
        await silent.send(json.dumps({**answer, "id": numbers[silent]}))
        for websocket in (yes, no, silent, stranger):
            await lives_on(websocket)
    assert tracebacks(boards.log[mark:]) == 0


async def test_a_handler_that_asks_its_own_client_fails_at_once(boards: Server) -> None:
    """The server reads no answer while the handler runs, so it must not wait for one."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        error = await ask(websocket, id=5, type="ask")
        assert (error["id"], error["reason"]) == (5, "the server failed")
    assert "RuntimeError: a handler cannot wait for its own client" in boards.log[mark:]


def test_a_router_adds_its_prefix_and_that_of_the_router_that_includes_it() -> None:
    """Two handlers for one type are refused when the server starts."""
    inner, outer = Router(prefix="user."), Router(prefix="v1.")

    @inner.on("rename")
    async def rename(call: Call, client: Client) -> None:
        pass

    outer.include(inner)
    assert list(inner.handlers) == ["user.rename"]
    assert list(outer.handlers) == list(outer.models) == ["v1.user.rename"]
    for twice in (lambda: outer.include(inner), lambda: inner.on("rename")):
        with pytest.raises(ValueError, match="rename has a handler already"):
            twice()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while a handler runs"])
async def test_ctrl_c_ends_the_server_within_a_second(busy: bool) -> None:
    """It closes its clients with 1012. A handler has one second to finish."""
    command = uvicorn_command("tests.typed_more:app")
    with running(command, env={"HANDLER_TIMEOUT": "60"}) as server:
        async with client(server, "/ws") as one, client(server, "/ws") as other:
            await lives_on(one)
            await lives_on(other)
            if busy:
                await one.send('{"id": 1, "type": "sleep"}')
                await (await one.ping())
            server.interrupt(signal.SIGINT)
            assert server.ends_within(2 if busy else 1) is not None, server.log
            for websocket in (one, other):
                await websocket.wait_closed()
                assert websocket.close_code == 1012
        assert tracebacks(server.log) == 0
