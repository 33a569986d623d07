"""limits_server.py: how much one client may use. The servers without limits fail what is checked of it."""

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi import HTTPException, WebSocketException
from websockets.exceptions import ConnectionClosed, InvalidStatus

from lessons import limits_server
from tests.checks import check_foreign_page_is_refused, end, fails
from tests.kit.clients import client, numbered, receive, receive_all, write
from tests.kit.commands import CONSUMER, PRODUCER, SERVERS, uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.servers import Server, running, tracebacks
from tests.kit.tokens import KEY, header, log_in, pair, token
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

COMMAND = uvicorn_command("lessons.limits_server:app")
NAIVE = uvicorn_command("lessons.naive.auth_server:app")
SCRIPT = [sys.executable, "lessons/limits_server.py", "--port"]
RATE = 50  # payloads a second of the low server
LOW = {
    "IDLE_TIMEOUT": SLOWNESS,
    "MAX_LIFETIME": 2.5 * SLOWNESS,
    "RATE": RATE,
    "MAX_DELAY": 0.5 * SLOWNESS,
    "MAX_CONNECTIONS": 3,
    "LOGIN_WINDOW": 10**9,  # so that no failed login is forgotten within a test
}
BY_USER = with_options(
    with_constants(
        "lessons.limits_server",
        "from tests.examples.auth_limits import app",
        MAX_CONNECTIONS=3,
        LOGIN_WINDOW=10**9,
    ),
    *("--ws-ping-interval", "0.2", "--ws-ping-timeout", str(1.5 * SLOWNESS)),
)


def source(host: str) -> dict[str, Any]:
    """Connect from this address. Each address in 127.0.0.0/8 is one of this machine."""
    return {"local_addr": (host, 0)}


@pytest.fixture(scope="module")
def low() -> Iterator[Server]:
    """A server with short times and low limits."""
    with running(with_constants("lessons.limits_server", **LOW)) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest.fixture(scope="module")
def by_user() -> Iterator[Server]:
    """auth_server.py with low limits."""
    with running(BY_USER, env={"SECRET_KEY": KEY}) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest.fixture(scope="module")
def unlimited() -> Iterator[Server]:
    with running(SERVERS["server.py"]) as server:
        yield server


# Connections


async def check_connections_are_limited(server: Server) -> None:
    """Of four connections, the server refuses one."""
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(client(server, PRODUCER, **source("127.0.0.2")))
        with suppress(InvalidStatus):
            async with client(server, PRODUCER, **source("127.0.0.2")):
                raise AssertionError("a fourth connection was let in")


async def test_connections_of_a_client_are_limited(low: Server) -> None:
    """The next one gets 429. Other clients do not notice. Each place becomes free again."""
    await check_connections_are_limited(low)
    async with AsyncExitStack() as stack:
        mine = [
            await stack.enter_async_context(client(low, PRODUCER, **source("127.0.0.3"))) for _ in range(3)
        ]
        with pytest.raises(InvalidStatus) as caught:
            async with client(low, PRODUCER, **source("127.0.0.3")):
                pass
        assert caught.value.response.status_code == 429
        reason = "127.0.0.3 has 3 connections already"
        assert json.loads(caught.value.response.body) == {"detail": reason}
        assert f"WARNING:  {reason}\n" in low.log
        async with client(low, PRODUCER, **source("127.0.0.4")) as other:
            await other.send("1")
            assert await receive(other) == "1"
        await mine[0].close()
        async with client(low, PRODUCER, **source("127.0.0.3")) as fourth:
            await fourth.send("1")
            assert await receive(fourth) == "1"


async def test_connections_of_a_user_are_limited(by_user: Server) -> None:
    """Both endpoints and all addresses count. Another user at the same address does not notice."""
    options = header(token(sub="many"))
    async with AsyncExitStack() as stack:
        mine = [
            await stack.enter_async_context(client(by_user, path, **options, **source(host)))
            for path, host in [(PRODUCER, "127.0.0.2"), (CONSUMER, "127.0.0.3"), (CONSUMER, "127.0.0.4")]
        ]
        for ways in (options, pair(token(sub="many"))):
            with pytest.raises(InvalidStatus, match="HTTP 429"):
                async with client(by_user, CONSUMER, **ways):
                    pass
        async with client(by_user, CONSUMER, **header(token(sub="other"))):
            pass
        await mine[0].close()
        async with client(by_user, PRODUCER, **options) as fourth:
            await fourth.send("1")
            assert await receive(fourth) == "1"
            assert await receive(mine[1]) == "1"
    with pytest.raises(InvalidStatus, match="HTTP 401"):
        async with client(by_user, CONSUMER):
            pass


async def test_a_client_that_answers_no_ping_is_dropped(by_user: Server) -> None:
    """Its place is free again."""
    options = header(token(sub="hung"))
    async with AsyncExitStack() as stack:
        hung = [await stack.enter_async_context(client(by_user, CONSUMER, **options)) for _ in range(3)]
        for websocket in hung:
            websocket.transport.pause_reading()
        ports = {websocket.local_address[1] for websocket in hung}
        await until(lambda: not ports & by_user.connections(), "the end of them")
        async with client(by_user, CONSUMER, **options):
            pass
        for websocket in hung:
            websocket.transport.abort()


# How long


async def test_the_length_of_a_connection_and_of_a_silence_is_limited(low: Server) -> None:
    """A client that sends nothing is closed after IDLE_TIMEOUT, and every client after MAX_LIFETIME."""
    start = time.monotonic()
    async with client(low, PRODUCER) as talker, client(low, PRODUCER) as silent:
        while silent.close_code is None:
            await talker.send("1")
            assert await receive(talker) == "1"
            await asyncio.sleep(0.1 * SLOWNESS)
        assert (silent.close_code, silent.close_reason) == (1001, f"nothing was sent for {SLOWNESS} s")
        with suppress(ConnectionClosed):
            while True:
                await talker.send("1")
                await asyncio.sleep(0.1 * SLOWNESS)
        await talker.wait_closed()
        reason = f"{2.5 * SLOWNESS} s are over: connect again"
        assert (talker.close_code, talker.close_reason) == (1001, reason)
    assert time.monotonic() - start > 2.4 * SLOWNESS


# How fast


async def check_rate_is_limited(server: Server) -> list[str]:
    """Send 1,000 payloads at once. Return those that came back before the server closed the connection."""
    async with client(server, PRODUCER) as producer:
        write(producer, numbered(1000))
        echoed: list[str] = []
        with suppress(ConnectionClosed):
            while len(echoed) < 1000:
                echoed.append(await receive(producer))
        assert len(echoed) < 1000, "1000 payloads were taken at once"
        assert producer.close_code == 1008
        assert producer.close_reason == f"more than {RATE} payloads a second"
    return echoed


async def test_a_producer_that_sends_too_much_waits_and_then_is_closed(low: Server) -> None:
    """It may send RATE payloads at once, then RATE a second. After MAX_DELAY it is closed with 1008."""
    start = time.monotonic()
    echoed = await check_rate_is_limited(low)
    took = time.monotonic() - start
    assert echoed == numbered(len(echoed))
    assert took > 0.4 * SLOWNESS
    assert RATE < len(echoed) < RATE * (1.5 + took)


async def test_a_pause_fills_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second without payloads, a client may send too many again, with no delay held against it."""
    now = 100.0

    async def sleep(_: float) -> None:
        """Take 20 ms: a real sleep takes longer than the millisecond that it should."""
        nonlocal now
        now += 0.02

    monkeypatch.setattr(limits_server, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(limits_server, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(limits_server, "MAX_DELAY", 0.06)
    bucket = limits_server.Bucket()
    for _ in range(3):
        now += 1.01
        for _ in range(limits_server.RATE + 30):  # the last ones wait for 40 ms in all
            await bucket.take()

    async def take_more() -> None:
        for _ in range(100):
            await bucket.take()

    with pytest.raises(WebSocketException, match="more than 1000 payloads a second"):
        await take_more()


async def test_a_bad_payload_is_refused(low: Server) -> None:
    """As in server.py, a payload must be JSON of at most 1 MiB."""
    payloads: list[tuple[str | bytes, int]] = [
        (json.dumps("x" * 1024 * 1024), 1009),
        ("nonsense", 1007),
        (b"1", 1003),
    ]
    for payload, code in payloads:
        async with client(low, PRODUCER) as producer:
            await producer.send(payload)
            assert await receive_all(producer) == []
            assert producer.close_code == code


async def test_foreign_pages_are_refused() -> None:
    """As in server.py."""
    with running(COMMAND) as server:
        await check_foreign_page_is_refused(server, PRODUCER, "http://evil.example")


# Logins


async def check_guessing_is_limited(server: Server, name: str) -> None:
    """Of seven wrong passwords, all at once, five are looked at."""
    tries = [asyncio.to_thread(log_in, server, name, f"guess {n}", "127.0.0.2") for n in range(7)]
    answers = Counter(status for status, _, _ in await asyncio.gather(*tries))
    assert answers[401] == 5, f"{answers[401]} guesses were looked at"
    assert answers[429] == 2


@pytest.mark.parametrize("name", ["low", "by_user"])
async def test_guesses_of_passwords_are_limited(request: pytest.FixtureRequest, name: str) -> None:
    """By name and by address. After too many, the right password is refused, too."""
    server: Server = request.getfixturevalue(name)
    passwords = {"low": "wonderland", "by_user": "builder"}
    await check_guessing_is_limited(server, "bob")
    for user, password, host in [("bob", passwords[name], "127.0.0.3"), ("alice", "wonderland", "127.0.0.2")]:
        status, headers, answer = log_in(server, user, password, host)
        assert (status, answer["detail"]) == (429, "too many failed logins")
        assert headers["retry-after"] == str(10**9)
    assert log_in(server, "alice", "wonderland", "127.0.0.3")[0] == 200


async def test_right_passwords_do_not_count(low: Server) -> None:
    """They are forgotten as soon as they are answered."""
    for _ in range(7):
        assert log_in(low, "carol", "wonderland", "127.0.0.6")[0] == 200
    assert log_in(low, "carol", "wrong", "127.0.0.6")[0] == 401


async def test_failed_logins_are_forgotten_after_a_while() -> None:
    """LOGIN_WINDOW after the first failure, one more login may fail."""
    hasty = with_constants("lessons.limits_server", **{**LOW, "LOGIN_WINDOW": 0.5 * SLOWNESS})
    with running(hasty) as server:
        await until(lambda: guess(server, "dave", "127.0.0.1") == 429, "too many failures")
        await until(lambda: guess(server, "dave", "127.0.0.1") == 401, "the failures to be forgotten")


def guess(server: Server, name: str, forwarded: str) -> int:
    """The status of a guess by a client that says that it was forwarded for this address."""
    form = urlencode({"username": name, "password": "wrong"})
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Forwarded-For": forwarded}
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request("POST", "/token", form, headers)
        return connection.getresponse().status


@pytest.mark.parametrize(
    ("field", "status"), [("username", 200), ("grant_type", 422)], ids=["username", "grant_type"]
)
def test_a_login_that_is_not_unicode_is_answered(field: str, status: int) -> None:
    """A form names its own encoding, and in UTF-7 there are halves of surrogate pairs."""
    values = {"username": "alice", "password": "wonderland", field: "+2AA-"}
    part = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    form = "".join(part.format(*item) for item in values.items()) + "--x--\r\n"
    with running(uvicorn_command("lessons.limits_server:app")) as server:
        with closing(HTTPConnection("127.0.0.1", server.port)) as connection:
            kind = {"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"}
            connection.request("POST", "/token", form, kind)
            assert connection.getresponse().status == status
        assert tracebacks(server.log) == 0


@pytest.mark.parametrize("command", [SCRIPT, with_options(COMMAND, "--no-proxy-headers")])
def test_a_client_cannot_claim_to_be_another_address(command: list[str]) -> None:
    """The header X-Forwarded-For does not help a client that guesses."""
    with running(command) as server:
        statuses = [guess(server, f"user {number}", f"192.0.2.{number}") for number in range(6)]
        assert statuses == [401] * 5 + [429]


def test_addresses_of_an_ipv6_64_count_as_one() -> None:
    """Uvicorn trusts the proxy. One client may have all addresses of a /64."""
    with running(COMMAND) as server:
        statuses = [guess(server, f"user {number}", f"2001:db8:0:1::{number}") for number in range(6)]
        assert statuses == [401] * 5 + [429]
        assert guess(server, "user 7", "2001:db8:0:2::1") == 401
        mapped = [guess(server, f"name {number}", f"::ffff:192.0.2.{number}") for number in range(6)]
        assert mapped == [401] * 6


def test_a_client_without_an_address_is_counted_by_what_the_proxy_calls_it() -> None:
    """RFC 7239 lets a proxy write `unknown`."""
    with running(COMMAND) as server:
        statuses = [guess(server, f"user {number}", "unknown") for number in range(6)]
        assert statuses == [401] * 5 + [429]


def test_names_with_the_same_beginning_count_as_one() -> None:
    """The server keeps 99 characters of a name, so that long names do not fill its memory."""
    with running(COMMAND) as server:
        statuses = [guess(server, "x" * 99 + str(number), f"192.0.2.{number}") for number in range(6)]
        assert statuses == [401] * 5 + [429]


async def test_a_right_password_takes_back_no_later_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOGIN_WINDOW after a login that succeeded, a later failure of the same client still counts."""
    monkeypatch.setattr(limits_server, "failures", Counter())
    connection: Any = SimpleNamespace(client=SimpleNamespace(host="192.0.2.1"))
    form: Any = SimpleNamespace(username="alice")
    login = asynccontextmanager(limits_server.limit_logins)
    monkeypatch.setattr(limits_server, "LOGIN_WINDOW", 0.01)
    async with login(connection, form):
        pass
    monkeypatch.setattr(limits_server, "LOGIN_WINDOW", 60)
    with suppress(HTTPException):
        async with login(connection, form):
            raise HTTPException(401)
    await asyncio.sleep(0.02)  # a timer that was set for 0.01 s has run by then
    assert limits_server.failures == {"name alice": 1, "client 192.0.2.1": 1}


async def test_a_login_that_takes_long_takes_back_no_later_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a password is checked for longer than LOGIN_WINDOW, the login is already forgotten."""
    monkeypatch.setattr(limits_server, "failures", Counter())
    monkeypatch.setattr(limits_server, "LOGIN_WINDOW", 0.01)
    connection: Any = SimpleNamespace(client=SimpleNamespace(host="192.0.2.1"))
    form: Any = SimpleNamespace(username="alice")
    async with asynccontextmanager(limits_server.limit_logins)(connection, form):
        await until(lambda: not limits_server.failures, "the login to be forgotten")
        limits_server.failures["name alice"] += 1
    assert limits_server.failures == {"name alice": 1}


def test_what_is_no_longer_counted_is_forgotten() -> None:
    """Otherwise each client would leave something in the memory."""
    counter = Counter(["one", "two", "two"])
    limits_server.release(counter, ["one", "two"])
    assert dict(counter) == {"two": 1}


# The servers without limits, and the end


async def test_server_py_has_no_limits(unlimited: Server) -> None:
    """It takes all payloads and all connections of a client."""
    with fails("1000 payloads were taken at once"):
        await check_rate_is_limited(unlimited)
    with fails("a fourth connection was let in"):
        await check_connections_are_limited(unlimited)


async def test_the_naive_version_lets_a_client_guess_forever() -> None:
    """It does not count failures."""
    with running(NAIVE, env={"SECRET_KEY": KEY}) as server, fails("7 guesses were looked at"):
        await check_guessing_is_limited(server, "alice")


async def test_ctrl_c_ends_the_server_at_once() -> None:
    """A client that is being throttled does not delay it."""
    with running(COMMAND) as server:
        async with client(server, PRODUCER) as idle, client(server, PRODUCER) as busy:
            write(busy, numbered(1200))
            for _ in range(1001):
                await receive(busy)
            assert await end(server, signal.SIGINT, 1) == 0
            await idle.wait_closed()
            assert idle.close_code == 1012
