"""The document that asyncapi_server.py makes, the page that shows it, and TypeScript types from it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import WebSocket
from playwright.async_api import Page, Route, async_playwright, expect
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from lessons.asyncapi_server import Notes, Post, Read, Router
from tests.checks import Leaving
from tests.kit.browser import FLAGS
from tests.kit.clients import client, receive, reset, vanish
from tests.kit.commands import uvicorn_command
from tests.kit.needs import CHROMIUM, needs_browser
from tests.kit.root import ROOT
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import TIMEOUT, until

TYPESCRIPT = ROOT / "tests" / "typescript"
MODULES = TYPESCRIPT / "node_modules"
COMPONENT = MODULES / "@asyncapi" / "react-component"
BIN = Path(sys.executable).parent
TSC = str(MODULES / "typescript" / "bin" / "tsc")
NODE = shutil.which("node", path=str(BIN)) or "node"


@pytest.fixture(scope="module")
def boards() -> Iterator[Server]:
    """The lesson, with a handler from another file. It finds the copy of the component by itself."""
    with running(uvicorn_command("tests.asyncapi_more:app")) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """The lesson as it is, where no copy of the component is installed."""
    env = {"ASYNCAPI_COMPONENT": "/nowhere"}
    with running(uvicorn_command("lessons.asyncapi_server:app"), env=env) as server:
        yield server


async def test_calls_get_replies_and_errors(boards: Server) -> None:
    """The server answers as typed_server.py does. A board keeps its last notes."""
    calls = [
        {"id": 1, "type": "post", "board": "jobs", "text": "x"},
        {"id": 2, "type": "read", "board": "jobs"},
        {"id": 3, "type": "rea"},
        {"id": 4, "type": "read"},
    ]
    async with client(boards, "/ws") as websocket:
        for call in calls:
            await websocket.send(json.dumps(call))
        await websocket.send(b"binary")
        answers = [json.loads(await receive(websocket)) for _ in range(6)]
    replies = [{"id": 1, "type": "notes", "count": 1}, {"type": "note", "board": "jobs", "text": "x"}]
    assert answers[:3] == [*replies, {"id": 2, "type": "notes", "count": 1}]
    assert [(error["type"], error["id"]) for error in answers[3:]] == [
        ("error", 3),
        ("error", 4),
        ("error", None),
    ]
    assert [error["details"][0]["loc"] for error in answers[3:]] == [["type"], ["board"], []]


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        ({"type": "fail", "how": "file"}, "pydantic_core._pydantic_core.PydanticSerializationError"),
        ({"type": "fail", "how": "wait"}, "asyncio.exceptions.CancelledError"),
        ({"type": "fail", "how": "runtime"}, "RuntimeError: a handler's mistake"),
        ({"type": "fail", "how": "validation"}, "pydantic_core._pydantic_core.ValidationError"),
        ({"type": "pick", "text": "unknown"}, "KeyError: 'unknown'"),
    ],
    ids=["a reply that is not UTF-8", "a cancelled task", "RuntimeError", "ValidationError", "a validator"],
)
async def test_a_handler_or_a_validator_that_fails_is_an_error(
    boards: Server, call: dict[str, str], cause: str
) -> None:
    """The caller gets an error with its id, the log gets the traceback, and the connection lives on."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        await websocket.send(json.dumps({"id": 5, **call}))
        error = json.loads(await receive(websocket))
        assert error == {"type": "error", "id": 5, "reason": "the server failed", "details": []}
        await websocket.send('{"id": 6, "type": "echo", "text": "?"}')
        assert json.loads(await receive(websocket)) == {"id": 6, "type": "echoed", "text": "?"}
    assert f"\n{cause}" in boards.log[mark:]


@pytest.mark.parametrize("leave", [vanish, reset, ClientConnection.close], ids=["killed", "reset", "closed"])
async def test_a_client_that_leaves_while_a_handler_sends_is_no_failure(
    boards: Server, leave: Leaving
) -> None:
    """The log has no traceback."""
    mark = len(boards.log)
    async with client(boards, "/ws") as websocket:
        await websocket.send('{"id": 1, "type": "flood"}')
        await receive(websocket)
        await leave(websocket)
        await until(lambda: "the flood is over" in boards.log[mark:], "the handler to end")
    async with client(boards, "/ws") as websocket:
        await websocket.send('{"id": 6, "type": "echo", "text": "?"}')
        await receive(websocket)
    assert tracebacks(boards.log[mark:]) == 0


async def test_the_document_says_that_a_token_is_needed() -> None:
    """If there is a TOKEN, a client without it gets 403. A page from another site gets 403 in any case."""
    with running(uvicorn_command("lessons.asyncapi_server:app"), env={"TOKEN": "geheim"}) as server:
        for token in ({}, {"Authorization": "Bearer falsch"}, {"Authorization": "geheim"}):
            with pytest.raises(InvalidStatus, match="HTTP 403"):
                async with client(server, "/ws", additional_headers=token):
                    pass
        headers = {"Authorization": "Bearer geheim"}
        async with client(server, "/ws", additional_headers=headers) as websocket:
            await websocket.send('{"id": 1, "type": "read", "board": "news"}')
            assert json.loads(await receive(websocket))["count"] == 0
            with pytest.raises(InvalidStatus, match="HTTP 403"):
                async with client(server, "/ws", additional_headers=headers, origin="http://example.com"):
                    pass
        assert document(server)["servers"]["this"]["security"] == [{"type": "http", "scheme": "bearer"}]


def document(server: Server) -> dict[str, Any]:
    status, kind, body = server.get("/asyncapi.json")
    assert (status, kind) == (200, "application/json")
    return json.loads(body)  # type: ignore[no-any-return]


def test_the_official_parser_accepts_the_document(boards: Server) -> None:
    """It prints no warning. It refuses a document that is broken, in any part."""
    text = json.dumps(document(boards))
    breaks = {
        ('"action": "receive"', '"action": "subscribe"'): "operations.read.action: ",
        ('"$ref": "#/components/schemas/Note"', '"$ref": "#/components/schemas/No"'): "does not exist",
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


def test_the_document_says_what_the_server_receives_replies_and_sends(boards: Server) -> None:
    """This includes the messages of a router in another file."""
    spec = document(boards)
    assert spec["servers"]["this"] == {"host": f"127.0.0.1:{boards.port}", "protocol": "ws", "security": []}

    def names(operation: dict[str, Any]) -> list[str]:
        return [message["$ref"].removeprefix("#/channels/ws/messages/") for message in operation["messages"]]

    operations = spec["operations"]
    received = {
        tuple(names(operations[kind])): names(operations[kind]["reply"]) for kind in ("read", "post", "echo")
    }
    assert received == {
        ("Read",): ["Notes", "Error"],
        ("Post",): ["Notes", "Error"],
        ("Echo",): ["Echoed", "Error"],
    }
    sent = [names(operation) for operation in operations.values() if operation["action"] == "send"]
    assert sent[:2] == [["Note"], ["Error"]]
    assert spec["operations"]["echo"]["summary"] == "Say it again."
    post = spec["components"]["schemas"]["Post"]
    assert post["properties"]["text"] == {"type": "string", "minLength": 1, "maxLength": 1000}
    assert post["required"] == ["id", "type", "board", "text"]
    assert post["properties"]["type"]["const"] == "post"
    assert spec["components"]["schemas"]["Note"]["required"] == ["type", "board", "text"]


def test_a_model_can_be_both_received_and_sent(boards: Server) -> None:
    """A field with a default may be missing in a call, and is there in all that the server sends.

    A reply can be a union of models. Two models can have the same name.
    """
    spec = document(boards)

    def find(ref: dict[str, str]) -> dict[str, Any]:
        found = spec
        for part in ref["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return found

    def schemas(operation: dict[str, Any]) -> list[dict[str, Any]]:
        return [find(find(message)["payload"]) for message in operation["messages"]]

    [call] = schemas(spec["operations"]["draft"])
    assert call["required"] == ["id", "type"]
    reply, error = schemas(spec["operations"]["draft"]["reply"])
    assert error["title"] == "Error"
    sends = [operation for operation in spec["operations"].values() if operation["action"] == "send"]
    *_, [sent], [archived] = map(schemas, sends)
    assert sent == find(reply["properties"]["draft"])
    assert sent["required"] == ["id", "type", "text"]
    assert call["properties"]["type"]["const"] == sent["properties"]["type"]["const"] == "draft"
    assert archived["required"] == ["type", "year"]


def test_a_handler_without_a_model_of_its_own_is_refused() -> None:
    """So is a handler that does not say which model it returns. The server does not start."""
    router = Router()

    async def read(call: Read, websocket: WebSocket) -> Notes:
        return Notes(id=call.id, count=0)

    async def post(call: Post, websocket: WebSocket) -> None:
        pass

    router.on("read")(read)
    with pytest.raises(ValueError, match="reread needs a model of its own: Read has a handler"):
        router.on("reread")(read)
    untyped: Any = post
    with pytest.raises(TypeError, match="the handler of post must return a Message, not <class 'NoneType'>"):
        router.on("post")(untyped)
    assert list(router.handlers) == ["read"]


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_types_are_made_from_the_document(plain: Server, tmp_path: Path) -> None:
    """The page's command makes messages.mts, and the client beside it runs against the server."""
    readme = (ROOT / "lessons" / "asyncapi_server.md").read_text()
    [command] = re.findall(r"^(python -c .*json2ts.*)$", readme, re.MULTILINE)
    made = tmp_path / "made.mts"
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{plain.port}")
    command = command.replace("tests/typescript/messages.mts", str(made))
    code, says = run("bash", "-c", f"set -o pipefail; PATH={BIN}:$PATH; {command}")
    assert code == 0, says
    assert made.read_text() == (TYPESCRIPT / "messages.mts").read_text()
    printed = run(NODE, "tests/typescript/client.mts", plain.url("/ws"))
    assert printed == (0, "notes: 1\nnews: hello from TypeScript\n")


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


def test_no_other_site_can_show_the_page_in_a_frame(plain: Server) -> None:
    with urllib.request.urlopen(plain.url("/asyncapi", "http")) as response:
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_the_page_loads_the_component_from_a_cdn(plain: Server) -> None:
    """If no copy is installed, it loads the version that the tests have, and no other files."""
    _, _, page = plain.get("/asyncapi")
    version = json.loads((COMPONENT / "package.json").read_text())["version"]
    url = f"https://cdn.jsdelivr.net/npm/@asyncapi/react-component@{version}/"
    loaded = re.findall(rf'(?:href|src)="{re.escape(url)}(\S+)" crossorigin\s+integrity="sha384-(\S+)"', page)
    assert len(loaded) == len(re.findall(r'(?:href|src)="https:', page)) == 2
    for name, digest in loaded:
        assert base64.b64encode(hashlib.sha384((COMPONENT / name).read_bytes()).digest()).decode() == digest


@asynccontextmanager
async def browsing(server: Server) -> AsyncIterator[tuple[Page, list[str], list[str]]]:
    """Open /asyncapi in a browser that reaches nothing but the server.

    The lists are what the browser's console said, and which addresses the page has asked for.
    """
    problems: list[str] = []
    requested: list[str] = []

    async def answer(route: Route) -> None:
        requested.append(route.request.url)
        if route.request.url.startswith((server.url("/", "http"), "data:")):
            await route.continue_()
        else:
            await route.abort("internetdisconnected")

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.route("**/*", answer)
        await page.goto(server.url("/asyncapi", "http"))
        yield page, problems, requested
        await browser.close()


@needs_browser
async def test_the_page_shows_the_document_with_its_styles(boards: Server) -> None:
    """With an installed copy, everything comes from this server, and the console stays empty."""
    async with browsing(boards) as (page, problems, requested):
        for text in ("Put a note on a board.", "Say it again.", "Operation IDpost"):
            await expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * TIMEOUT)
        sheets = "[...document.styleSheets].map(sheet => sheet.cssRules.length)"
        rules = await page.evaluate(sheets)
        assert len(rules) == 1
        assert rules[0] > 100
        # Without the stylesheet, the title has the browser's 16 pixels.
        size = "getComputedStyle(document.querySelector('.aui-root .text-4xl')).fontSize"
        assert await page.evaluate(size) == "36px"
        assert await page.locator("html").get_attribute("lang") == "en"
        assert await page.locator("head link[rel=stylesheet]").count() == 1
        assert await page.locator("#asyncapi .aui-root").count() == 1
    assert not problems
    assert all(url.startswith((boards.url("/", "http"), "data:")) for url in requested), requested


@needs_browser
async def test_the_page_says_what_is_missing(plain: Server) -> None:
    """If no copy is installed, and the network is down, the page says how to install one."""
    async with browsing(plain) as (page, _, requested):
        text = page.get_by_text("AsyncAPI's React component is missing")
        await expect(text).to_be_visible(timeout=1000 * TIMEOUT)
        await expect(text).to_contain_text("npm ci --prefix tests/typescript")
    assert any(url.startswith("https://cdn.jsdelivr.net/") for url in requested)
