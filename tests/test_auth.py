"""auth_server.py: who may connect, and until when. The naive server fails what is checked of both."""

import asyncio
import base64
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.async_api import async_playwright, expect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from tests.checks import check_foreign_page_is_refused, end, fails
from tests.kit.browser import FLAGS
from tests.kit.clients import client, numbered, receive, receive_all, write
from tests.kit.commands import CONSUMER, PRODUCER, uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.needs import CHROMIUM, needs_browser
from tests.kit.root import ROOT
from tests.kit.scripts import Script
from tests.kit.servers import Server, running, tracebacks
from tests.kit.tokens import KEY, header, log_in, pair, request, token
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

COMMAND = uvicorn_command("lessons.auth_server:app")
NAIVE = uvicorn_command("lessons.naive.auth_server:app")
FIRST_MESSAGE = uvicorn_command("tests.examples.auth_first_message:app")
PUBSUB = uvicorn_command("tests.examples.auth_pubsub:app")
PLACES = 10  # in the queue of the small server
SMALL = with_constants(
    "lessons.auth_server",
    f"lesson.channel = lesson.Channel({PLACES})",
    TIMEOUT=60,
    ALLOWED_ORIGINS=["https://app.example"],
)
IMPATIENT = with_constants("tests.examples.auth_first_message", TOKEN_TIMEOUT=1.5)
SCOPES = {PRODUCER: "produce", CONSUMER: "consume"}
FASTAPI = tuple(int(part) for part in version("fastapi").split(".")[:2])
PATHS = pytest.mark.parametrize("path", [PRODUCER, CONSUMER])


def queued(server: Server) -> int:
    number: int = request(server, "/stats", bearer=token(""))[2]["queued"]
    return number


@pytest.fixture(scope="module")
def door() -> Iterator[Server]:
    with running(COMMAND, env={"SECRET_KEY": KEY}) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest.fixture(scope="module")
def late_door() -> Iterator[Server]:
    """A server that also takes the token as the first message."""
    with running(FIRST_MESSAGE, env={"SECRET_KEY": KEY}) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with a small queue, which admits pages of another site."""
    with running(SMALL, env={"SECRET_KEY": KEY}) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest.fixture(scope="module")
def naive_door() -> Iterator[Server]:
    with running(NAIVE, env={"SECRET_KEY": KEY}) as server:
        yield server


# To show a token


async def test_a_login_gives_a_token_with_the_scopes_of_the_user(door: Server) -> None:
    """It has all scopes, or the chosen ones. It opens both websockets, and is not cached."""
    status, headers, answer = log_in(door, "alice", "wonderland")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert (answer["token_type"], answer["expires_in"], answer["scope"]) == (
        "bearer",
        3600,
        "consume produce",
    )
    claims = jwt.decode(answer["access_token"], KEY, ["HS256"])
    assert (claims["sub"], claims["scope"]) == ("alice", "consume produce")
    assert 3590 < claims["exp"] - time.time() <= 3600
    for path in SCOPES:
        async with client(door, path, **header(answer["access_token"])):
            pass
    _, _, asked = log_in(door, "bob", "builder", scope="consume produce admin")
    assert asked["scope"] == "consume"
    assert log_in(door, "alice", "wonderland", scope="consume")[2]["scope"] == "consume"


WAYS = [("door", "header"), ("door", "pair")]
WAYS += [("late_door", "header"), ("late_door", "pair"), ("late_door", "first message")]


@pytest.mark.parametrize(("name", "way"), WAYS)
async def test_a_token_may_come_in_three_ways(request: pytest.FixtureRequest, name: str, way: str) -> None:
    """A header, a second subprotocol, or the first message. None of them puts it into the log."""
    door: Server = request.getfixturevalue(name)
    text = token(jti=way)
    options = {"header": header(text), "pair": pair(text), "first message": pair()}[way]
    async with client(door, PRODUCER, **options) as producer, client(door, CONSUMER, **options) as consumer:
        for websocket in (producer, consumer):
            assert websocket.subprotocol == (None if way == "header" else "bearer")
            if way == "first message":
                await websocket.send(text)
        await producer.send('{"a":  1}')
        assert await receive(producer) == await receive(consumer) == '{"a":  1}'
    assert text not in door.log


NESTED = base64.urlsafe_b64encode(b"[" * 2900).decode().rstrip("=")  # more than Python's parser can stand
BAD = {
    "junk": "junk",
    "not ASCII": "ÿ.ÿ.ÿ",
    "no signature": jwt.encode({"sub": "alice", "exp": 2**33, "scope": "produce consume"}, None, "none"),
    "another key": token(key=KEY[::-1]),
    "changed": token() + "A",
    "too long": token(jti="x" * 5000),
    "nested": f"{NESTED}.e30.e30",
    "no sub": token(sub=None),
    "no exp": token(exp=None),
    "no scope": token(scope=None),
    "sub is a number": token(sub=5),
    "exp is a text": token(exp="soon"),
    "exp is infinite": token(exp=math.inf),
    "claims are a list": jwt.api_jws.encode(b"[]", KEY, "HS256"),
    "expired": token(lasts=-10),
    "scope is a list": token(["produce", "consume"]),
    "scope is another": token("produces consumer"),
}


async def refusal(server: Server, path: str, **options: Any) -> tuple[int, str, str]:
    """Status, challenge and reason, where it does not even come to a websocket."""
    with pytest.raises(InvalidStatus) as caught:
        async with client(server, path, **options):
            pass
    response = caught.value.response
    return (
        response.status_code,
        response.headers.get("WWW-Authenticate", ""),
        json.loads(response.body)["detail"],
    )


@PATHS
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused(door: Server, late_door: Server, path: str, name: str) -> None:
    """A handshake gets 401, or 403 for a wrong scope, and a reason. A first message gets 1008."""
    reason = "the token has expired" if name == "expired" else "the token is not valid"
    status, error = 401, "invalid_token"
    if name.startswith("scope"):
        status, error, reason = 403, "insufficient_scope", f"a token with the scope {SCOPES[path]} is needed"
    expected = status, f'Bearer error="{error}"', reason
    assert await refusal(door, path, **header(BAD[name])) == expected
    if name != "not ASCII":  # which a subprotocol is not
        assert await refusal(door, path, **pair(BAD[name])) == expected
    async with client(late_door, path, **pair()) as websocket:
        await websocket.send(BAD[name])
        await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1008, reason)


BASIC = {"additional_headers": {"Authorization": "Basic YWxpY2U6d29uZGVybGFuZA=="}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        BASIC,
        {**BASIC, **pair(token())},
        {"additional_headers": [("Authorization", f"Bearer {token()}")] * 2},
        {"subprotocols": [Subprotocol("chat"), Subprotocol("bearer")]},
        pair(token(), "chat"),
        pair(),
    ],
)
@PATHS
async def test_a_client_without_a_token_is_refused(door: Server, path: str, options: dict[str, Any]) -> None:
    """It gets 401 and a plain challenge. A token in the URL does not count, nor do two tokens."""
    for url in (path, f"{path}?token=T&access_token=T"):
        assert await refusal(door, url, **options) == (401, "Bearer", "a token is needed")


BEARER = """
from fastapi import Depends, FastAPI, WebSocket
from fastapi.security import HTTPBearer, OAuth2PasswordBearer

app = FastAPI()


async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()


for path, scheme in [("/a", HTTPBearer()), ("/b", OAuth2PasswordBearer("token"))]:
    app.websocket(path, dependencies=[Depends(scheme)])(endpoint)
"""


@pytest.mark.skipif(FASTAPI < (0, 144), reason="FastAPI's classes take websockets since 0.144")
async def test_fastapi_has_a_class_for_the_header(tmp_path: Path) -> None:
    """As the page says, it refuses a websocket without a token with 401 and WWW-Authenticate."""
    (tmp_path / "bearer.py").write_text(BEARER)
    with running(with_options(uvicorn_command("bearer:app"), "--app-dir", str(tmp_path))) as server:
        for path in ("/a", "/b"):
            assert await refusal(server, path) == (401, "Bearer", "Not authenticated")
            async with client(server, path, **header("junk")):
                pass


async def test_stats_need_a_token_and_the_page_does_not(door: Server) -> None:
    """Any valid token will do."""
    status, headers, answer = request(door, "/stats")
    assert (status, headers["www-authenticate"], answer["detail"]) == (401, "Bearer", "a token is needed")
    status, headers, _ = request(door, "/stats", bearer="junk")
    assert (status, "invalid_token" in headers["www-authenticate"]) == (401, True)
    assert request(door, "/stats", bearer=token(""))[0] == 200
    assert door.get("/")[0] == 200


async def test_a_first_message_without_a_token_is_refused() -> None:
    """A binary message, no message in time, and a token that expires later: all close with 1008."""
    with running(IMPATIENT, env={"SECRET_KEY": KEY}) as server:
        for path in SCOPES:
            mark = len(server.log)
            async with client(server, path, **pair()) as binary:
                await binary.send(b"\xff")
                await binary.wait_closed()
                assert (binary.close_code, binary.close_reason) == (1008, "the token is not valid")
            async with client(server, path, **pair()):
                pass
            left = "closed with 1001: the connection ended before a token came"
            await until(lambda: left in server.log[mark:], "the line")  # noqa: B023
            async with client(server, path, **pair()) as silent:
                await silent.wait_closed()
                assert silent.close_code == 1008
                assert silent.close_reason == "no token came within 1.5 s"
            async with client(server, path, **pair()) as short:
                await short.send(token(lasts=1))
                await short.wait_closed()
                assert (short.close_code, short.close_reason) == (1008, "the token has expired")
        assert tracebacks(server.log) == 0


@PATHS
async def test_a_foreign_page_is_refused_unless_it_is_allowed(small: Server, path: str) -> None:
    """A token does not help it."""
    async with client(small, path, origin="https://app.example", **pair(token())):
        pass
    for origin in ("https://app.example.evil.example", "null"):
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            async with client(small, path, origin=origin, **pair(token())):
                pass
    await check_foreign_page_is_refused(small, path, "http://evil.example")


# For how long


async def check_ends_at_expiry(server: Server, path: str, **options: Any) -> None:
    """An open connection, with a token of a second or so: options bring it."""
    async with client(server, path, **options) as websocket:
        try:
            async with asyncio.timeout(1 + SLOWNESS):
                await websocket.wait_closed()
        except TimeoutError:
            raise AssertionError("open after its token has expired") from None
        assert (websocket.close_code, websocket.close_reason) == (1008, "the token has expired")


async def test_a_connection_ends_with_its_token(door: Server) -> None:
    """Producers and consumers are closed, however the token came. No more payloads go to them."""
    short = token(lasts=1)
    async with asyncio.TaskGroup() as group:
        for path in SCOPES:
            group.create_task(check_ends_at_expiry(door, path, **header(short)))
            group.create_task(check_ends_at_expiry(door, path, **pair(short)))
    payloads = numbered(20)
    async with client(door, PRODUCER, **header(token())) as producer:
        write(producer, payloads)
        for payload in payloads:
            assert await receive(producer) == payload
    async with client(door, CONSUMER, **header(token())) as consumer:
        assert [await receive(consumer) for _ in payloads] == payloads


async def test_a_payload_that_waits_when_its_token_expires_is_not_queued(small: Server) -> None:
    """It has no receipt."""
    async with client(small, PRODUCER, **header(token())) as producer:
        write(producer, numbered(PLACES))
        assert [await receive(producer) for _ in range(PLACES)] == numbered(PLACES)
        await check_waiting(small)
    assert queued(small) == PLACES
    async with client(small, CONSUMER, **header(token())) as consumer:
        for _ in range(PLACES):
            await receive(consumer)


async def check_waiting(server: Server) -> None:
    async with client(server, PRODUCER, **header(token(lasts=1))) as late:
        await late.send('"late"')
        assert await receive_all(late) == []
        assert (late.close_code, late.close_reason) == (1008, "the token has expired")


async def test_a_large_payload_is_refused(door: Server) -> None:
    """The limit is 1 MiB, as in server.py."""
    async with client(door, PRODUCER, **header(token())) as producer:
        await producer.send(json.dumps("x" * 1024 * 1024))
        await producer.wait_closed()
        assert producer.close_code == 1009


# Logins


async def check_unknown_users_cost_the_same(server: Server) -> None:
    """In CPU time, which is the time of the answer on a machine that does nothing else."""

    def cost(name: str) -> float:
        before = sum(server.processes()[0].cpu_times()[:2])
        status, _, answer = log_in(server, name, "wrong")
        assert (status, answer["detail"]) == (401, "wrong user name or password")
        return sum(server.processes()[0].cpu_times()[:2]) - before

    known, unknown = (min(cost(name) for _ in range(2)) for name in ("alice", "nobody"))
    assert unknown > known / 3, f"an unknown user costs {unknown:.2f} s, a known one {known:.2f} s"


async def test_an_unknown_user_gets_the_answer_of_a_known_one(door: Server) -> None:
    """The words are the same, and so is the work before them."""
    await check_unknown_users_cost_the_same(door)


def peak_memory(server: Server) -> int:
    """The most memory that it has had so far, in MiB."""
    [line] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    return int(line) // 1024


async def test_one_password_is_checked_at_a_time() -> None:
    """Each check takes 64 MiB."""
    with running(COMMAND) as server:
        log_in(server, "alice", "wonderland")
        before = peak_memory(server)
        await asyncio.gather(*(asyncio.to_thread(log_in, server, "alice", "wonderland") for _ in range(6)))
        assert peak_memory(server) < before + 60


SLOW_PASSWORDS = """
import threading

started, answered = threading.Event(), threading.Event()


class Slow:
    def verify(self, password, password_hash):
        started.set()
        return answered.wait(5)


@app.get("/started")
async def answer_while_a_password_is_checked():
    if started.is_set():
        answered.set()
    return {}


lesson.passwords = Slow()
"""


async def test_the_server_answers_others_while_it_checks_a_password() -> None:
    """A check takes long on purpose, so it runs in a thread. This one takes until another answer is sent."""
    with running(with_constants("lessons.auth_server", SLOW_PASSWORDS)) as server:
        login = asyncio.create_task(asyncio.to_thread(log_in, server, "alice", "wonderland"))
        while not login.done():
            await asyncio.to_thread(server.get, "/started")
        assert (await login)[0] == 200


async def test_ctrl_c_ends_the_server_while_logins_wait() -> None:
    """Each gets 503. One password is being checked, and the other login waits for its turn."""
    slow = SLOW_PASSWORDS.replace("answered.wait(5)", "answered.wait(2)")
    with running(with_constants("lessons.auth_server", slow)) as server:
        logins = [
            asyncio.create_task(asyncio.to_thread(log_in, server, "alice", "wonderland")) for _ in range(2)
        ]
        await until(lambda: len(server.connections()) == 2, "both logins to arrive")
        server.get("/")  # by now, both requests were read
        server.interrupt()
        assert await asyncio.to_thread(server.ends_within, 4) is not None
        assert [(await login)[0] for login in logins] == [503, 503]
        assert tracebacks(server.log) == 0


def check_a_login_that_is_not_unicode(door: Server, field: str, status: int) -> None:
    """A form names its own encoding, and in UTF-7 there are halves of surrogate pairs."""
    mark = len(door.log)
    part = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n+2AA-\r\n'
    form = part.format("username") + part.format("password") + part.format(field) + "--x--\r\n"
    with closing(HTTPConnection("127.0.0.1", door.port)) as connection:
        kind = {"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"}
        connection.request("POST", "/token", form, kind)
        assert connection.getresponse().status == status
    assert tracebacks(door.log[mark:]) == 0


@pytest.mark.parametrize(("field", "status"), [("password", 401), ("grant_type", 422)])
async def test_a_login_that_is_not_unicode_is_refused(door: Server, field: str, status: int) -> None:
    check_a_login_that_is_not_unicode(door, field, status)


@pytest.mark.parametrize("example", ["auth_limits", "auth_pubsub"])
async def test_examples_refuse_a_login_that_is_not_unicode(example: str) -> None:
    """They add auth_server.py's routes to an app of their own, which needs its exception handlers, too."""
    with running(uvicorn_command(f"tests.examples.{example}:app")) as server:
        check_a_login_that_is_not_unicode(server, "grant_type", 422)


# The naive server


async def test_the_naive_version_logs_the_token(naive_door: Server) -> None:
    """The token is in the URL, and so in the log of every server and proxy on the way."""
    text = token(lasts=1)
    with fails("open after its token has expired"):
        await check_ends_at_expiry(naive_door, f"{PRODUCER}?token={text}")
    assert f'"WebSocket {PRODUCER}?token={text}" [accepted]' in naive_door.log


async def test_the_naive_version_tells_which_users_exist(naive_door: Server) -> None:
    """It checks no password for an unknown user, so it answers at once."""
    with fails("an unknown user costs 0.0"):
        await check_unknown_users_cost_the_same(naive_door)


# In front of pubsub_server.py


async def test_the_same_tokens_open_pubsub_server() -> None:
    """A client needs a token that allows both to produce and to consume, over HTTP too."""
    with running(PUBSUB, env={"SECRET_KEY": KEY}) as server:
        assert await refusal(server, "/ws") == (401, "Bearer", "a token is needed")
        bob = header(log_in(server, "bob", "builder")[2]["access_token"])
        reason = "a token with the scope produce consume is needed"
        assert await refusal(server, "/ws", **bob) == (403, 'Bearer error="insufficient_scope"', reason)
        assert request(server, "/publish/news", {"a": "b"})[0] == 401
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            async with client(server, "/ws", origin="http://evil.example", **header(token())):
                pass
        text = log_in(server, "alice", "wonderland")[2]["access_token"]
        async with client(server, "/ws?topic=news", **header(text)) as subscriber:
            for kind in ("welcome", "subscribed"):
                assert json.loads(await receive(subscriber))["type"] == kind
            await publish(server, "--token", text)
            message = json.loads(await receive(subscriber))
            assert (message["topic"], message["data"]) == ("news", 1)
        await check_ends_at_expiry(server, "/ws", **header(token(lasts=1)))
        assert await end(server, signal.SIGINT, 1) == 0
        assert tracebacks(server.log) == 0


async def publish(server: Server, *options: str) -> None:
    """Publish a message with pubsub_client.py."""
    command = [sys.executable, "lessons/pubsub_client.py", "publish", "news", "1", "--url", server.url("/ws")]
    process = await asyncio.create_subprocess_exec(*command, *options, cwd=ROOT)
    assert await process.wait() == 0


# The clients, the page, the end


async def test_the_clients_take_a_token(door: Server) -> None:
    """With a valid token, they work until it expires. Otherwise, they end at once with one line."""
    with ExitStack() as stack:

        def start(path: str, *options: str) -> Script:
            script = Script(door.url(path), *options)
            stack.callback(script.close)
            return script

        refused = {
            start(path, *options): reason
            for path in SCOPES
            for options, reason in [
                ([], 'HTTP 401 {"detail":"a token is needed"}'),
                (
                    ["--token", token("")],
                    f'HTTP 403 {{"detail":"a token with the scope {SCOPES[path]} is needed"}}',
                ),
            ]
        }
        producer = start(PRODUCER, "--token", token(), "--count", "3", "--interval", "0.01")
        consumer = start(CONSUMER, "--token", token(lasts=3 * SLOWNESS))
        assert len(await consumer.prints(3)) == 3
        assert [await producer.ends(), await consumer.ends()] == [0, 1]
        assert consumer.err == "closed with 1008: the token has expired\n"
        for script, reason in refused.items():
            assert await script.ends() == 1
            assert script.err.endswith(f": server rejected WebSocket connection: {reason}\n")
            assert script.err.count("\n") == 1


@needs_browser
async def test_the_playground_logs_in(door: Server) -> None:
    """It says that a password is wrong, connects with the right one, and asks again in the end."""
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        asked: list[str] = []
        page.on("websocket", lambda websocket: asked.append(websocket.url))
        response = await page.goto(door.url("/", "http"))
        assert response
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        state, form = page.locator("#producer .state"), page.locator("#login")
        await expect(state).to_have_text("log in first")
        await page.get_by_role("button", name="Add a consumer").click()
        for password in ("builder", "wonderland"):
            await page.get_by_label("User").fill("alice")
            await page.get_by_label("Password").fill(password)
            await page.get_by_label("Password").press("Enter")
            if password == "builder":
                await expect(form.locator("output")).to_have_text("wrong user name or password")
                assert not asked
        await expect(form).to_be_hidden()
        await expect(state).to_have_text("connected")
        await page.get_by_role("button", name="Send", exact=True).click()
        await expect(page.locator(".lane li").first).to_have_text('{"hello": "world"}')
        await page.get_by_role("button", name="NaN").click()
        await expect(page.locator("#answer")).to_contain_text("NaN: closed with 1007")
        assert all("token" not in url and url.startswith(f"ws://127.0.0.1:{door.port}/") for url in asked)
        await page.evaluate("token = 'an old one'")
        await expect(form).to_be_visible()
        await browser.close()
        assert errors == []


async def test_ctrl_c_ends_the_server_at_once(door: Server) -> None:
    """Clients do not delay it, even without a token. At the start, it warns of a random key."""
    with running(FIRST_MESSAGE) as server:
        assert server.log.count("SECRET_KEY is not set") == 1
        text = log_in(server, "alice", "wonderland")[2]["access_token"]
        assert await refusal(server, PRODUCER, **header(token())) == await refusal(
            door, PRODUCER, **header("junk")
        )
        async with AsyncExitStack() as stack:
            websockets = [
                await stack.enter_async_context(client(server, path, **options))
                for path in SCOPES
                for options in (header(text), pair(text), pair())
            ]
            assert await end(server, signal.SIGINT, 1) == 0
            for websocket in websockets:
                await websocket.wait_closed()
                assert websocket.close_code == 1012


async def test_ctrl_c_ends_the_server_although_a_producer_does_not_read() -> None:
    """Uvicorn cancels its endpoint, and the log has no traceback."""
    with running(COMMAND, env={"SECRET_KEY": KEY}) as server:
        async with client(server, PRODUCER, **header(token())) as producer:
            producer.transport.pause_reading()
            write(producer, numbered(200, size=100_000))
            await until(lambda: queued(server) > 0, "the first payload to be queued")
            await settled(lambda: queued(server))
            await end(server, signal.SIGINT, 3)
            assert "Cancel 1 running task(s), timeout graceful shutdown exceeded" in server.log
            producer.transport.abort()


async def settled(look: Callable[[], int]) -> None:
    """Wait until a number does not change any more, because the server waits for the client's socket."""
    looks = [look()]

    def unchanged() -> bool:
        looks.append(look())
        return len(looks) > 10 and len(set(looks[-10:])) == 1

    await until(unchanged, "the socket to be full")
