"""Messages with types: calls, replies, pushes and errors; and the documentation made from their models."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import async_playwright, expect
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from tests.checks import Leaving, check_foreign_page_is_refused
from tests.harness import (
    ROOT,
    TIMEOUT,
    Server,
    arrived,
    client,
    narrow,
    receive,
    reset,
    running,
    until,
    uvicorn_command,
    vanish,
    write,
)
from tests.test_playground import CHROMIUM, FLAGS

TYPESCRIPT = ROOT / "tests" / "typescript"
MODULES = TYPESCRIPT / "node_modules"
COMPONENT = MODULES / "@asyncapi" / "react-component"
BIN = Path(sys.executable).parent
TSC = str(MODULES / "typescript" / "bin" / "tsc")
NODE = shutil.which("node", path=str(BIN)) or "node"
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def boards() -> Iterator[Server]:
    """The lesson, with a router of another file whose handlers go wrong, and a copy of the component."""
    env = {"ASYNCAPI_COMPONENT": str(COMPONENT)}
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
    """From the first to the last that JavaScript can count to."""
    async with client(boards, "/ws") as websocket:
        reply = await ask(websocket, id=number, type="post", board="jobs", text="!")
        assert reply == {"id": number, "type": "watchers", "count": 0}


async def test_calls_sent_ahead_are_answered_in_order(boards: Server) -> None:
    """More of them than the outbox holds."""
    async with client(boards, "/ws") as websocket:
        write(websocket, [json.dumps({"id": n, "type": "echo", "text": "x"}) for n in range(3000)])
        assert [json.loads(await receive(websocket))["id"] for _ in range(3000)] == list(range(3000))


async def test_a_note_is_pushed_to_those_who_watch_its_board(boards: Server) -> None:
    """And to nobody else; it says who posted it, which the handler has from the endpoint's dependency."""
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
    """More notes at once than an outbox holds: a watcher that reads has them all, and so has the poster."""
    notes = 3000
    post = json.dumps({"id": 1, "type": "post", "board": "news", "text": "x"})
    async with client(boards, "/ws") as reader, client(boards, "/ws") as poster:
        for websocket in (reader, poster):
            await ask(websocket, id=1, type="watch", board="news")
        write(poster, [post] * notes)
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
        ('{"id": 1, "text": "x"}', 1, [], "Unable to extract tag"),
        (
            '{"id": 2, "type": "ech"}',
            2,
            [],
            "does not match any of the expected tags: 'watch', 'post', 'echo'",
        ),
        ('{"id": 3, "type": "%s"}' % ("x" * 100_000), 3, [], "Input tag 'xxx"),
        ('{"id": 4, "type": {}}', 4, [], "Input tag '{}'"),
        ('{"id": 5, "type": "echo"}', 5, ["echo", "text"], "Field required"),
        ('{"id": 6, "type": "watch", "board": "lost"}', 6, ["watch", "board"], "should be 'news' or 'jobs'"),
        (
            '{"id": 7, "type": "post", "board": "news", "text": ""}',
            7,
            ["post", "text"],
            "at least 1 character",
        ),
        ('{"type": "fail"}', None, ["fail", "id"], "Field required"),
        ('{"id": "1", "type": "fail"}', None, ["fail", "id"], "should be a valid integer"),
        ('{"id": true, "type": "fail"}', None, ["fail", "id"], "should be a valid integer"),
        ('{"id": 9007199254740992, "type": "fail"}', None, ["fail", "id"], "less than 9007199254740992"),
        ('{"id": -1, "type": "fail"}', None, ["fail", "id"], "greater than or equal to 0"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else None,
)
async def test_a_bad_message_gets_an_error(
    boards: Server, frame: str, number: int | None, loc: list[str], says: str
) -> None:
    """With Pydantic's details, shortened, and the id where it can be read. The connection lives on."""
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
    assert "Traceback" not in boards.log[mark:]


async def test_a_binary_frame_gets_an_error(boards: Server) -> None:
    async with client(boards, "/ws") as websocket:
        await websocket.send(b'{"id": 1, "type": "watch", "board": "news"}')
        error = json.loads(await receive(websocket))
        assert (error["type"], error["reason"]) == ("error", "a binary frame: send messages as text")
        await lives_on(websocket)


async def test_a_message_over_a_mebibyte_ends_the_connection(boards: Server) -> None:
    """With 1009; one of exactly that size does not."""
    async with client(boards, "/ws") as websocket:
        frame = '{"id": 1, "type": "echo", "text": "ä"}'
        frame += " " * (MEGABYTE - len(frame.encode()))
        await websocket.send(frame)
        assert json.loads(await receive(websocket))["type"] == "echoed"
        await websocket.send(frame + " ")
        await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1009, "a message has at most 1048576 bytes")


@pytest.mark.parametrize(
    ("kind", "cause"), [("fail", "ValueError: a handler's mistake"), ("sleep", "TimeoutError")]
)
async def test_a_handler_goes_wrong(boards: Server, kind: str, cause: str) -> None:
    """Or takes too long: the caller gets an error with its id, the log one entry; the connection lives on."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        error = await ask(websocket, id=5, type=kind)
        assert error == {"type": "error", "id": 5, "reason": "the server failed", "details": []}
        await lives_on(websocket)
    log = boards.log[mark:]
    assert log.count("ERROR") == 1
    assert "ERROR:    call 5 of 127.0.0.1:" in log
    assert f"\n{cause}\n" in log


# Connections


async def test_who_does_not_read_is_cut_off_and_delays_nobody(boards: Server) -> None:
    """With the outbox full; the other watcher has each note, and what the server holds is bounded."""
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
        cut = (
            f"client 127.0.0.1:{stuck.local_address[1]} closed with 1013: you read too slowly: connect again"
        )
        await until(lambda: cut in boards.log[mark:], "the stuck one to be cut off")
        assert (await ask(poster, id=1, type="post", board="jobs", text="x"))["count"] == 1
        assert boards.rss() - before < 8 * MEGABYTE  # of the 15 that were sent to it
        stuck.transport.abort()
    assert "Traceback" not in boards.log[mark:]


async def test_who_reads_no_replies_is_not_read_either(boards: Server) -> None:
    """It gets all of them once it reads; nothing is cut off, for it delays only itself."""
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
async def test_who_is_killed_watches_no_more(boards: Server, leave: Leaving) -> None:
    """And the log has no traceback of it."""
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
    assert "Traceback" not in boards.log[mark:]


async def test_a_foreign_page_is_refused() -> None:
    """As in server.py. And where there is a TOKEN, so is who does not bring it; the documentation says so."""
    with running(uvicorn_command("lessons.typed_server:app"), env={"TOKEN": "geheim"}) as server:
        for token in ({}, {"Authorization": "Bearer falsch"}, {"Authorization": "geheim"}):
            with pytest.raises(InvalidStatus, match="HTTP 403"):
                async with client(server, "/ws", additional_headers=token):
                    pass
        headers = {"Authorization": "Bearer geheim"}
        async with client(server, "/ws", additional_headers=headers) as websocket:
            assert (await ask(websocket, id=1, type="watch", board="news"))["count"] == 1
        await check_foreign_page_is_refused(server, "/ws", "http://example.com")
        assert document(server)["servers"]["this"]["security"] == [{"type": "http", "scheme": "bearer"}]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while a handler runs"])
async def test_ctrl_c(busy: bool) -> None:
    """The server ends within a second, quietly, and tells its clients with 1012; a handler has one second."""
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
        assert "Traceback" not in server.log


# The documentation


def document(server: Server) -> dict[str, Any]:
    status, kind, body = server.get("/asyncapi.json")
    assert (status, kind) == (200, "application/json")
    return json.loads(body)  # type: ignore[no-any-return]


def test_the_official_parser_takes_the_document(boards: Server) -> None:
    """Without a warning; and it refuses one that is broken, wherever that may be."""
    text = json.dumps(document(boards))
    breaks = {
        ('"action": "receive"', '"action": "subscribe"'): "operations.Watch.action: ",
        ('"$ref": "#/components/schemas/Detail"', '"$ref": "#/components/schemas/No"'): "does not exist",
        ('"type": "integer"', '"type": "whole"'): "components.schemas.",
        ('"$message.payload#/id"', '"id"'): "correlationId.location: ",
        ('"protocol": "ws", ', ""): 'must have required property "protocol"',
    }
    texts = [text, *(text.replace(old, new) for old, new in breaks)]
    assert text not in texts[1:]
    found, *broken = json.loads(
        subprocess.check_output(
            [NODE, "validate.mjs"], cwd=TYPESCRIPT, input=json.dumps([*map(json.loads, texts)]), text=True
        )
    )
    assert not found
    for errors, says in zip(broken, breaks.values(), strict=True):
        assert any(says in error for error in errors), errors


def test_the_document_says_what_is_received_replied_and_sent(boards: Server) -> None:
    """From the server's point of view; also of a router in another file."""
    spec = document(boards)
    assert spec["servers"]["this"] == {"host": f"127.0.0.1:{boards.port}", "protocol": "ws", "security": []}

    def names(operation: dict[str, Any]) -> list[str]:
        return [message["$ref"].removeprefix("#/channels/ws/messages/") for message in operation["messages"]]

    received = {
        tuple(names(operation)): names(operation["reply"])
        for operation in spec["operations"].values()
        if operation["action"] == "receive"
    }
    assert received == {
        ("Watch",): ["Watchers", "Error"],
        ("Post",): ["Watchers", "Error"],
        ("Echo",): ["Echoed", "Error"],
        ("Fail",): ["Echoed", "Error"],
        ("Sleep",): ["Echoed", "Error"],
    }
    sent = [names(operation) for operation in spec["operations"].values() if operation["action"] == "send"]
    assert sent == [["Note"], ["Error"]]
    assert spec["operations"]["Echo"]["summary"] == "Say it again."
    post = spec["components"]["schemas"]["Post"]
    assert post["properties"]["text"] == {"type": "string", "minLength": 1, "maxLength": 1000}
    assert post["required"] == ["id", "type", "board", "text"]
    assert spec["components"]["schemas"]["Note"]["required"] == ["type", "board", "author", "text"]


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_types_are_made_from_the_document(plain: Server, tmp_path: Path) -> None:
    """The README's command makes the types that lie beside the client, which runs against the server."""
    readme = (ROOT / "lessons" / "typed_server.md").read_text()
    [command] = re.findall(r"^(python -c .*json2ts.*)$", readme, re.MULTILINE)
    made = tmp_path / "made.mts"
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{plain.port}")
    command = command.replace("tests/typescript/messages.mts", str(made))
    code, says = run("bash", "-c", f"set -o pipefail; PATH={BIN}:$PATH; {command}")
    assert code == 0, says
    assert made.read_text() == (TYPESCRIPT / "messages.mts").read_text()
    printed = run(NODE, "tests/typescript/client.mts", plain.url("/ws"))
    assert printed == (0, "watchers: 1\nnews: hello from TypeScript\n")


def test_the_types_find_mistakes(tmp_path: Path) -> None:
    """`tsc --strict` accepts the client, and finds a wrong board and a forgotten message."""
    (tmp_path / "messages.mts").symlink_to(TYPESCRIPT / "messages.mts")
    text = (TYPESCRIPT / "client.mts").read_text()
    for old, new in {
        'type: "post", board: "news"': 'type: "post", board: "nws"',
        '    case "note":\n      return show(message);\n': "",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "broken.mts").write_text(text)
    settings = {
        "extends": str(TYPESCRIPT / "tsconfig.json"),
        "compilerOptions": {"typeRoots": [str(MODULES / "@types")]},
        "files": [str(TYPESCRIPT / "client.mts"), "broken.mts"],
    }
    (tmp_path / "tsconfig.json").write_text(json.dumps(settings))
    code, says = run(NODE, TSC, "-p", str(tmp_path))
    assert code != 0
    assert says.count(": error") == len(re.findall(r"broken\.mts\(\d+,\d+\): error", says)) == 2, says
    assert "Type '\"nws\"' is not assignable" in says
    assert "Type 'Note' does not satisfy the expected type 'never'" in says


def test_the_lock_file_names_no_registry_but_npms() -> None:
    lock = (TYPESCRIPT / "package-lock.json").read_text()
    assert set(re.findall(r'"resolved": "(https?://[^/]*)', lock)) <= {"https://registry.npmjs.org"}


def test_the_page_loads_the_component_from_a_cdn(plain: Server) -> None:
    """Where no copy is given: the version that the tests have, and nothing but these very files."""
    _, _, page = plain.get("/asyncapi")
    version = json.loads((COMPONENT / "package.json").read_text())["version"]
    url = f"https://cdn.jsdelivr.net/npm/@asyncapi/react-component@{version}/"
    loaded = re.findall(rf'(?:href|src)="{re.escape(url)}(\S+)" crossorigin\s+integrity="sha384-(\S+)"', page)
    assert len(loaded) == page.count("https://") == 2
    for name, digest in loaded:
        assert base64.b64encode(hashlib.sha384((COMPONENT / name).read_bytes()).digest()).decode() == digest


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no browser here: install Chromium")
async def test_the_page_shows_the_document(boards: Server) -> None:
    """In a browser, from the local copy: all comes from this server, and its console stays empty."""
    problems: list[str] = []
    requested: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        await page.goto(boards.url("/asyncapi", "http"))
        for text in ("Show a note to all who watch a board.", "Say it again.", "Operation IDPost"):
            await expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * TIMEOUT)
        await browser.close()
    assert not problems
    assert all(url.startswith((boards.url("/", "http"), "data:")) for url in requested), requested
