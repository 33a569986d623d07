"""auth_server.py: who may connect, for how long, how much. The naive server fails what is checked of both."""

import asyncio
import base64
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

import jwt
import pytest
from playwright.async_api import async_playwright, expect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from tests.checks import check_foreign_page_is_refused, end, fails
from tests.harness import (
    CONSUMER,
    PRODUCER,
    ROOT,
    SLOWNESS,
    TIMEOUT,
    Script,
    Server,
    arrived,
    client,
    numbered,
    receive,
    receive_all,
    running,
    until,
    uvicorn_command,
    with_options,
    write,
)
from tests.test_playground import CHROMIUM, FLAGS

KEY = "the tests' own secret key, with more than 32 bytes"
COMMAND = uvicorn_command("lessons.auth_server:app")
NAIVE = uvicorn_command("lessons.naive.auth_server:app")
RATE, PLACES = 50, 100  # payloads a second, and in the queue, of the hasty server
HASTY = f"""if True:
    import asyncio, sys, uvicorn, lessons.auth_server as server
    server.AUTH_TIMEOUT, server.IDLE_AFTER, server.MAX_LIFESPAN = 0.3, {SLOWNESS}, {2.5 * SLOWNESS}
    server.RATE, server.RATE_TIMEOUT, server.MAX_CONNECTIONS = {RATE}, {0.5 * SLOWNESS}, 3
    server.room, server.FULL_TIMEOUT = asyncio.Semaphore({PLACES}), 60
    server.LOGIN_WINDOW = 10**9  # so that no window ends within a test
    server.ALLOWED_ORIGINS.append("https://app.example")
    ping = dict(ws_ping_interval=0.2, ws_ping_timeout={1.5 * SLOWNESS})
    uvicorn.run(server.app, port=int(sys.argv[1]), timeout_graceful_shutdown=1, **ping)"""
SCOPES = {PRODUCER: "produce", CONSUMER: "consume"}
PATHS = pytest.mark.parametrize("path", [PRODUCER, CONSUMER])


def token(scope: Any = "produce consume", lasts: float = 3600, key: str = KEY, **claims: Any) -> str:
    """One that the server would give, or almost: a claim that is None is left out."""
    claims = {"sub": "alice", "exp": math.ceil(time.time() + lasts), "scope": scope, **claims}
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.api_jws.encode(json.dumps(present).encode(), key, "HS256")  # jwt.encode() would refuse some


def header(text: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {text}"}}


def pair(*texts: str) -> dict[str, Any]:
    return {"subprotocols": [Subprotocol(text) for text in ("bearer", *texts)]}


def request(
    server: Server, path: str, form: dict[str, str] | None = None, source: str = "127.0.0.1", bearer: str = ""
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and JSON of an answer. Each `source` in 127.0.0.0/8 is an address of this machine."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
    if bearer:
        headers["Authorization"] = f"bearer {bearer}"
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT, source_address=(source, 0))
    with closing(connection):
        connection.request("POST" if form else "GET", path, urlencode(form or {}), headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(response.read())


def log_in(
    server: Server, name: str, password: str, source: str = "127.0.0.1", **more: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    return request(server, "/token", {"username": name, "password": password, **more}, source)


def queued(server: Server) -> int:
    number: int = request(server, "/stats", bearer=token(""))[2]["queued"]
    return number


@pytest.fixture(scope="module")
def door() -> Iterator[Server]:
    with running(COMMAND, env={"SECRET_KEY": KEY}) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    """A server with short times and low limits."""
    with running([sys.executable, "-c", HASTY], env={"SECRET_KEY": KEY}) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def naive_door() -> Iterator[Server]:
    with running(NAIVE, env={"SECRET_KEY": KEY}) as server:
        yield server


# To show a token


async def test_a_login_gives_a_token_with_the_scopes_that_one_may_have(door: Server) -> None:
    """All of them, or those that were asked for. It opens both websockets, and is not to be cached."""
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


@pytest.mark.parametrize("way", ["header", "pair", "first message"])
async def test_three_ways_to_bring_a_token(door: Server, way: str) -> None:
    """As a header, as a second subprotocol, as the first message; none of them leaves it in the log."""
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
async def test_a_bad_token_is_refused(door: Server, path: str, name: str) -> None:
    """With 401, or 403 for the wrong scope, and a reason; with 1008 where it comes as the first message."""
    reason = "the token has expired" if name == "expired" else "the token is not valid"
    status, error = 401, "invalid_token"
    if name.startswith("scope"):
        status, error, reason = 403, "insufficient_scope", f"the token does not allow to {SCOPES[path]}"
    expected = status, f'Bearer error="{error}", error_description="{reason}"', reason
    assert await refusal(door, path, **header(BAD[name])) == expected
    if name != "not ASCII":  # which a subprotocol is not
        assert await refusal(door, path, **pair(BAD[name])) == expected
    async with client(door, path, **pair()) as websocket:
        await websocket.send(BAD[name])
        await websocket.wait_closed()
        assert (websocket.close_code, websocket.close_reason) == (1008, reason)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"additional_headers": {"Authorization": "Basic YWxpY2U6d29uZGVybGFuZA=="}},
        {"additional_headers": [("Authorization", f"Bearer {token()}")] * 2},
        {"subprotocols": [Subprotocol("chat"), Subprotocol("bearer")]},
        pair(token(), "chat"),
    ],
)
@PATHS
async def test_no_token_is_refused(door: Server, path: str, options: dict[str, Any]) -> None:
    """With 401 and a plain challenge. One in the URL is none, and two are none."""
    for url in (path, f"{path}?token=T&access_token=T"):
        assert await refusal(door, url, **options) == (401, "Bearer", "a token is needed")


async def test_stats_need_a_token_and_the_page_does_not(door: Server) -> None:
    """Any valid token will do."""
    status, headers, answer = request(door, "/stats")
    assert (status, headers["www-authenticate"], answer["detail"]) == (401, "Bearer", "a token is needed")
    status, headers, _ = request(door, "/stats", bearer="junk")
    assert (status, "invalid_token" in headers["www-authenticate"]) == (401, True)
    assert request(door, "/stats", bearer=token(""))[0] == 200
    assert door.get("/")[0] == 200


@PATHS
async def test_a_first_message_that_is_no_token(hasty: Server, path: str) -> None:
    """A binary one, or none in time, closes with 1008; to leave, or to say no more, does no harm."""
    async with client(hasty, path, **pair()) as binary, client(hasty, path, **pair()) as silent:
        await binary.send(b"\xff")
        await binary.wait_closed()
        assert (binary.close_code, binary.close_reason) == (1008, "the token is not valid")
        async with client(hasty, path, **pair()):
            pass
        await silent.wait_closed()
        assert silent.close_code == 1008
        assert silent.close_reason == "no token came within 0.3 s"


@PATHS
async def test_pages_from_elsewhere_need_to_be_allowed(hasty: Server, path: str) -> None:
    """A token does not help them."""
    async with client(hasty, path, origin="https://app.example", **pair(token())):
        pass
    for origin in ("https://app.example.evil.example", "null"):
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            async with client(hasty, path, origin=origin, **pair(token())):
                pass
    await check_foreign_page_is_refused(hasty, path, "http://evil.example")


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
    """Producer and consumer, however the token came. Then no payload goes to it."""
    short = token(lasts=0.2)
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


async def test_a_token_expires_while_the_queue_is_full(hasty: Server) -> None:
    """What waits for room then is not queued, and not echoed."""
    async with AsyncExitStack() as stack:
        for user in range(PLACES // RATE):
            producer = await stack.enter_async_context(
                client(hasty, PRODUCER, **header(token(sub=str(user))))
            )
            write(producer, numbered(RATE))
            assert [await receive(producer) for _ in range(RATE)] == numbered(RATE)
        await check_waiting(hasty)
    assert queued(hasty) == PLACES
    async with client(hasty, CONSUMER, **header(token())) as consumer:
        for _ in range(PLACES):
            await receive(consumer)


async def check_waiting(server: Server) -> None:
    async with client(server, PRODUCER, **header(token(lasts=0.3))) as late:
        await late.send('"late"')
        assert await receive_all(late) == []
        assert (late.close_code, late.close_reason) == (1008, "the token has expired")


async def test_the_longest_life_and_the_longest_silence(hasty: Server) -> None:
    """Who produces nothing is closed after IDLE_AFTER; consumers, and all others, after MAX_LIFESPAN."""
    start = time.monotonic()
    async with AsyncExitStack() as stack:
        talker, silent, consumer = [
            await stack.enter_async_context(client(hasty, path, **header(token(sub="long"))))
            for path in (PRODUCER, PRODUCER, CONSUMER)
        ]
        while silent.close_code is None:
            await talker.send("1")
            assert await receive(talker) == await receive(consumer) == "1"
            await asyncio.sleep(0.1 * SLOWNESS)
        assert (silent.close_code, silent.close_reason) == (1001, f"nothing was sent for {SLOWNESS} s")
        with suppress(ConnectionClosed):
            while True:
                await talker.send("1")
                await asyncio.sleep(0.1 * SLOWNESS)
        for websocket in (talker, consumer):
            await websocket.wait_closed()
            assert websocket.close_code == 1001
            assert (websocket.close_reason or "").endswith("s are over: reconnect")
    assert time.monotonic() - start > 2.4 * SLOWNESS


async def test_a_consumer_that_answers_no_ping_is_dropped(hasty: Server) -> None:
    """And its place among the user's connections is free again."""
    options = header(token(sub="hung"))
    async with client(hasty, CONSUMER, **options) as consumer:
        consumer.transport.pause_reading()
        await until(lambda: consumer.local_address[1] not in hasty.connections(), "the end of it")
        consumer.transport.abort()


# How much


async def test_connections_of_a_user_are_limited(hasty: Server) -> None:
    """Over both endpoints. Another user is not concerned; when one ends, its place is free."""
    async with AsyncExitStack() as stack:
        mine = [
            await stack.enter_async_context(client(hasty, path, **header(token(sub="many"))))
            for path in (PRODUCER, CONSUMER, CONSUMER)
        ]
        for options in (header(token(sub="many")), pair(token(sub="many"))):
            async with client(hasty, CONSUMER, **options) as fourth:
                await fourth.wait_closed()
                assert fourth.close_code == 1008
                assert fourth.close_reason == "a user has at most 3 connections"
        async with client(hasty, CONSUMER, **header(token(sub="other"))) as other:
            assert await arrived(other) == []
        await mine[0].close()
        async with client(hasty, PRODUCER, **header(token(sub="many"))) as fourth:
            await fourth.send("1")
            assert await receive(fourth) == "1"
    async with client(hasty, CONSUMER, **header(token(sub="drain"))) as consumer:
        for _ in range(queued(hasty)):
            await receive(consumer)


async def test_a_producer_that_sends_too_much_waits_and_then_is_closed(hasty: Server) -> None:
    """RATE payloads at once, then RATE a second, and 1008 after RATE_TIMEOUT. What was echoed is there."""
    payloads = numbered(1000)
    async with client(hasty, CONSUMER, **header(token())) as consumer:
        async with client(hasty, PRODUCER, **header(token())) as producer:
            write(producer, payloads)
            start = time.monotonic()
            echoed = await receive_all(producer)
            took = time.monotonic() - start
            assert (producer.close_code, producer.close_reason) == (
                1008,
                f"more than {RATE} payloads a second",
            )
        assert echoed == payloads[: len(echoed)]
        assert await arrived(consumer) == echoed
    assert took > 0.4 * SLOWNESS
    assert RATE < len(echoed) < RATE * (1.5 + took)


async def test_a_large_payload_is_refused(door: Server) -> None:
    """1 MiB is the limit here too."""
    async with client(door, PRODUCER, **header(token())) as producer:
        await producer.send(json.dumps("x" * 1024 * 1024))
        await producer.wait_closed()
        assert producer.close_code == 1009


# Logins


async def check_guessing_is_limited(server: Server, name: str) -> None:
    """Of seven wrong passwords, all at once, five are looked at."""
    tries = [asyncio.to_thread(log_in, server, name, f"guess {n}", "127.0.0.2") for n in range(7)]
    answers = Counter(status for status, _, _ in await asyncio.gather(*tries))
    assert answers[401] == 5, f"{answers[401]} guesses were looked at"
    assert answers[429] == 2


async def test_guessing_is_limited(hasty: Server) -> None:
    """By name, whatever the address; by address, whatever the name. The right password is refused as well."""
    await check_guessing_is_limited(hasty, "bob")
    for name, password, source in [("bob", "builder", "127.0.0.3"), ("alice", "wonderland", "127.0.0.2")]:
        status, headers, answer = log_in(hasty, name, password, source)
        assert (status, answer["detail"]) == (429, "too many failed logins")
        assert headers["retry-after"] == str(10**9)
    assert log_in(hasty, "alice", "wonderland", "127.0.0.3")[0] == 200


def guess(server: Server, number: int, forwarded: str) -> int:
    """The status of a guess, at a new name, by a client that says it was forwarded for this address."""
    form = urlencode({"username": f"user {number}", "password": "wrong"})
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Forwarded-For": forwarded}
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request("POST", "/token", form, headers)
        return connection.getresponse().status


def test_a_client_cannot_claim_to_be_another_address() -> None:
    """The header X-Forwarded-For counts for nothing, as `python lessons/auth_server.py` sets it."""
    assert "proxy_headers=False," in (ROOT / "lessons/auth_server.py").read_text()
    with running(with_options(COMMAND, "--no-proxy-headers")) as server:
        statuses = [guess(server, number, f"192.0.2.{number}") for number in range(20)]
        assert 429 in statuses


def test_addresses_of_an_ipv6_64_count_as_one() -> None:
    """Behind a proxy that uvicorn trusts: whoever has one of these addresses has all of them."""
    with running(COMMAND) as server:
        # On a busy machine, so much time passes between two guesses that more than five are allowed.
        statuses = [guess(server, number, f"2001:db8:0:1::{number}") for number in range(20)]
        assert statuses[:5] == [401] * 5
        assert 429 in statuses
        assert guess(server, 7, "2001:db8:0:2::1") == 401
        assert guess(server, 8, "::ffff:192.0.2.1") == 401


async def check_unknown_users_cost_the_same(server: Server, source: str) -> None:
    """In CPU time, which is the time of the answer on a machine that does nothing else."""

    def cost(name: str) -> float:
        before = sum(server.processes()[0].cpu_times()[:2])
        status, _, answer = log_in(server, name, "wrong", source)
        assert (status, answer["detail"]) == (401, "wrong user name or password")
        return sum(server.processes()[0].cpu_times()[:2]) - before

    known, unknown = (min(cost(name) for _ in range(2)) for name in ("alice", "nobody"))
    assert unknown > known / 3, f"an unknown user costs {unknown:.2f} s, a known one {known:.2f} s"


async def test_an_unknown_user_is_answered_as_a_known_one(hasty: Server) -> None:
    """With the same words, after the same work."""
    await check_unknown_users_cost_the_same(hasty, "127.0.0.4")


async def test_a_login_that_is_not_unicode(hasty: Server) -> None:
    """A form names its own encoding, and in UTF-7 there are halves of surrogate pairs."""
    part = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n+2AA-\r\n'
    form = part.format("username") + part.format("password") + "--x--\r\n"
    with closing(HTTPConnection("127.0.0.1", hasty.port, source_address=("127.0.0.5", 0))) as connection:
        kind = {"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"}
        connection.request("POST", "/token", form, kind)
        assert connection.getresponse().status == 401


# The naive server


async def test_naive_logs_the_token(naive_door: Server) -> None:
    """What is in the URL is in the log of every server and proxy on the way."""
    text = token(lasts=0.2)
    with fails("open after its token has expired"):
        await check_ends_at_expiry(naive_door, f"{PRODUCER}?token={text}")
    assert f'"WebSocket {PRODUCER}?token={text}" [accepted]' in naive_door.log


async def test_naive_lets_one_guess_for_ever(naive_door: Server) -> None:
    """It keeps no count."""
    with fails("7 guesses were looked at"):
        await check_guessing_is_limited(naive_door, "alice")


async def test_naive_tells_which_users_exist(naive_door: Server) -> None:
    """It checks no password where there is no user, and answers at once."""
    with fails("an unknown user costs 0.0"):
        await check_unknown_users_cost_the_same(naive_door, "127.0.0.1")


# The clients, the page, the end


async def test_the_clients_take_a_token(door: Server) -> None:
    """With one they work until it expires. Without, or with a bad one, they end at once, with one line."""
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
                    f'HTTP 403 {{"detail":"the token does not allow to {SCOPES[path]}"}}',
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


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no browser here")
async def test_the_playground_logs_in(door: Server) -> None:
    """By keyboard: it says that a password is wrong; the right one connects all. It asks again in the end."""
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        asked: list[str] = []
        page.on("websocket", lambda websocket: asked.append(websocket.url))
        await page.goto(door.url("/", "http"))
        state, form = page.locator("#producer .state"), page.locator("#login")
        await expect(state).to_contain_text("log in first")
        await page.get_by_role("button", name="Add a consumer").click()
        for password in ("builder", "wonderland"):
            await page.get_by_label("User").fill("alice")
            await page.get_by_label("Password").fill(password)
            await page.get_by_label("Password").press("Enter")
            if password == "builder":
                await expect(form.locator("output")).to_have_text("wrong user name or password")
                assert not asked
        await expect(form).to_be_hidden()
        await expect(state).to_contain_text("connected again")
        await page.get_by_role("button", name="Send", exact=True).click()
        await expect(page.locator(".lane li").first).to_have_text('{"hello": "world"}')
        await page.get_by_role("button", name="NaN").click()
        await expect(page.locator("#answer")).to_contain_text("NaN: closed with 1007")
        assert all("token" not in url and url.startswith(f"ws://127.0.0.1:{door.port}/") for url in asked)
        await page.evaluate("token = 'an old one'")
        await expect(form).to_be_visible()
        await browser.close()
        assert errors == []


async def test_it_ends_at_once(door: Server) -> None:
    """On Ctrl+C, whatever clients do, show their token too. At the start it warns of a random key."""
    with running(COMMAND) as server:
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
