"""What lessons/pubsub_server.py promises: each subscriber gets a copy; one's fault costs nobody else."""

import asyncio
import difflib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from http.client import HTTPConnection
from typing import Any, cast
from urllib.parse import quote

import psutil
import pytest
import redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as sync_connect

from lessons import pubsub_redis_server as redis_lesson
from lessons import pubsub_server as lesson
from tests.checks import MIB, check_foreign_page_is_refused, fails, leave_politely
from tests.diffs import without_docstring
from tests.kit.clients import client, gone, narrow, port, receive, receive_all, reset, vanish, write
from tests.kit.commands import uvicorn_command, with_options
from tests.kit.constants import with_constants
from tests.kit.redis import Redis
from tests.kit.root import ROOT
from tests.kit.servers import Server, running
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for

COMMAND = uvicorn_command("lessons.pubsub_server:app")
WITH_REDIS = uvicorn_command("lessons.pubsub_redis_server:app")
NAIVE = uvicorn_command("lessons.naive.pubsub_server:app")
SOON = 0.5 * SLOWNESS  # seconds in which what goes at once has gone
BUFFER = 50  # messages that wait for a slow subscriber, instead of 1000, where a test fills it
POLICIES = ["drop oldest", "disconnect"]
REDIS_TIMEOUT = math.ceil(2 * SLOWNESS)  # seconds, instead of 5
FOREIGN = "http://evil.example"
GAP = {"type": "dropped", "count": None}  # what every subscriber gets when Redis is back

# What a reader may add to the lesson: routes that publish, listen, and look inside.
ROUTES = """
import asyncio
from dataclasses import dataclass
from datetime import datetime, timezone

from fastapi import HTTPException
from pydantic import BaseModel

if hasattr(lesson, "REDIS_URL"):
    lesson.broker = lesson.Broker(lesson.REDIS_URL)


@app.post("/orders/{number}")
async def order(number: int) -> int:
    return await lesson.publish(f"orders/{number}", {"number": number})


class Reading(BaseModel):
    at: datetime
    value: float


@dataclass
class Alarm:
    level: int


heard = []
AT = datetime(2026, 1, 2, tzinfo=timezone.utc)


@app.post("/objects")
async def objects() -> list[int]:
    return [
        await lesson.publish(["a", "b"], Reading(at=AT, value=1.5)),
        await lesson.publish("a", [Alarm(3), AT]),
    ]


async def note(message: dict[str, object]) -> None:
    heard.append(message)
    if message["data"] == "fail":
        raise OSError("a callback's own fault")


@app.post("/listen")
async def listen() -> None:
    tasks.append(asyncio.create_task(lesson.listen(["sensors/+", "alarms"], note)))


@app.post("/stop")
async def stop() -> None:
    tasks.pop().cancel()


tasks = []


@app.get("/heard")
async def get_heard() -> list[dict[str, object]]:
    return heard


@app.post("/wrong/{which}")
async def wrong(which: str) -> None:
    topic, data = {"topic": ("a/+", 1), "data": ("a", object()), "half": ("a", "\\ud800")}[which]
    try:
        await lesson.publish(topic, data)
    except (TypeError, ValueError) as error:
        raise HTTPException(400, str(error))


@app.get("/inside")
async def inside() -> dict[str, int]:
    return {
        "filters": len(lesson.filters),
        "subscribers": len(lesson.subscribers),
        "tasks": len(asyncio.all_tasks()),
    }
"""


def program(module: str = "pubsub_server", **constants: object) -> list[str]:
    """Return the command of a reader's program, with these constants. The port follows."""
    return with_constants(f"lessons.{module}", ROUTES, **constants)


def inside(server: Server) -> dict[str, int]:
    counts: dict[str, int] = json.loads(server.get("/inside")[2])
    return counts


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with running(COMMAND) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The lesson without Redis. It must come through the test without a traceback."""
    mark = len(shared.log)
    yield shared
    check_quiet(shared.log[mark:])


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of the test's own: the command that the test is parametrised with, or the lesson's.

    With the parameter "Redis" that has a Redis of its own.
    """
    param = getattr(request, "param", COMMAND)
    with ExitStack() as stack:
        if param == "Redis":
            broker = stack.enter_context(closing(Redis()))
            server = stack.enter_context(running(WITH_REDIS, env={"REDIS_URL": broker.url()}))
            wait_for(lambda: listening(broker) == 1, "it to listen")
        else:
            server = stack.enter_context(running(param))
        yield server
        check_quiet(server.log)


@pytest.fixture
def noisy() -> Iterator[Server]:
    """A reader's program that may log the traceback of its own callback."""
    with running(program()) as server:
        yield server


@pytest.fixture
def naive(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The list of connections as tutorials write it."""
    with running(with_options(NAIVE, *getattr(request, "param", ()))) as server:
        yield server


@pytest.fixture(scope="module")
def broker() -> Iterator[Redis]:
    """A Redis that tests may kill, and must start again. Nobody else may use it: Pub/Sub has no databases."""
    broker = Redis()
    yield broker
    broker.close()


@pytest.fixture(scope="module")
def shared_pair(broker: Redis) -> Iterator[list[Server]]:
    command = program("pubsub_redis_server", REDIS_TIMEOUT=REDIS_TIMEOUT)
    env = {"REDIS_URL": broker.url()}
    with running(command, env=env) as one, running(command, env=env) as other:
        yield [one, other]


@pytest.fixture
def pair(shared_pair: list[Server], broker: Redis) -> Iterator[list[Server]]:
    """Two servers with one Redis, as on two machines."""
    wait_for(lambda: listening(broker) == 2, "both to listen")
    marks = [len(server.log) for server in shared_pair]
    yield shared_pair
    for server, mark in zip(shared_pair, marks, strict=True):
        check_quiet(server.log[mark:])


def check_quiet(log: str) -> None:
    """No traceback, and nothing that asyncio says of a task that nobody waited for."""
    for complaint in ("Traceback", "never retrieved", "destroyed", "never awaited", "Unclosed"):
        assert complaint not in log, log


def listening(broker: Redis) -> int:
    """How many processes have subscribed to the channel in Redis."""
    with suppress(redis.ConnectionError), closing(redis.Redis(port=broker.port)) as connection:
        answer = cast(list[tuple[bytes, int]], connection.pubsub_numsub(redis_lesson.CHANNEL))
        return answer[0][1]
    return 0


def knows_redis(server: Server) -> bool:
    """Whether the server has logged a return of Redis for each time that Redis was gone."""
    return server.log.count("Redis is gone") == server.log.count("Redis is back")


@asynccontextmanager
async def relay(broker: Redis) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Relay connections to Redis. Yields a URL, and a function that cuts off the subscribed connections.

    They stay open, but what is sent does not arrive, as behind a firewall that has forgotten them.
    """
    subscribed: set[asyncio.Task[None]] = set()
    cut_off: set[asyncio.Task[None]] = set()
    tasks: list[asyncio.Task[None]] = []

    async def copy(
        task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if b"SUBSCRIBE" in data:
                    subscribed.add(task)
                if task not in cut_off:
                    writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        tasks.append(task)
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", broker.port)
        await asyncio.gather(copy(task, reader, redis_writer), copy(task, redis_reader, writer))

    try:
        async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield f"redis://127.0.0.1:{port}/0", lambda: cut_off.update(subscribed)
    finally:
        await asyncio.gather(*tasks)


class Connection:
    """A connection that speaks the protocol."""

    def __init__(self, websocket: ClientConnection, welcome: dict[str, Any]) -> None:
        assert welcome["type"] == "welcome"
        self.websocket = websocket
        self.id: str = welcome["id"]
        self.pid: int = welcome["pid"]

    async def say(self, type_: str, **fields: object) -> None:
        await self.websocket.send(json.dumps({"type": type_, **fields}))

    async def hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await receive(self.websocket))
        return message

    async def answer(self, type_: str, **fields: object) -> dict[str, Any]:
        """Say it, and return the next that comes."""
        await self.say(type_, **fields)
        return await self.hear()

    async def subscribe(self, *topics: str) -> None:
        for topic in topics:
            answer = await self.answer("subscribe", topic=topic)
            assert answer == {"type": "subscribed", "topic": topic}

    async def data(self) -> Any:
        """The data of the next message, which must be one."""
        message = await self.hear()
        assert message["type"] == "message", message
        return message["data"]

    async def heard(self) -> list[dict[str, Any]]:
        """All that came up to now. The answer to what it says now comes behind it, and that is left out."""
        await self.say("unsubscribe", topic="nothing")
        came = []
        while (message := await self.hear()) != {"type": "unsubscribed", "topic": "nothing"}:
            came.append(message)
        return came


@asynccontextmanager
async def connected(server: Server, *topics: str, **options: object) -> AsyncIterator[Connection]:
    """A connection that has subscribed to the topics when it connected."""
    path = "/ws?" + "&".join(f"topic={quote(topic, safe='')}" for topic in topics)
    async with client(server, path, **options) as websocket:
        connection = Connection(websocket, json.loads(await receive(websocket)))
        for topic in topics:
            assert await connection.hear() == {"type": "subscribed", "topic": topic}
        yield connection


def publications(topic: str, payloads: Iterable[object]) -> list[str]:
    """What publishes these, for write()."""
    return [json.dumps({"type": "publish", "topic": topic, "data": payload}) for payload in payloads]


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of the answer. Headers are only those that are given."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request("POST", path, body, {name.replace("_", "-"): headers[name] for name in headers})
        try:
            response = connection.getresponse()
        except ConnectionError as error:
            raise AssertionError(
                f"{error!r}; exit code {server.process.poll()}, log {server.log!r}"
            ) from error
        return response.status, json.loads(response.read())


# Topics, as in MQTT 5, section 4.7

MATCHES = [  # (filter, topic, whether it matches): the standard's own examples
    ("sport/tennis/player1/#", "sport/tennis/player1", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
    ("sport/tennis/player1/#", "sport/tennis/player2", False),
    ("sport/tennis/player1/#", "sport/tennis", False),
    ("sport/#", "sport", True),
    ("sport/#", "sport/", True),
    ("sport/#", "sports", False),
    ("#", "sport", True),
    ("#", "sport/tennis/player1", True),
    ("#", "/", True),
    ("sport/tennis/+", "sport/tennis/player1", True),
    ("sport/tennis/+", "sport/tennis/player2", True),
    ("sport/tennis/+", "sport/tennis/player1/ranking", False),
    ("sport/+", "sport", False),
    ("sport/+", "sport/", True),
    ("+", "sport", True),
    ("+", "/finance", False),
    ("+/+", "/finance", True),
    ("/+", "/finance", True),
    ("+/tennis/#", "sport/tennis", True),
    ("+/tennis/#", "sport/tennis/player1/ranking", True),
    ("+/tennis/#", "sport/golf", False),
    ("sport/+/player1", "sport/tennis/player1", True),
    ("sport/+/player1", "sport/tennis/player2", False),
    ("sport/+/player1", "sport/player1", False),
    ("#", "$SYS/monitor/Clients", False),
    ("+/monitor/Clients", "$SYS/monitor/Clients", False),
    ("+/monitor/#", "$SYS/monitor/Clients", False),
    ("+", "$SYS", False),
    ("#", "$SYS", False),
    ("$SYS/#", "$SYS/monitor/Clients", True),
    ("$SYS/#", "$SYS", True),
    ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ("+/+", "sport/$player", True),  # hidden are only topics that begin with it
    ("sport/#", "sport/$player", True),
    ("ACCOUNTS", "ACCOUNTS", True),
    ("ACCOUNTS", "Accounts", False),
    ("Accounts payable", "Accounts payable", True),
    ("/finance", "/finance", True),
    ("/finance", "finance", False),
    ("finance", "finance/", False),
    ("a//b", "a//b", True),
    ("a/+/b", "a//b", True),
    ("a//b", "a/b", False),
    ("/", "/", True),
    ("café", "cafe\u0301", False),  # not normalised
]
VALID_FILTERS = ["#", "+", "/", "//", "sport/tennis/#", "+/tennis/#", "sport/+/player1", "+/+/#", " "]
VALID_FILTERS += ["$SYS/#", "a" * 65_535, "/" * 199]
INVALID_FILTERS = ["", "sport/tennis#", "sport/tennis/#/ranking", "#/sport", "##", "sport+", "a/+b", "a/b+/c"]
INVALID_FILTERS += ["++", "+#", "a/#/", "a\0b", "a" * 65_536, "é" * 32_768, "/" * 200]
INVALID_TOPICS = ["", "#", "+", "a/+", "a/#", "a+b", "a#", "a\0", "a" * 65_536, "/" * 200]


@pytest.mark.parametrize(("topic_filter", "topic", "matches"), MATCHES)
async def test_topics_match_as_the_standard_says(
    server: Server, topic_filter: str, topic: str, matches: bool
) -> None:
    """A subscriber gets what is published to a topic that its filter matches, and nothing else."""
    async with connected(server, topic_filter) as subscriber:
        await subscriber.say("publish", topic=topic, data=1)
        message = {"type": "message", "topic": topic, "data": 1, "from": subscriber.id}
        assert await subscriber.heard() == [message] * matches


@pytest.mark.parametrize("topic", VALID_FILTERS, ids=lambda topic: f"{topic:.20}")
async def test_a_valid_filter_is_accepted(server: Server, topic: str) -> None:
    async with connected(server) as subscriber:
        assert await subscriber.answer("subscribe", topic=topic) == {"type": "subscribed", "topic": topic}


@pytest.mark.parametrize("topic", INVALID_FILTERS, ids=lambda topic: f"{topic!r:.20}")
async def test_an_invalid_filter_is_only_an_error(server: Server, topic: str) -> None:
    """The error says what is wrong. There is no subscription, and the connection goes on."""
    async with connected(server) as subscriber:
        error = await subscriber.answer("subscribe", topic=topic)
        assert error.keys() == {"type", "reason"}
        assert error["type"] == "error"
        assert re.search(r"1 to 65535 bytes|the wildcard [+#] is", error["reason"])
        await subscriber.subscribe("a")
        await subscriber.say("publish", topic="a", data=1)
        assert len(await subscriber.heard()) == 1


@pytest.mark.parametrize("topic", INVALID_TOPICS, ids=lambda topic: f"{topic!r:.20}")
async def test_an_invalid_topic_is_only_an_error(server: Server, topic: str) -> None:
    """A client cannot publish to a filter or to an invalid topic. The connection goes on."""
    async with connected(server, "#") as subscriber:
        error = await subscriber.answer("publish", topic=topic, data=1)
        assert error["type"] == "error"
        assert re.search("1 to 65535 bytes|no wildcards", error["reason"])
        assert await subscriber.heard() == []


def matches(topic_filter: str, topic: str) -> bool:
    """The standard once more, as a regular expression."""
    pattern = re.escape(topic_filter).replace(r"\+", "[^/]*")
    pattern = re.sub(r"/\\#$", "(/.*)?", pattern).replace(r"\#", ".*")
    hidden = topic[0] == "$" and topic_filter[0] in "+#"
    return not hidden and re.fullmatch(pattern, topic, re.DOTALL) is not None


def test_the_matcher_of_this_file_is_right() -> None:
    assert [matches(*case[:2]) for case in MATCHES] == [case[2] for case in MATCHES]


LEVELS = st.sampled_from(["", "a", "b", "$a"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = (
    st.tuples(st.lists(LEVELS | st.just("+"), max_size=4), st.sampled_from([[], ["#"]]))
    .map(lambda parts: "/".join(parts[0] + parts[1]))
    .filter(bool)
)


@settings(deadline=None, max_examples=100)
@given(filters=st.lists(FILTERS, min_size=1, max_size=4), topics=st.lists(TOPICS, min_size=1, max_size=6))
def test_any_filters_match_any_topics_as_the_standard_says(
    shared: Server, filters: list[str], topics: list[str]
) -> None:
    """Subscribe, publish, unsubscribe. What comes is one copy of all that any filter matches."""
    commands: list[dict[str, Any]] = [{"type": "subscribe", "topic": topic} for topic in filters]
    commands += [{"type": "publish", "topic": topic, "data": None} for topic in topics]
    commands += [{"type": "unsubscribe", "topic": topic} for topic in filters]
    commands += [{"type": "publish", "topic": topic, "data": None} for topic in topics]
    expected: list[dict[str, Any]] = [{"type": "subscribed", "topic": topic} for topic in filters]
    expected += [
        {"type": "message", "topic": topic, "data": None}
        for topic in topics
        if any(matches(topic_filter, topic) for topic_filter in filters)
    ]
    expected += [{"type": "unsubscribed", "topic": topic} for topic in filters]
    came = []
    with sync_connect(shared.url("/ws"), proxy=None, compression=None) as websocket:
        assert json.loads(websocket.recv(TIMEOUT))["type"] == "welcome"
        for command in [*commands, {"type": "unsubscribe", "topic": "the end"}]:
            websocket.send(json.dumps(command))
        while (message := json.loads(websocket.recv(TIMEOUT)))["topic"] != "the end":
            message.pop("from", None)
            came.append(message)
    assert came == expected


def subscriber() -> lesson.Subscriber:
    """Return a subscriber of this process, to which nothing is ever sent."""

    async def make() -> lesson.Subscriber:
        return lesson.Subscriber()

    return asyncio.run(make())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), FILTERS), unique=True, max_size=12).flatmap(
    lambda pairs: st.tuples(st.just(pairs), st.permutations(pairs))
))  # fmt: skip
def test_a_client_that_unsubscribes_leaves_nothing_behind(
    orders: tuple[list[tuple[int, str]], list[tuple[int, str]]],
) -> None:
    """The order does not matter. Filters of others still match. In the end, there is no filter."""
    subscribers = [subscriber() for _ in range(4)]
    coming, going = orders
    for number, topic in coming:
        subscribers[number].subscribe(topic)
    for done, (number, topic) in enumerate(going, 1):
        subscribers[number].unsubscribe(topic)
        subscribers[number].unsubscribe(topic)  # once more changes nothing
        for name in ("a", "a/b", "/", "$a/b"):
            expected = {subscribers[other] for other, left in going[done:] if matches(left, name)}
            assert set(lesson.matching(name)) == expected
    assert not lesson.filters
    assert not any(one.filters for one in subscribers)


def test_subscriptions_to_other_topics_cost_nothing() -> None:
    """With 10,000 of them, a message takes as many calls as without."""

    def calls() -> int:
        codes = []
        sys.setprofile(lambda frame, event, _: codes.append(frame.f_code.co_qualname))
        found = lesson.matching("sensors/1/temp")
        sys.setprofile(None)
        assert list(found) == [one]
        return sum(name.startswith("MQTTMatcher") for name in codes)  # and not the garbage collector's

    one, other = subscriber(), subscriber()
    for topic in ("sensors/1/temp", "sensors/+/temp", "sensors/#"):
        one.subscribe(topic)
    alone = calls()
    for number in range(2500):
        for topic in (f"others/{number}", f"sensors/{number + 2}/temp", f"others/+/{number}", f"{number}/#"):
            other.subscribe(topic)
    try:
        assert calls() == alone < 100
    finally:
        for topic in [*one.filters, *other.filters]:
            one.unsubscribe(topic)
            other.unsubscribe(topic)


# Subscribing, publishing, sending


async def test_the_welcome_has_an_id_the_host_and_the_process(server: Server) -> None:
    """Each connection gets an id of its own."""
    async with client(server, "/ws") as one, client(server, "/ws") as other:
        first, second = json.loads(await receive(one)), json.loads(await receive(other))
    assert first.keys() == second.keys() == {"type", "id", "host", "pid"}
    assert first["id"] != second["id"]
    assert first["host"]
    assert first["pid"] == second["pid"] == server.process.pid


async def test_a_connection_gets_one_copy(server: Server) -> None:
    """Several of its filters may match, and it may have subscribed twice."""
    async with connected(server, "a/b", "a/+", "#", "a/b", "+/b/#", "a/#") as subscriber:
        await subscriber.say("publish", topic="a/b", data=1)
        assert len(await subscriber.heard()) == 1


async def test_every_subscriber_gets_a_copy(server: Server) -> None:
    """Nobody else gets one. `from` is the id of the publisher."""
    async with (
        connected(server, "rooms/1") as publisher,
        connected(server, "rooms/+") as other,
        connected(server, "rooms/2") as elsewhere,
    ):
        data: dict[str, Any] = {"text": "Grüß Gott", "list": [1, 2.5, None, True, {}]}
        await publisher.say("publish", topic="rooms/1", data=data)
        message = {"type": "message", "topic": "rooms/1", "data": data, "from": publisher.id}
        assert await publisher.heard() == await other.heard() == [message]
        assert await elsewhere.heard() == []


async def test_messages_stop_after_an_unsubscribe(server: Server) -> None:
    """Other filters stay. To unsubscribe from a filter without a subscription is no error."""
    async with connected(server, "a/+", "a/1") as subscriber, connected(server, "a/+") as other:
        for topic in ("a/+", "a/+", "never/#"):
            assert await subscriber.answer("unsubscribe", topic=topic) == {
                "type": "unsubscribed",
                "topic": topic,
            }
        for topic in ("a/1", "a/2"):
            await other.say("publish", topic=topic, data=1)
        assert [message["topic"] for message in await other.heard()] == ["a/1", "a/2"]
        assert [message["topic"] for message in await subscriber.heard()] == ["a/1"]
        await subscriber.say("unsubscribe", topic="a/1")
        await subscriber.say("publish", topic="a/1", data=1)
        assert await subscriber.heard() == [{"type": "unsubscribed", "topic": "a/1"}]


async def test_a_client_can_subscribe_to_many_topics_at_once(server: Server) -> None:
    """A list of 500 topics in one message needs no long address."""
    topics = [f"some/{number}/topic" for number in range(500)]
    async with connected(server) as subscriber:
        answer = await subscriber.answer("subscribe", topic=topics)
        assert answer == {"type": "subscribed", "topic": topics}
        for topic in (topics[0], topics[-1]):
            await subscriber.say("publish", topic=topic, data=1)
            assert (await subscriber.hear())["topic"] == topic
        answer = await subscriber.answer("unsubscribe", topic=topics[1:])
        assert answer == {"type": "unsubscribed", "topic": topics[1:]}
        for topic in (topics[-1], topics[0]):
            await subscriber.say("publish", topic=topic, data=2)
        assert [message["topic"] for message in await subscriber.heard()] == [topics[0]]


async def test_a_list_with_a_bad_topic_changes_nothing(server: Server) -> None:
    """A client subscribes to all topics of a list, or to none. A list has at most 1,000."""
    async with connected(server) as subscriber:
        for topics in (["a", "a/#/b"], ["a", 1], ["a"] * 1001):
            assert (await subscriber.answer("subscribe", topic=topics))["type"] == "error"
        await subscriber.say("publish", topic="a", data=1)
        assert await subscriber.heard() == []


async def test_a_client_can_subscribe_in_the_address(server: Server) -> None:
    """As with `/ws?topic=a/%2B&topic=b`. A bad topic is only an error."""
    async with client(server, "/ws?topic=a/%2B&topic=b%23&topic=b") as websocket:
        subscriber = Connection(websocket, json.loads(await receive(websocket)))
        assert await subscriber.hear() == {"type": "subscribed", "topic": "a/+"}
        assert (await subscriber.hear())["type"] == "error"
        assert await subscriber.hear() == {"type": "subscribed", "topic": "b"}
        for topic in ("a/1", "b", "c"):
            await subscriber.say("publish", topic=topic, data=1)
        assert [message["topic"] for message in await subscriber.heard()] == ["a/1", "b"]


async def test_a_direct_message_reaches_the_named_connections(server: Server) -> None:
    """It has one id or several, and `topic` is null. Unknown ids are ignored."""
    async with connected(server) as one, connected(server, "#") as other, connected(server, "#") as sender:
        await sender.say("send", to=one.id, data="one")
        await sender.say("send", to=[one.id, other.id, "nobody", one.id], data="both")
        await sender.say("send", to=[], data="none")
        await sender.say("send", to=sender.id, data="self")
        assert [message["data"] for message in await sender.heard()] == ["self"]
        assert [message["data"] for message in await other.heard()] == ["both"]
        assert await one.heard() == [
            {"type": "message", "topic": None, "data": data, "from": sender.id} for data in ("one", "both")
        ]


@pytest.mark.parametrize("fresh", [program()], indirect=True, ids=["program"])
async def test_a_departed_connection_is_forgotten(fresh: Server) -> None:
    """30 connections with 20 filters each leave in any way. The server holds nothing of them."""
    async with connected(fresh, "1/2") as one:
        alone = inside(fresh)
        async with AsyncExitStack() as stack:
            ports = set()
            for number in range(30):
                topics = [f"{number % 10}/{level}/+" for level in range(19)]
                left = await stack.enter_async_context(connected(fresh, "#", *topics))
                ports.add(port(left.websocket))
                stack.push_async_callback((leave_politely, vanish, reset)[number % 3], left.websocket)
            assert inside(fresh)["filters"] == 1 + 1 + 10 * 19
            assert inside(fresh)["subscribers"] == 31
        await gone(fresh, ports)
        await until(lambda: inside(fresh)["subscribers"] == 1, "the last to be forgotten")
        assert inside(fresh) == alone
        assert post(fresh, "/publish/1/2", b"1") == (200, {"reached": 1})
        assert await one.data() == 1


# Publishing over HTTP, and from the server's own code


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json"])
async def test_a_client_can_publish_over_http(server: Server, content_type: str | None) -> None:
    """As with `curl -d 21.5 .../publish/a/b`. The answer counts the subscribers."""
    headers = {"content_type": content_type} if content_type else {}
    async with connected(server, "sensors/+/temp") as one, connected(server, "#", "sensors/#") as other:
        assert post(server, "/publish/sensors/1/temp", b' {"C" : 21.5}', **headers) == (200, {"reached": 2})
        message = {"type": "message", "topic": "sensors/1/temp", "data": {"C": 21.5}, "from": None}
        assert await one.heard() == await other.heard() == [message]
        assert post(server, "/publish/sensors/1", b"null", **headers) == (200, {"reached": 1})
    assert post(server, "/publish/sensors/1/temp", b"1", **headers)[0] == 200


@pytest.mark.parametrize(
    ("path", "topic"), [("/finance", "/finance"), ("caf%C3%A9/a%20b", "café/a b"), ("a/", "a/"), ("$x", "$x")]
)
async def test_a_path_may_contain_any_topic(server: Server, path: str, topic: str) -> None:
    """A topic that begins with a slash follows /publish/ with a second slash."""
    async with connected(server, topic) as subscriber:
        assert post(server, f"/publish/{path}", b"1") == (200, {"reached": 1})
        assert (await subscriber.hear())["topic"] == topic


async def test_stats_count_the_subscribers(server: Server) -> None:
    """A load balancer may ask whether the server is ready."""

    def subscribers() -> int:
        status, _, body = server.get("/stats")
        assert status == 200
        count: int = json.loads(body)["subscribers"]
        return count

    await until(lambda: subscribers() == 0, "others to have left")
    async with client(server, "/ws"):
        await until(lambda: subscribers() == 1, "the subscriber to be counted")
    await until(lambda: subscribers() == 0, "the subscriber to have left")


async def test_a_client_can_broadcast_over_http(server: Server) -> None:
    """All connections get the message, even without a subscription. The answer counts them."""
    async with connected(server) as one, connected(server, "a", "#") as other:
        await until(lambda: post(server, "/broadcast", b"0") == (200, {"reached": 2}), "others to have left")
        await one.heard()
        await other.heard()
        assert post(server, "/broadcast", b'{"stop": true}') == (200, {"reached": 2})
        message = {"type": "message", "topic": None, "data": {"stop": True}, "from": None}
        assert await one.heard() == await other.heard() == [message]


@pytest.mark.parametrize("path", ["/publish/a", "/broadcast"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"a=1", b"1 2", b"\xff", b"NaN", b"-Infinity", b"1e999", b"[" * 10_000, b'"\\ud800"']
)
async def test_bad_json_is_refused_over_http(server: Server, path: str, body: bytes) -> None:
    """The publisher gets 400 and the reason, and nobody gets a message."""
    async with connected(server, "#") as subscriber:
        status, answer = post(server, path, body)
        assert status == 400
        assert "JSON" in answer["detail"]
        assert await subscriber.heard() == []


@pytest.mark.parametrize("path", ["", "%23", "a/%2B", "a%00", "a" * 65_000 + "%C3%A9" * 300])
async def test_a_bad_topic_is_refused_over_http(server: Server, path: str) -> None:
    """The publisher gets 400 and the reason."""
    status, answer = post(server, f"/publish/{path}", b"1")
    assert status == 400
    assert re.search("1 to 65535 bytes|no wildcards", answer["detail"])


@pytest.mark.parametrize("path", ["/publish/a", "/broadcast"])
async def test_a_message_over_a_mebibyte_is_refused_over_http(server: Server, path: str) -> None:
    """The publisher gets 413, with or without a length in the request. 1 MiB is accepted."""
    assert post(server, path, b'"' + b"x" * (MIB - 2) + b'"')[0] == 200
    for headers in ({}, {"transfer_encoding": "chunked"}):
        body = b'"' + b"x" * (MIB - 1) + b'"'
        if headers:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        status, answer = post(server, path, body, **headers)
        assert status == 413
        assert str(MIB) in answer["detail"]


@pytest.mark.parametrize("fresh", [program()], indirect=True, ids=["program"])
async def test_server_code_can_publish(fresh: Server) -> None:
    """publish() counts the subscribers. It raises for invalid topics and data, and harms nobody."""
    async with connected(fresh, "orders/+", "a") as one, connected(fresh, "orders/7") as other:
        assert post(fresh, "/orders/7", b"") == (200, 2)
        message = {"type": "message", "topic": "orders/7", "data": {"number": 7}, "from": None}
        assert await one.heard() == await other.heard() == [message]
        for which in ("topic", "data", "half"):
            assert post(fresh, f"/wrong/{which}", b"")[0] == 400
        assert post(fresh, "/orders/7", b"") == (200, 2)
        assert await one.heard() == await other.heard() == [message]


@pytest.mark.parametrize("fresh", [program()], indirect=True, ids=["program"])
async def test_server_code_publishes_objects_to_several_topics(fresh: Server) -> None:
    """A Pydantic model, a dataclass and a datetime become JSON. Each topic gets a message."""
    async with connected(fresh, "a", "b") as one, connected(fresh, "b") as other:
        assert post(fresh, "/objects", b"") == (200, [3, 1])
        reading = {"at": "2026-01-02T00:00:00Z", "value": 1.5}
        came = [(message["topic"], message["data"]) for message in await one.heard()]
        assert came == [("a", reading), ("b", reading), ("a", [{"level": 3}, "2026-01-02T00:00:00Z"])]
        assert [message["data"] for message in await other.heard()] == [reading]


async def test_server_code_subscribes_with_a_callback(noisy: Server) -> None:
    """It gets each message until its task is cancelled, even if the callback fails."""
    assert post(noisy, "/listen", b"")[0] == 200
    async with connected(noisy) as publisher:
        for topic, payload in (("sensors/1", "fail"), ("other", 0), ("sensors/2", 2), ("alarms", 3)):
            await publisher.say("publish", topic=topic, data=payload)
        await until(lambda: len(json.loads(noisy.get("/heard")[2])) == 3, "the callbacks")
        expected = [("sensors/1", "fail"), ("sensors/2", 2), ("alarms", 3)]
        assert json.loads(noisy.get("/heard")[2]) == [
            {"type": "message", "topic": topic, "data": payload, "from": publisher.id}
            for topic, payload in expected
        ]
        assert "a callback for ['sensors/+', 'alarms'] failed" in noisy.log
        assert post(noisy, "/stop", b"")[0] == 200
        assert inside(noisy)["filters"] == 0


# Across workers


def held(server: Server, ports: set[int]) -> dict[int, set[int]]:
    """Which process holds which of these connections."""
    held = {
        process.pid: {conn.raddr.port for conn in process.net_connections("tcp") if conn.raddr} & ports
        for process in server.processes()
    }
    return {pid: theirs for pid, theirs in held.items() if theirs}


async def check_every_worker_is_reached(server: Server, patience: float = TIMEOUT) -> None:
    """40 connections over 4 workers get each 100 messages, of 4 publishers, each publisher's in order.

    It waits for the last as long as it has patience.
    """
    wait_for(lambda: server.log.count("Application startup complete") == 4, "the workers")
    got: list[list[tuple[int, int]]] = []

    async def take(websocket: ClientConnection, messages: list[tuple[int, int]]) -> None:
        with suppress(ConnectionClosed):
            async for text in websocket:
                message = json.loads(text)
                if "data" in message:
                    messages.append(tuple(message["data"]))

    async with AsyncExitStack() as stack:

        async def join() -> ClientConnection:
            return await stack.enter_async_context(client(server, "/ws?topic=t"))

        websockets: list[ClientConnection] = []
        while len(websockets) < 40 or len(held(server, set(map(port, websockets)))) < 2:
            websockets += await asyncio.gather(*(join() for _ in range(40)))
        for websocket in websockets:
            async with asyncio.timeout(TIMEOUT):
                await (await websocket.ping())
        got = [[] for _ in websockets]
        tasks = [asyncio.create_task(take(*pair)) for pair in zip(websockets, got, strict=True)]
        publishers = await asyncio.gather(*(join() for _ in range(4)))
        for number, publisher in enumerate(publishers):
            write(publisher, publications("t", [[number, count] for count in range(25)]))
        expected = 100 * len(websockets)
        with suppress(AssertionError):
            await until(lambda: sum(map(len, got)) >= expected, "all to arrive", patience)
        for websocket in (*websockets, *publishers):
            await websocket.close()
        await asyncio.gather(*tasks)
    reached = sum(map(len, got))
    assert reached == expected, f"reached: {reached} of {expected} deliveries"
    for messages in got:
        for number in range(4):
            assert [count for publisher, count in messages if publisher == number] == list(range(25))


@pytest.fixture(scope="module")
def crew() -> Iterator[Server]:
    """Four workers and a Redis."""
    with (
        closing(Redis()) as broker,
        running(with_options(WITH_REDIS, "--workers", "4"), env={"REDIS_URL": broker.url()}) as server,
    ):
        wait_for(lambda: listening(broker) == 4, "the workers to listen")
        yield server
        check_quiet(server.log)


async def test_a_message_reaches_every_worker(crew: Server) -> None:
    """A connection gets every message, whichever worker it is on."""
    await check_every_worker_is_reached(crew)


@pytest.mark.parametrize("naive", [["--workers", "4"]], indirect=True, ids=["4 workers"])
async def test_the_naive_version_reaches_only_one_worker(naive: Server) -> None:
    """Each worker has its own list of connections: about a quarter of 4,000 messages arrive."""
    with fails(r"reached: \d+ of \d+ deliveries"):
        await check_every_worker_is_reached(naive, 1 * SLOWNESS)


async def test_a_direct_message_crosses_workers(crew: Server) -> None:
    """So do a list of ids on several workers, and a broadcast."""
    async with AsyncExitStack() as stack:
        members: list[Connection] = []
        while len({member.pid for member in members}) < 2:
            members += await asyncio.gather(*(stack.enter_async_context(connected(crew)) for _ in range(8)))
        ports = {port(member.websocket): member.pid for member in members}
        for pid, theirs in held(crew, set(ports)).items():
            assert {ports[number] for number in theirs} == {pid}, "the welcome names another process"
        one = members[0]
        other = next(member for member in members if member.pid != one.pid)
        await one.say("send", to=other.id, data="one")
        await one.say("send", to=[one.id, other.id], data="both")
        assert [await other.data(), await other.data(), await one.data()] == ["one", "both", "both"]
        assert post(crew, "/broadcast", b'"all"')[0] == 200
        for member in members:
            assert await member.data() == "all"
            assert await member.heard() == []


# Redis goes away


async def data_after_gaps(connection: Connection) -> Any:
    """The data of the next message. Notices of gaps may come first."""
    while (message := await connection.hear()) == GAP:
        pass
    return message["data"]


async def check_messages_cross(here: Connection, there: Connection) -> None:
    """They cross both ways. When they have, no notice of a gap is still on its way."""
    for publisher in (there, here):
        await publisher.say("publish", topic="t", data=publisher.id)
        assert await data_after_gaps(here) == await data_after_gaps(there) == publisher.id


async def test_messages_cross_again_when_redis_is_back(pair: list[Server], broker: Redis) -> None:
    """Connections stay, messages stay in their process meanwhile, and for ever; one line says so.

    Within two seconds of its return they cross again.
    """
    marks = [len(server.log) for server in pair]
    async with connected(pair[0], "t") as here, connected(pair[1], "t") as there:
        await here.say("publish", topic="t", data="before")
        assert await here.data() == await there.data() == "before"
        broker.kill()
        try:
            for server, mark in zip(pair, marks, strict=True):
                await until(lambda: "Redis is gone" in server.log[mark:], "the line")  # noqa: B023
            await here.say("publish", topic="t", data="here")
            await there.say("publish", topic="t", data="there")
            assert await here.data() == "here"
            assert await there.data() == "there"
            await asyncio.sleep(3 * redis_lesson.RETRY)  # tries that fail, and say nothing
        finally:
            broker.start()
        back = time.monotonic()
        await until(lambda: listening(broker) == 2, "both to listen again")
        for server, mark in zip(pair, marks, strict=True):
            await until(lambda: "Redis is back" in server.log[mark:], "the line")  # noqa: B023
        assert await here.hear() == await there.hear() == GAP
        await check_messages_cross(here, there)
        assert time.monotonic() - back < 2 * SLOWNESS
    for server, mark in zip(pair, marks, strict=True):
        [line] = [line for line in server.log[mark:].splitlines() if "INFO" not in line]
        assert re.match("ERROR: +Redis is gone .*messages stay in their process", line)


async def test_a_redis_that_does_not_answer_delays_no_local_subscriber(
    pair: list[Server], broker: Redis
) -> None:
    """As of a machine that cannot be reached: what is published goes on to local subscribers, at once.

    Both servers say so, also the one at which nobody publishes, and come back by themselves.
    """
    marks = [len(server.log) for server in pair]
    async with connected(pair[0], "t") as here, connected(pair[1], "t") as there:
        broker.stop()
        try:
            async with asyncio.timeout(SOON):
                write(here.websocket, publications("t", range(200)))
                assert [await here.data() for _ in range(200)] == list(range(200))
            assert await there.heard() == []
            for server, mark in zip(pair, marks, strict=True):
                # It is silent for REDIS_TIMEOUT, is asked whether it is there, and doesn't say for as long.
                await until(lambda: "Redis is gone" in server.log[mark:], "the line", 4 * REDIS_TIMEOUT)  # noqa: B023
            await there.say("publish", topic="t", data="there")
            assert await there.data() == "there"
        finally:
            broker.go_on()
        for server, mark in zip(pair, marks, strict=True):
            await until(lambda: "Redis is back" in server.log[mark:], "the line")  # noqa: B023
        await until(lambda: listening(broker) == 2, "both to listen again")
        assert await here.hear() == await there.hear() == GAP
        await check_messages_cross(here, there)
    for server, mark in zip(pair, marks, strict=True):
        assert server.log[mark:].count("ERROR") == 1


async def test_all_subscribers_are_told_if_one_server_loses_its_connection(
    pair: list[Server], broker: Redis
) -> None:
    """For what is published there meanwhile does not reach the subscribers of the other server."""
    marks = [len(server.log) for server in pair]
    async with connected(pair[0], "t") as here, connected(pair[1], "t") as there:
        with closing(redis.Redis(port=broker.port)) as admin:
            admin.client_kill_filter(_id=admin.client_list(_type="pubsub")[0]["id"])
        assert await here.hear() == await there.hear() == GAP
        await check_messages_cross(here, there)
    logs = [server.log[mark:] for server, mark in zip(pair, marks, strict=True)]
    assert sorted(log.count("Redis is gone") for log in logs) == [0, 1]


async def test_a_server_notices_that_only_its_subscription_is_cut_off(
    pair: list[Server], broker: Redis
) -> None:
    """Its other connection to Redis still works. It subscribes again, and tells its subscribers of a gap."""
    command = program("pubsub_redis_server", REDIS_TIMEOUT=SLOWNESS)
    async with relay(broker) as (url, cut_off):
        with ExitStack() as stack:
            # In a thread, for the relay must run while the server starts.
            server = await asyncio.to_thread(stack.enter_context, running(command, env={"REDIS_URL": url}))
            await until(lambda: listening(broker) == 3, "it to listen, too")
            async with connected(pair[0], "t") as here, connected(server, "t") as there:
                await check_messages_cross(here, there)
                mark = len(server.log)
                cut_off()
                await here.say("publish", topic="t", data="lost")
                assert await here.data() == "lost"
                await until(lambda: "Redis is gone (no answer)" in server.log[mark:], "the line")
                assert await there.hear() == GAP
                await check_messages_cross(here, there)
            check_quiet(server.log)


async def test_subscribers_are_told_of_what_a_redis_that_hung_has_lost(
    pair: list[Server], broker: Redis
) -> None:
    """It hangs too long for what is published, but answers before the servers count it as gone."""
    async with connected(pair[0], "t") as here, connected(pair[1], "t") as there:
        await check_messages_cross(here, there)
        broker.stop()
        try:
            await here.say("publish", topic="t", data="lost")
            assert await here.data() == "lost"
            # After one REDIS_TIMEOUT, the message is lost. After two, Redis counts as gone.
            await asyncio.sleep(1.5 * REDIS_TIMEOUT)
        finally:
            broker.go_on()
        while await there.hear() != GAP:
            pass  # the message may come late, too
        # On a slow machine, Redis may have counted as gone.
        await until(lambda: all(map(knows_redis, pair)), "both to know that Redis is there")
        await check_messages_cross(here, there)


async def test_a_foreign_message_in_redis_is_only_logged(pair: list[Server], broker: Redis) -> None:
    """Another program published it on the same channel."""
    junk: list[str | bytes] = [
        "hello",
        "",
        "5\n{}",
        "[1]\n{}",
        "{\n{}",
        "null\n{}",
        b"\xff\n{}",
        "[" * 100_000 + "\n{}",
    ]
    junk += [f'["x",{topic},null]\n{{}}' for topic in ("5", "true", '["t"]', "{}")]
    junk += [f'["x",null,{ids}]\n{{}}' for ids in ("5", '"t"', "[[1]]")]
    said = re.compile("ERROR: +the channel pubsub brought something that is not ours: .{,80}")
    marks = [len(server.log) for server in pair]
    async with connected(pair[0], "t") as here, connected(pair[1], "t") as there:
        with closing(redis.Redis(port=broker.port)) as stranger:
            for message in junk:
                assert stranger.publish(redis_lesson.CHANNEL, message) == 2
        for server, mark in zip(pair, marks, strict=True):
            await until(lambda: server.log[mark:].count("ERROR") >= len(junk), "a line for each")  # noqa: B023
            lines = [line for line in server.log[mark:].splitlines() if "INFO" not in line]
            assert len(lines) == len(junk)
            assert all(said.fullmatch(line) for line in lines)
        await here.say("publish", topic="t", data=1)
        assert await here.data() == await there.data() == 1


async def test_an_error_of_uvloop_does_not_stop_the_broker(
    broker: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop raises RuntimeError if Redis closes a connection that redis-py has just opened."""
    connection_class: Any = redis.asyncio.Connection
    connect = connection_class.connect
    failures = 0

    async def fail_at_first(connection: object) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:  # the first connections of forward() and subscribe()
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>")
        await connect(connection)

    monkeypatch.setattr(connection_class, "connect", fail_at_first)
    came: list[str | None] = []

    async def handle(envelope: str | None) -> None:
        came.append(envelope)

    one = redis_lesson.Broker(broker.url())
    await one.outbox.put("lost")  # so that forward() connects at once, too
    async with asyncio.timeout(TIMEOUT), one.connect(handle):
        await one.connected.wait()
        await one.send("an envelope")
        await until(lambda: "an envelope" in came, "the envelope")


async def test_a_server_without_redis_serves_its_own_clients() -> None:
    """It says so in a line, and finds Redis when it comes."""
    with closing(Redis()) as broker:
        broker.kill()
        with running(WITH_REDIS, env={"REDIS_URL": broker.url()}) as server:
            async with connected(server, "t") as subscriber:
                await until(lambda: "Redis is gone" in server.log, "the line")
                await subscriber.say("publish", topic="t", data=1)
                assert await subscriber.data() == 1
                broker.start()
                await until(lambda: listening(broker) == 1, "it to find Redis")
                await until(lambda: "Redis is back" in server.log, "the line")
                assert await subscriber.hear() == GAP
                await subscriber.say("publish", topic="t", data=2)
                assert await subscriber.data() == 2
            assert server.log.count("ERROR") == 1
            check_quiet(server.log)


@pytest.mark.parametrize("url", ["localhost:6379", "redis://localhost:port"])
def test_a_bad_redis_url_is_one_clear_line(url: str) -> None:
    """The server does not start, and prints no traceback."""
    command = [sys.executable, "lessons/pubsub_redis_server.py", "--port", "0"]
    env = {**os.environ, "REDIS_URL": url}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 3
    [line] = ended.stderr.splitlines()
    assert line.startswith("REDIS_URL is not the address of a Redis: ")


def test_the_redis_server_differs_in_one_class() -> None:
    """Outside the class Broker, only its configuration and its imports are different."""

    def without_broker(path: str) -> list[str]:
        source = without_docstring((ROOT / "lessons" / path).read_text())
        start, end = source.index("class Broker:"), source.index("class Subscriber:")
        return (source[:start] + source[end:]).splitlines()

    memory, redis = without_broker("pubsub_server.py"), without_broker("pubsub_redis_server.py")
    changed = [line for line in difflib.ndiff(memory, redis) if line[0] in "+-"]
    assert [line for line in changed if line[0] == "-"] == ["- broker = Broker()"]
    assert len(changed) < 20


async def test_another_broker_can_be_plugged_in(broker: Redis) -> None:
    """tests/examples/streams_broker.py connects two processes over a Redis Stream."""
    command, env = uvicorn_command("tests.examples.streams_broker:app"), {"REDIS_URL": broker.url()}
    with running(command, env=env) as one, running(command, env=env) as other:
        async with connected(one, "t") as here, connected(other, "t") as there:
            for number in range(3):
                await here.say("publish", topic="t", data=number)
            assert [await there.data() for _ in range(3)] == [await here.data() for _ in range(3)]
            assert await here.heard() == await there.heard() == []
        for server in (one, other):
            server.interrupt()
            assert server.ends_within(2) is not None
            check_quiet(server.log)


# A slow subscriber


class Ledger:
    """Numbered messages as they come: they must be in order, and `dropped` tell of each gap, in its place."""

    def __init__(self, first: int) -> None:
        self.numbers: list[int] = []
        self.gaps: list[tuple[int, int]] = []  # the first that is missing, and how many are
        self.following = first

    def take(self, frame: str) -> None:
        message = json.loads(frame)
        if message["type"] == "dropped":
            self.gaps.append((self.following, message["count"]))
            self.following += message["count"]
        else:
            number = int(message["data"][:6])
            assert number == self.following, f"{number} came where {self.following} should; {self.gaps}"
            self.numbers.append(number)
            self.following += 1

    async def take_until(self, websocket: ClientConnection, following: int) -> None:
        while self.following < following:
            self.take(await receive(websocket))


def payloads(numbers: Iterable[int], size: int) -> list[str]:
    return [str(number).rjust(6, "0").ljust(size, "x") for number in numbers]


async def lap(publisher: Connection, readers: list[Connection], numbers: range, size: int) -> list[float]:
    """Publish to `all`, each when all readers have the one before. Returns how long each delivery took."""
    seconds = []
    for payload in payloads(numbers, size):
        start = time.monotonic()
        await publisher.say("publish", topic="all", data=payload)
        for reader in readers:
            assert await reader.data() == payload
            seconds.append(time.monotonic() - start)
    return seconds


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


@pytest.mark.parametrize(
    ("fresh", "policy"),
    [pytest.param(program(BUFFER=BUFFER, WHEN_SLOW=policy), policy, id=policy) for policy in POLICIES],
    indirect=["fresh"],
)
async def test_a_slow_subscriber_delays_nobody_else(fresh: Server, policy: str) -> None:
    """One of 100 stops reading: the others get all, in order, as soon as before, and memory is bounded.

    When it reads again, it is told what it missed, or why it was disconnected.
    """
    first, second, total = 30, 190, 3190
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(connected(fresh))
        readers = [await stack.enter_async_context(connected(fresh, "all")) for _ in range(98)]
        witness = await stack.enter_async_context(connected(fresh, "#"))
        readers.append(witness)
        before = await lap(publisher, readers, range(first), 40_000)

        slow = await stack.enter_async_context(connected(fresh, "#", sock=narrow(fresh)))
        slow.websocket.transport.pause_reading()
        stack.callback(slow.websocket.transport.abort)
        during = await lap(publisher, readers, range(first, second), 40_000)
        assert statistics.median(during) < 5 * statistics.median(before) + 0.05 * SLOWNESS
        assert p99(during) < 5 * p99(before) + 0.2 * SLOWNESS

        memory = fresh.rss()
        for start in range(second, total, 25):  # by half of what the witness's buffer holds
            batch = payloads(range(start, start + 25), 10_000)
            write(publisher.websocket, publications("one", batch))
            assert [await witness.data() for _ in batch] == batch
        grown = fresh.rss() - memory
        assert grown < 10 * MIB, f"memory grew by {grown / MIB:.0f} of {(total - second) // 100} MiB"

        ledger = Ledger(first)
        slow.websocket.transport.resume_reading()
        if policy == "disconnect":
            for frame in await receive_all(slow.websocket):
                ledger.take(frame)
            assert ledger.gaps == []
            assert first + BUFFER < ledger.following < second
            assert slow.websocket.close_code == 1013
            assert slow.websocket.close_reason == f"too slow: {BUFFER} messages waited"
            await gone(fresh, {port(slow.websocket)})
            assert post(fresh, "/publish/one", b"1") == (200, {"reached": 1})
            return
        await ledger.take_until(slow.websocket, total)
        assert ledger.following == total
        [(start, count)] = ledger.gaps
        assert count > 2500
        assert start + count == total - BUFFER
        for payload in payloads(range(total, total + 3), 10):
            await publisher.say("publish", topic="one", data=payload)
            assert await slow.data() == payload
        assert [len(await reader.heard()) for reader in readers] == [0] * 98 + [3]


@pytest.mark.parametrize("fresh", [program(BUFFER=BUFFER, WHEN_SLOW="disconnect")], indirect=True)
async def test_a_subscriber_that_stops_reading_is_disconnected_at_once(fresh: Server) -> None:
    """It is forgotten while its socket is still full. If it reads again soon, it is told why."""
    async with connected(fresh) as publisher, connected(fresh, "t", sock=narrow(fresh)) as slow:
        slow.websocket.transport.pause_reading()
        reached, number = 1, 0
        while reached:
            assert number < 300, "it is never disconnected"
            status, answer = post(fresh, "/publish/t", json.dumps("x" * 40_000).encode())
            assert status == 200
            reached, number = answer["reached"], number + 1
        assert inside(fresh)["subscribers"] == 1
        slow.websocket.transport.resume_reading()
        assert BUFFER / 2 < len(await receive_all(slow.websocket)) < number - BUFFER
        assert slow.websocket.close_code == 1013
        assert slow.websocket.close_reason == f"too slow: {BUFFER} messages waited"
        await publisher.say("publish", topic="t", data=1)


@pytest.mark.parametrize(
    "fresh", [program(BUFFER=BUFFER, WHEN_SLOW="disconnect", TIMEOUT=0.2)], indirect=True, ids=["program"]
)
async def test_a_subscriber_that_never_reads_again_is_disconnected(fresh: Server) -> None:
    """Its endpoint ends, although the send that it waits for never returns."""
    async with connected(fresh) as publisher, AsyncExitStack() as stack:
        alone = inside(fresh)
        slow = await stack.enter_async_context(connected(fresh, "t", sock=narrow(fresh)))
        stack.callback(slow.websocket.transport.abort)
        slow.websocket.transport.pause_reading()
        for _ in range(300):
            if post(fresh, "/publish/t", json.dumps("x" * 40_000).encode())[1] == {"reached": 0}:
                break
        await until(lambda: inside(fresh) == alone, "its endpoint to end")
        assert "closed with 1013: too slow" in fresh.log
        assert await publisher.heard() == []


@pytest.mark.parametrize("fresh", [program(BUFFER=200)], indirect=True, ids=["program"])
async def test_many_fast_publishers_drop_nothing(fresh: Server) -> None:
    """40 publishers send 30 messages each, all at once: a subscriber that reads gets all 1,200."""
    process = psutil.Process(fresh.process.pid)
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(connected(fresh, "t"))
        publishers = [await stack.enter_async_context(connected(fresh)) for _ in range(40)]
        process.suspend()
        try:
            await until(lambda: process.status() == psutil.STATUS_STOPPED, "the server to stop")
            for publisher in publishers:
                write(publisher.websocket, publications("t", range(30)))
        finally:
            process.resume()
        assert sorted([await reader.data() for _ in range(1200)]) == sorted([*range(30)] * 40)


@pytest.mark.parametrize("fresh", [program(BUFFER=200)], indirect=True, ids=["program"])
async def test_a_client_that_sends_many_commands_ahead_gets_all_answers(fresh: Server) -> None:
    """There are more of them than fit in its buffer."""
    command = json.dumps({"type": "subscribe", "topic": "t"})
    async with connected(fresh) as subscriber:
        write(subscriber.websocket, [command] * 1000)
        for _ in range(1000):
            answer = json.loads(await receive(subscriber.websocket))
            assert answer == {"type": "subscribed", "topic": "t"}


@pytest.mark.parametrize("fresh", [program(BUFFER=5)], indirect=True, ids=["program"])
async def test_a_subscriber_is_told_of_a_gap_where_it_is(fresh: Server) -> None:
    """A subscriber that reads a little now and then is told of each gap where it is: no sooner, no later.

    The messages are so large that a `dropped`, too, must wait for room, and more are dropped meanwhile.
    """
    async with (
        connected(fresh) as publisher,
        connected(fresh, "t") as witness,
        connected(fresh, "t", sock=narrow(fresh), max_queue=1) as slow,
    ):
        ledger, total = Ledger(0), 60
        for start in range(0, total, 2):
            batch = payloads(range(start, start + 2), 1_000_000)
            write(publisher.websocket, publications("t", batch))
            assert [await witness.data() for _ in batch] == batch
            if start > 20:
                ledger.take(await receive(slow.websocket))
        await ledger.take_until(slow.websocket, total)
        assert ledger.following == total
        assert ledger.gaps


async def data(websocket: ClientConnection) -> Any:
    """The data of the next message that has any, from either server: the naive one sends on what was said."""
    while "data" not in (message := json.loads(await receive(websocket))):
        pass
    return message["data"]


async def check_who_stops_reading_stops_nobody(server: Server) -> None:
    """500 messages of 10 kB, one after the other, come to a subscriber next to one that doesn't read."""
    async with (
        client(server, "/ws") as publisher,
        client(server, "/ws?topic=t", sock=narrow(server)) as slow,
        client(server, "/ws?topic=t") as reader,
    ):
        slow.transport.pause_reading()
        try:
            for number, text in enumerate(publications("t", payloads(range(500), 10_000))):
                await publisher.send(text)
                try:
                    async with asyncio.timeout(1 * SLOWNESS):
                        assert int((await data(reader))[:6]) == number
                except TimeoutError:
                    raise AssertionError(f"stopped after {number} messages") from None
        finally:
            slow.transport.abort()
            publisher.transport.abort()  # the naive server no longer reads what it says


async def test_a_subscriber_that_stops_reading_delays_nobody_else(server: Server) -> None:
    await check_who_stops_reading_stops_nobody(server)


async def test_the_naive_version_waits_for_a_subscriber_that_stops_reading(naive: Server) -> None:
    """Its loop over the connections waits for the one whose socket is full."""
    with fails(r"stopped after \d{2,3} messages"):
        await check_who_stops_reading_stops_nobody(naive)


async def test_a_fast_publisher_drops_nothing(server: Server) -> None:
    """Five subscribers that read get 5,000 small messages, in order."""
    count = 5000
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(connected(server))
        members = [await stack.enter_async_context(connected(server, "t")) for _ in range(5)]
        write(publisher.websocket, publications("t", range(count)))
        for member in members:
            assert [await member.data() for _ in range(count)] == list(range(count))
        assert await publisher.heard() == []


# One connection's fault is its own

BAD: dict[str, tuple[str | bytes, str]] = {  # name -> (frame, what the reason says)
    "binary": (b'{"type": "publish", "topic": "t", "data": 1}', "binary.*send JSON as text"),
    "empty binary": (b"", "binary"),
    "not JSON": ("{nonsense", "JSON.*column 2"),
    "cut short": ('{"type": "publish"', "JSON.*EOF"),
    "empty": ("", "JSON.*EOF"),
    "trailing junk": ('{"type": "publish", "topic": "t", "data": 1} 2', "trailing"),
    "a string": ('"publish"', "object"),
    "a list": ('["publish", "t", 1]', "object"),
    "null": ("null", "object"),
    "too deep": ("[" * 100_000, "recursion"),
    "no type": ('{"topic": "t", "data": 1}', "type"),
    "unknown type": (
        '{"type": "shout", "topic": "t"}',
        "'shout'.*'subscribe', 'unsubscribe', 'publish', 'send'",
    ),
    "a type that is no string": ('{"type": ["publish"], "topic": "t", "data": 1}', "publish"),
    "publish without topic": ('{"type": "publish", "data": 1}', "publish: topic: Field required"),
    "publish without data": ('{"type": "publish", "topic": "t"}', "publish: data: Field required"),
    "subscribe without topic": ('{"type": "subscribe"}', "subscribe: topic: Field required"),
    "send without to": ('{"type": "send", "data": 1}', "send: to: Field required"),
    "a topic that is no string": ('{"type": "publish", "topic": 5, "data": 1}', "publish: topic: .*string"),
    "a list of numbers": ('{"type": "subscribe", "topic": [5]}', "subscribe: topic: .*string"),
    "to a number": ('{"type": "send", "to": 5, "data": 1}', "send: to: .*string"),
    "to a list of numbers": ('{"type": "send", "to": [5], "data": 1}', "send: to: .*string"),
    "1e999": ('{"type": "publish", "topic": "t", "data": [1e999]}', "range float"),
    "NaN": ('{"type": "publish", "topic": "t", "data": NaN}', "range float"),
    "Infinity, sent": ('{"type": "send", "to": [], "data": {"a": -Infinity}}', "range float"),
    "half a surrogate pair": (r'{"type": "publish", "topic": "t", "data": "\ud800"}', "JSON.*hex escape"),
    "2 MiB": (json.dumps({"type": "publish", "topic": "t", "data": "x" * 2 * MIB}), f"at most {MIB} bytes"),
    "too big in UTF-8": (
        f'{{"type":"publish","topic":"t","data":"{"é" * (MIB // 2)}"}}',
        f"at most {MIB} bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_message_is_only_an_error(server: Server, name: str) -> None:
    """Its sender gets an `error` with the reason. The connection goes on, and nobody notices."""
    frame, reason = BAD[name]
    async with connected(server, "t") as offender, connected(server, "#") as bystander:
        await offender.websocket.send(frame)
        error = await offender.hear()
        assert error.keys() == {"type", "reason"}
        assert error["type"] == "error"
        assert re.search(reason, error["reason"]), error["reason"]
        await offender.say("publish", topic="t", data="after")
        assert [message["data"] for message in await offender.heard()] == ["after"]
        assert [message["data"] for message in await bystander.heard()] == ["after"]


async def test_the_largest_message_is_accepted(server: Server) -> None:
    """It has 1 MiB. More than uvicorn's 16 MiB closes the connection with 1009."""
    async with connected(server, "t") as one, connected(server, "t") as other:
        start = '{"type":"publish","topic":"t","data":"'
        await one.websocket.send(start + "x" * (MIB - len(start) - 2) + '"}')
        assert len(await one.data()) == len(await other.data()) == MIB - len(start) - 2
        with suppress(ConnectionClosed):
            await one.websocket.send("x" * (16 * MIB + 1))
        await one.websocket.wait_closed()
        assert one.websocket.close_code == 1009
        assert await other.heard() == []


async def test_resets_in_the_middle_of_a_broadcast_harm_nobody(server: Server) -> None:
    """20 of 50 subscribers reset while 200 messages are published: the others miss none.

    The publisher is told nothing, for it is not its fault.
    """
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(connected(server))
        members = [await stack.enter_async_context(connected(server, "t")) for _ in range(50)]
        leaving, staying = members[::5] + members[1::5], members[2::5] + members[3::5] + members[4::5]
        for start, victim in zip(range(0, 200, 10), leaving, strict=True):
            write(publisher.websocket, publications("t", range(start, start + 10)))
            assert await staying[0].data() == start // 10  # some of the ten are on their way, some to come
            await reset(victim.websocket)
        assert await publisher.heard() == []
        for member in staying:
            got = [message["data"] for message in await member.heard()]
            assert got == list(range(20 if member is staying[0] else 0, 200))


async def check_resets_cost_nobody_a_message(server: Server) -> None:
    """A subscriber is reset, and 10 messages reach the server in the same turn: another gets all 10.

    That 10 times, for the server sees now the one and now the other first.
    """
    process = psutil.Process(server.process.pid)
    for _ in range(10):
        async with (
            client(server, "/ws?topic=t") as victim,
            client(server, "/ws?topic=t") as other,
            client(server, "/ws") as publisher,
        ):
            await publisher.send(publications("t", ["before"])[0])
            assert await data(victim) == await data(other) == "before"
            process.suspend()
            try:
                await until(lambda: process.status() == psutil.STATUS_STOPPED, "the server to stop")
                await reset(victim)
                write(publisher, publications("t", range(10)))
            finally:
                process.resume()
            got: list[int] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(1 * SLOWNESS):
                    while len(got) < 10:
                        got.append(await data(other))
            lost, code = 10 - len(got), publisher.close_code
            assert lost == 0, f"lost: {lost} of 10 messages; the publisher's close code: {code}"
            async with asyncio.timeout(TIMEOUT):
                await (await publisher.ping())


async def test_resets_cost_nobody_a_message(server: Server) -> None:
    await check_resets_cost_nobody_a_message(server)


async def test_the_naive_version_loses_messages_and_the_publisher_after_a_reset(naive: Server) -> None:
    """To send to a departed subscriber raises an error in the endpoint of the publisher."""
    with fails("lost: 10 of 10 messages; the publisher's close code: 1006"):
        await check_resets_cost_nobody_a_message(naive)


# Pages


@pytest.mark.parametrize("path", ["/ws", "/ws?topic=t"])
@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://127.0.0.1"])
async def test_a_foreign_page_gets_no_websocket(server: Server, path: str, origin: str) -> None:
    """It gets 403, and the log gets a line."""
    await check_foreign_page_is_refused(server, path, origin)


async def test_the_naive_version_lets_any_page_in(naive: Server) -> None:
    with fails(f"{FOREIGN} was let in"):
        await check_foreign_page_is_refused(naive, "/ws", FOREIGN)


@pytest.mark.parametrize("path", ["/publish/t", "/broadcast"])
async def test_a_foreign_page_cannot_publish(server: Server, path: str) -> None:
    """It gets 403, and nobody gets a message. A browser asks nobody before such a POST."""
    async with connected(server, "t") as subscriber:
        assert post(server, path, b"1", origin=FOREIGN, content_type="text/plain")[0] == 403
        assert await subscriber.heard() == []


async def test_the_servers_own_page_is_let_in(server: Server) -> None:
    """This holds for websockets and HTTP, also behind TLS."""
    for scheme in ("http", "https"):
        origin = server.url("", scheme)
        async with connected(server, "t", origin=origin) as subscriber:
            assert post(server, "/publish/t", b"1", origin=origin) == (200, {"reached": 1})
            assert await subscriber.data() == 1


async def test_the_page_has_a_policy(server: Server) -> None:
    """GET / serves a page in which text from others cannot run as code."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        assert response.getheader("content-type") == "text/html; charset=utf-8"
        policy = response.getheader("content-security-policy") or ""
        assert "default-src 'self'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert b"<title>" in response.read()


# The end


async def check_ends(
    server: Server, number: signal.Signals, seconds: float, websockets: list[ClientConnection]
) -> None:
    """After the signal it ends in time, quietly and wholly, and these are told."""
    server.interrupt(number)
    took = await asyncio.to_thread(server.ends_within, seconds)
    assert took is not None, f"still running {seconds} s after {number.name}:\n{server.log}"
    await until(lambda: not server.processes(), "the last of its processes to end", SLOWNESS)
    check_quiet(server.log)
    for websocket in websockets:
        await websocket.wait_closed()
        assert websocket.close_code == 1012


WITH_AND_WITHOUT_REDIS = pytest.mark.parametrize(
    "fresh", [COMMAND, "Redis"], indirect=True, ids=["memory", "Redis"]
)
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
@WITH_AND_WITHOUT_REDIS
async def test_an_idle_server_ends_within_a_second(fresh: Server, number: signal.Signals) -> None:
    """All 100 subscribers are closed with 1012."""
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(connected(fresh, "t")) for _ in range(100)]
        await check_ends(fresh, number, 1, [member.websocket for member in members])
    assert "ERROR" not in fresh.log


@SIGNALS
@WITH_AND_WITHOUT_REDIS
async def test_the_server_ends_within_a_second_while_messages_flow(
    fresh: Server, number: signal.Signals
) -> None:
    """All 20 subscribers are closed with 1012."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        publisher = await stack.enter_async_context(connected(fresh))
        members = [await stack.enter_async_context(connected(fresh, "t")) for _ in range(20)]
        came = 0

        async def flow() -> None:
            nonlocal came
            with suppress(ConnectionClosed):
                while True:
                    write(publisher.websocket, publications("t", range(50)))
                    for _ in range(40):  # and some more are on their way when the next 50 go
                        await members[0].data()
                        came += 1

        group.create_task(flow())
        await until(lambda: came > 400, "the flow")
        await check_ends(fresh, number, 1, [member.websocket for member in members])


@SIGNALS
@WITH_AND_WITHOUT_REDIS
async def test_the_server_ends_although_a_subscriber_does_not_read(
    fresh: Server, number: signal.Signals
) -> None:
    """It ends after --timeout-graceful-shutdown. The others are closed with 1012."""
    async with connected(fresh, "t") as reader, connected(fresh, "t", sock=narrow(fresh)) as slow:
        slow.websocket.transport.pause_reading()
        for payload in payloads(range(500), 10_000):
            await reader.say("publish", topic="t", data=payload)
            assert await reader.data() == payload
        try:
            await check_ends(fresh, number, 2.5, [reader.websocket])
        finally:
            slow.websocket.transport.abort()


async def test_a_request_that_waits_for_redis_gets_503_when_the_server_stops() -> None:
    """It waits because Redis hangs and the outbox is full."""
    with closing(Redis()) as broker:
        command = program("pubsub_redis_server", OUTBOX=1, REDIS_TIMEOUT=6 * TIMEOUT)
        with running(command, env={"REDIS_URL": broker.url()}) as server:
            async with connected(server, "t") as subscriber:
                broker.stop()
                posts = [
                    asyncio.create_task(asyncio.to_thread(post, server, "/publish/t", b"1")) for _ in "1234"
                ]
                for _ in posts:
                    assert await subscriber.data() == 1
                await check_ends(server, signal.SIGINT, 2.5, [subscriber.websocket])
                answers = await asyncio.gather(*posts)
        assert (503, {"detail": "the server is stopping"}) in answers


@pytest.mark.parametrize("end", ["the client leaves", "the server stops"])
async def test_half_a_request_leaves_no_traceback(fresh: Server, end: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", fresh.port)
    writer.write(b"POST /publish/t HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n1")
    # The server says 100 when it begins to read.
    assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
    if end == "the client leaves":
        writer.close()
        await gone(fresh, {writer.get_extra_info("sockname")[1]})
    await check_ends(fresh, signal.SIGINT, 2.5, [])
    if end == "the server stops":
        assert b"503 Service Unavailable" in await reader.read()
        writer.close()
