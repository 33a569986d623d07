"""The chat in a real browser: windows on two servers behind one Redis, hostile company, its looks."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from socket import create_connection
from typing import Any, Literal

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    ViewportSize,
    WebSocketRoute,
    async_playwright,
    expect,
)
from websockets.asyncio.client import ClientConnection, connect

from tests.kit.browser import CONTRAST, FLAGS, barriers
from tests.kit.commands import uvicorn_command
from tests.kit.needs import CHROMIUM, needs_browser
from tests.kit.ports import free_port
from tests.kit.root import ROOT
from tests.kit.servers import Server
from tests.kit.waiting import SLOWNESS, TIMEOUT, until, wait_for

PHONE: ViewportSize = {"width": 360, "height": 740}
AT_ONCE = 3000 * SLOWNESS  # ms: less than the page takes to forget who is silent
CONTROLS = "button:visible, input:visible, a:visible, [tabindex]:visible"
COMMAND = uvicorn_command("lessons.pubsub_redis_server:app")
MARKUP = "<img src=x onerror=window.ran=1><script>ran=1</script>"
# What may come on a topic: any JSON. Its text as the chat shows it.
SHAPELESS = {
    "21.5": "21.5",
    "null": "null",
    '"text"': '"text"',
    "[1, [2]]": "[1,[2]]",
    '{"name": 1, "text": "a"}': '{"name":1,"text":"a"}',
    '{"name": "Eve"}': '{"name":"Eve"}',
    '{"name": {"toString": 1}, "text": []}': '{"name":{"toString":1},"text":[]}',
    '{"__proto__": {"name": "Eve", "text": "a"}}': '{"__proto__":{"name":"Eve","text":"a"}}',
}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    needs_browser,
]
numbers = count(1)


class Window:
    """The page, opened by somebody; and what is in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []  # in the console
        page.set_default_timeout(1000 * TIMEOUT)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        # That the server is not there is no fault of the page's.
        if message.type in ("error", "warning") and "net::ERR_CONNECTION_" not in message.text:
            self.problems.append(message.text)

    @property
    def state(self) -> Locator:
        return self.page.get_by_role("status")

    @property
    def people(self) -> Locator:
        return self.page.get_by_role("list", name="Who is here").get_by_role("listitem")

    @property
    def rooms(self) -> Locator:
        return self.page.get_by_role("list", name="Rooms").get_by_role("listitem")

    @property
    def said(self) -> Locator:
        """The texts of the messages."""
        return self.page.locator("#log .text")

    @property
    def authors(self) -> Locator:
        return self.page.locator("#log b")

    @property
    def notices(self) -> Locator:
        return self.page.locator("#log .notice")

    @property
    def room(self) -> Locator:
        return self.page.get_by_label("Room", exact=True)

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    async def press(self, name: str) -> None:
        await self.page.get_by_role("button", name=name, exact=True).click()

    async def join(self, name: str, room: str) -> None:
        await self.page.get_by_label("Your name").fill(name)
        await self.room.fill(room)
        await self.room.press("Enter")
        await expect(self.state).to_contain_text("connected to process")
        await expect(self.people.get_by_text("(you)")).to_have_count(1)
        # At first, the page still shows the people of the old room. The count of the new room comes
        # with the window's own announcement, which the server handles after the subscription.
        counted = re.compile(rf"^{re.escape(room)} [1-9]\d*$")
        await expect(self.rooms.filter(has_text=counted)).to_have_count(1)

    async def say(self, text: str) -> None:
        await self.message.fill(text)
        await self.message.press("Enter")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    assert CHROMIUM, "no browser: CI has to install one"
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def accepts() -> bool:
        with suppress(OSError):
            create_connection(("127.0.0.1", port), 1).close()
            return True
        return False

    try:
        wait_for(accepts, "Redis")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        redis.kill()
        redis.wait()


@pytest.fixture(scope="module")
def pair(redis_url: str) -> Iterator[list[Server]]:
    """Two servers behind one Redis. A test may put another in the place of one, on its port."""
    servers = [Server(COMMAND, env={"REDIS_URL": redis_url}) for _ in range(2)]
    try:
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


@asynccontextmanager
async def opened(browser: Browser, server: Server) -> AsyncIterator[Window]:
    """Open the page. Whatever happens there, nothing comes from elsewhere."""
    page = await browser.new_page()
    window = Window(page)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("websocket", lambda websocket: requested.append(websocket.url))
    try:
        response = await page.goto(server.url("/", "http"))
        assert response
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        yield window
    finally:
        await page.close()
    origin = re.compile(rf"(http|ws)://127.0.0.1:{server.port}/")
    assert not [url for url in requested if not origin.match(url)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def windows(browser: Browser, pair: list[Server]) -> AsyncIterator[list[Window]]:
    """Two windows, one on each server."""
    async with opened(browser, pair[0]) as ann, opened(browser, pair[1]) as bob:
        yield [ann, bob]


@dataclass
class Party:
    """Ann on the first server and Bob on the second, in a room of their own. Eve is no browser."""

    room: str
    ann: Window
    bob: Window
    eve: ClientConnection

    async def publish(self, topic: str, data: Any) -> None:
        """Have Eve publish whatever."""
        await self.eve.send(json.dumps({"type": "publish", "topic": topic, "data": data}))

    async def say(self, data: Any) -> None:
        """Have Eve publish to the room."""
        await self.publish(f"chat/{self.room}", data)

    async def announce(self, data: Any) -> None:
        """Have Eve publish where one says that one is here."""
        await self.publish(f"chat/{self.room}/here", data)


@pytest_asyncio.fixture(loop_scope="module")
async def party(windows: list[Window], pair: list[Server]) -> AsyncIterator[Party]:
    """Ann and Bob have seen each other. Whatever happens then, the consoles stay empty."""
    ann, bob = windows
    room = f"room {next(numbers)}"
    async with connect(pair[0].url("/ws"), proxy=None) as eve:
        await ann.join("Ann", room)
        await bob.join("Bob", room)
        await expect(ann.people).to_have_text(["Ann (you)", "Bob"])
        await expect(bob.people).to_have_text(["Ann", "Bob (you)"])
        yield Party(room, ann, bob, eve)
    assert ann.problems + bob.problems == []


async def test_two_windows_on_two_servers_talk(party: Party, pair: list[Server]) -> None:
    """Each window gets each message once, in order. It marks its own, and sees a change of name."""
    ann, bob = party.ann, party.bob
    for window, server in zip([ann, bob], pair, strict=True):
        await expect(window.state).to_contain_text(f"connected to process {server.process.pid} on ")
    await ann.say("Hello!")
    await expect(bob.said).to_have_text(["Hello!"])
    await bob.say("Hi.")
    await bob.say("How are you?")
    for window in (ann, bob):
        await expect(window.said).to_have_text(["Hello!", "Hi.", "How are you?"])
        await expect(window.authors).to_have_text(["Ann", "Bob", "Bob"])
    assert await ann.page.locator("#log .own .text").all_inner_texts() == ["Hello!"]
    await expect(ann.message).to_have_value("")
    await bob.join("Robert", party.room)
    await expect(ann.people).to_have_text(["Ann (you)", "Robert"])


async def test_a_message_stays_in_its_room(party: Party) -> None:
    """A user sees who is in which room, and goes there by a link."""
    ann, bob, room = party.ann, party.bob, party.room
    other = f"other {room}"
    await party.publish(f"chat/{other}/here", {"name": "Eve"})
    await expect(ann.rooms.filter(has_text=room)).to_have_text([f"{other} 1", f"{room} 2"])
    await expect(ann.people).to_have_text(["Ann (you)", "Bob"])
    await ann.say("in the room")
    await expect(bob.said).to_have_text(["in the room"])

    link = bob.page.get_by_role("link", name=other)
    await link.click()
    await expect(link).to_have_attribute("aria-current", "true")
    await expect(bob.page).to_have_title(f"Room {other}")
    await expect(bob.people).to_have_text(["Bob (you)", "Eve"])
    await expect(ann.people).to_have_text(["Ann (you)"])
    await ann.say("alone")
    await expect(ann.said).to_have_text(["in the room", "alone"])
    await party.publish(f"chat/{other}", {"name": "Eve", "text": "in the other"})
    await expect(bob.said).to_have_text(["in the other"])

    await bob.page.go_back()
    await expect(ann.people).to_have_text(["Ann (you)", "Bob"])
    await bob.say("back")
    await expect(ann.said).to_have_text(["in the room", "alone", "back"])
    await expect(bob.said).to_have_text(["back"])


async def test_back_and_forward_lead_through_the_rooms(browser: Browser, pair: list[Server]) -> None:
    """They add nothing to the browser's history."""
    async with opened(browser, pair[0]) as window:
        room = f"room {next(numbers)}"
        await window.join("Ann", room)
        await window.page.go_back()
        await expect(window.page).to_have_title("Room lobby")
        await window.page.go_forward()
        await expect(window.page).to_have_title(f"Room {room}")


async def test_a_phone_does_not_scroll_when_somebody_joins(
    browser: Browser, pair: list[Server], party: Party
) -> None:
    """The link that has the focus keeps it, even if it is out of view."""
    async with opened(browser, pair[0]) as window:
        await window.page.set_viewport_size({"width": 360, "height": 640})
        await window.join("Ann", party.room)
        link = window.rooms.get_by_role("link", name=party.room, exact=True)
        await link.focus()
        await window.page.evaluate("scrollTo(0, 0)")
        await party.publish(f"chat/another {party.room}/here", {"name": "Eve"})
        await expect(window.rooms.first).to_have_text(f"another {party.room} 1")
        await expect(link).to_be_focused()
        await expect(link).not_to_be_in_viewport()


async def test_a_user_who_leaves_is_gone_at_once(party: Party) -> None:
    """The user presses the button or follows a link, and comes back by a link to the room."""
    ann, bob = party.ann, party.bob
    await bob.press("Leave")
    await expect(bob.state).to_have_text("closed with 1000 (done)")
    await expect(bob.page.get_by_role("log")).to_be_hidden()
    await expect(ann.people).to_have_text(["Ann (you)"], timeout=AT_ONCE)
    await bob.press("Join")
    await expect(ann.people).to_have_text(["Ann (you)", "Bob"])
    address = bob.page.url
    await bob.page.goto("about:blank")
    await expect(ann.people).to_have_text(["Ann (you)"], timeout=AT_ONCE)
    await bob.page.goto(address)
    await bob.press("Join")
    await expect(ann.people).to_have_text(["Ann (you)", re.compile(r"guest \d{3}")])


async def test_markup_stays_text(party: Party) -> None:
    """The page shows markup as it is. Its policy forbids the browser to run any."""
    ann, page = party.ann, party.ann.page
    room = party.room = f"{party.room} {MARKUP.replace('/', '')}"[:40]
    await ann.join("<b>Ann</b>", room)
    await party.announce({"name": MARKUP})
    await party.say({"name": MARKUP, "text": MARKUP})
    await party.say({"html": MARKUP})
    await expect(ann.said).to_have_text([MARKUP, json.dumps({"html": MARKUP}, separators=(",", ":"))])
    await expect(ann.authors).to_have_text([MARKUP[:40], "?"])
    await expect(ann.people).to_have_text(["<b>Ann</b> (you)", MARKUP[:40]])
    await expect(ann.rooms.filter(has_text=room)).to_have_text([f"{room} 2"])
    assert await page.locator("img, #log script, ul b").count() == 0
    for attempt in (
        "document.body.innerHTML = '<img src=x onerror=window.ran=1>'",
        "document.body.setAttribute('onclick', 'window.ran = 1')",
        "document.createElement('script').text = 'window.ran = 1'",
    ):
        with pytest.raises(Error, match="This document requires 'Trusted"):
            await page.evaluate(f"() => {{ {attempt} }}")
    assert await page.evaluate("window.ran") is None
    assert len(ann.problems) == 3  # the console says so too
    ann.problems.clear()


async def test_any_json_is_shown(party: Party) -> None:
    """JSON that is not a message is shown as JSON. A bad sign of who is present is ignored."""
    ann, eve = party.ann, party.eve
    await party.announce({"name": "Eve", "joins": True})
    answers: dict[str, str] = {}  # to Eve, who is new, from those who are here
    while len(answers) < 2:
        async with asyncio.timeout(TIMEOUT):
            answer = json.loads(await eve.recv())
        if answer["type"] == "message":
            assert answer["data"]["room"] == party.room
            answers[answer["data"]["name"]] = answer["from"]
    for text in SHAPELESS:
        data = json.loads(text)
        await party.say(data)
        await party.announce(data)
        await party.publish("chat/a/b/c/here", data)
        await eve.send(json.dumps({"type": "send", "to": answers["Ann"], "data": data}))
    for where in (1, None, {}, {"toString": 1}, "a/b", "#", "", "x" * 41, "\0"):
        data = {"name": "Eve", "room": where}
        await eve.send(json.dumps({"type": "send", "to": answers["Ann"], "data": data}))
    await party.say({"name": "x" * 99, "text": "y" * 9999})
    await expect(ann.said).to_have_text([*SHAPELESS.values(), "y" * 2000])
    await expect(ann.authors.last).to_have_text("x" * 40)
    await expect(ann.people).to_have_text(["Ann (you)", "Bob", "Eve"])


async def test_the_page_keeps_the_newest_200_messages(party: Party) -> None:
    """The newest is in view, unless the user is reading earlier ones."""
    ann = party.ann
    for number in range(300):
        await party.say({"name": "Eve", "text": f"{number}\n"})
    await expect(ann.said.last).to_have_text("299")
    await expect(ann.said).to_have_count(200)
    await expect(ann.said.last).to_be_in_viewport()
    await ann.page.get_by_role("log").evaluate("(log) => log.scrollTop = 1000")
    for number in range(9):
        await party.say({"name": "Eve", "text": f"more {number}"})
    await expect(ann.said.last).to_have_text("more 8")
    await ann.page.evaluate("new Promise(requestAnimationFrame)")
    await expect(ann.said.last).not_to_be_in_viewport()


async def test_the_page_recovers_when_the_server_comes_back(
    party: Party, pair: list[Server], redis_url: str
) -> None:
    """It says why the connection closed, keeps the text in the editor, and is present only once."""
    ann, bob = party.ann, party.bob
    pair[1].interrupt()
    closed = re.compile(r"^closed with 1012 \(the server stops or restarts\); trying again")
    await expect(bob.state).to_have_text(closed)
    await bob.say("Hello?")
    await expect(bob.notices).to_have_text(["Not sent: there is no connection."])
    assert pair[1].ends_within(5) is not None
    pair[1].kill()
    pair[1] = Server(COMMAND, pair[1].port, {"REDIS_URL": redis_url})
    again = re.compile(rf"^connected to process {pair[1].process.pid} on \S+; it was closed with 1012")
    await expect(bob.state).to_have_text(again)
    await expect(bob.people).to_have_text(["Ann", "Bob (you)"])
    await expect(ann.people).to_have_text(["Ann (you)", "Bob"])  # not twice
    await bob.message.press("Enter")
    await expect(ann.said).to_have_text(["Hello?"])


async def test_the_page_shows_what_the_server_says(browser: Browser) -> None:
    """It shows dropped messages, errors and broadcasts. It forgets users that are silent."""
    page = await browser.new_page()
    window = Window(page)
    routes: list[WebSocketRoute] = []
    said: list[Any] = []

    def answer(route: WebSocketRoute) -> None:
        routes.append(route)
        route.on_message(lambda message: said.append(json.loads(message)))
        route.send('{"type": "welcome", "id": "1", "host": "h", "pid": 7}')

    await page.clock.install()
    await page.route_web_socket(re.compile("."), answer)
    await page.route("**/demo/?page", lambda route: route.fulfill(path=ROOT / "web" / "chat.html"))
    await page.goto("https://proxy.example/demo/?page")
    await expect(window.room).to_have_value("lobby")
    await window.press("Join")
    await expect(window.state).to_have_text("connected to process 7 on h")
    await until(lambda: len(said) >= 3, "two subscriptions and a word")
    assert [command["topic"] for command in said[:3]] == ["chat/lobby", "chat/+/here", "chat/lobby/here"]
    assert routes[0].url == "wss://proxy.example/demo/ws"  # behind a proxy, under https and a folder
    for message in (
        '{"type": "message", "topic": "chat/lobby/here", "data": {"name": "Ann"}, "from": "2"}',
        '{"type": "dropped", "count": 1200}',
        '{"type": "dropped", "count": null}',
        '{"type": "error", "reason": "too <b>fast</b>"}',
        '{"type": "message", "topic": null, "data": {"stops": "at 5"}, "from": null}',
        '{"type": "unheard of"}',
    ):
        routes[0].send(message)
    await expect(window.notices).to_have_text(
        [
            "This page was too slow: 1,200 messages were dropped.",
            "The server's processes lost touch: messages may be missing.",
            "The server: too <b>fast</b>",
            'To all: {"stops":"at 5"}',
        ]
    )
    await page.clock.run_for(10_000)
    await expect(window.people).to_have_text(["Ann"])
    assert [command["topic"] for command in said[3:]] == ["chat/lobby/here"] * 2
    await page.clock.run_for(4_000)
    await expect(window.people).to_have_count(0)
    said.clear()
    await window.room.fill("cats")
    await window.press("Change")
    await until(lambda: len(said) >= 3, "two commands and a word")
    assert [command["type"] for command in said] == ["unsubscribe", "subscribe", "publish"]
    assert [command["topic"] for command in said] == ["chat/lobby", "chat/cats", "chat/cats/here"]
    await routes[0].close(code=1008, reason="who are you?")
    await expect(window.state).to_contain_text(
        "closed with 1008 (against the rules): who are you?; trying again in"
    )
    await page.clock.run_for(1_000)
    await until(lambda: len(routes) == 2, "another connection")
    await page.close()
    assert window.problems == []


async def test_before_joining_the_page_says_what_to_do(browser: Browser, pair: list[Server]) -> None:
    """All is in the main landmark. One button stands out, before and after."""
    async with opened(browser, pair[0]) as window:
        main = window.page.get_by_role("main")
        for role in ("textbox", "button", "status"):
            assert await main.get_by_role(role).count() == await window.page.get_by_role(role).count() > 0
        what_to_do = main.get_by_role("region", name="You are in no room yet")
        primary = window.page.locator(".primary:visible")
        await expect(what_to_do).to_contain_text("Press Join.")
        await expect(primary).to_have_text(["Join"])
        assert await barriers(window.page) == []
        await window.press("Join")
        await expect(what_to_do).to_be_hidden()
        await expect(primary).to_have_text(["Send"])
        assert await barriers(window.page) == []
        await window.press("Leave")
        await expect(what_to_do).to_be_visible()


async def test_a_refused_name_has_a_hint(browser: Browser, pair: list[Server]) -> None:
    """The page says which names a room can have, and where the mistake is. It does not join."""
    async with opened(browser, pair[0]) as window:
        hint, name = window.page.get_by_role("alert"), window.page.get_by_label("Your name")
        for field, refused, why in (
            (window.room, "a/b", "It cannot contain +, # or /"),
            (window.room, "", "The name of a room has 1 to 40 characters."),
            (name, " ", "Type your name."),
        ):
            before = await field.input_value()
            await field.fill(refused)
            await window.press("Join")
            await expect(hint).to_contain_text(why)
            await expect(field).to_be_focused()
            await expect(field).to_have_attribute("aria-invalid", "true")
            await expect(window.state).to_have_text("not connected")
            await field.fill(before)
            await expect(hint).to_be_hidden()
            await expect(field).to_have_attribute("aria-invalid", "false")


@pytest.mark.parametrize(
    "viewport",
    [
        pytest.param({"width": 1280, "height": 800}, id="laptop"),
        pytest.param({"width": 390, "height": 844}, id="phone"),
        pytest.param({"width": 640, "height": 400}, id="laptop at 200% zoom"),
    ],
)
async def test_the_composer_stays_in_view(
    browser: Browser, pair: list[Server], viewport: ViewportSize
) -> None:
    """The newest message is above it, wherever the user scrolls."""
    async with opened(browser, pair[0]) as window:
        page = window.page
        await page.set_viewport_size(viewport)
        await window.join("Ann", f"room {next(numbers)}")
        for number in range(30):
            await window.say(str(number))
        await expect(window.said.last).to_have_text("29")
        await expect(window.said.last).to_be_in_viewport(ratio=1)
        # Nothing covers it: what is at its place is the message.
        assert await window.said.last.evaluate(
            """(text) => {
                const { left, top, height } = text.getBoundingClientRect();
                return text === document.elementFromPoint(left + 1, top + height / 2);
            }"""
        )
        for position in (0, 10_000):
            await page.evaluate(f"scrollTo(0, {position})")
            for element in (window.message, page.get_by_role("button", name="Send", exact=True)):
                await expect(element).to_be_in_viewport(ratio=1)


async def test_the_page_works_by_keyboard(party: Party) -> None:
    """Tab reaches every control. Each has a name, shows that it has the focus, and works by key."""
    ann, page = party.ann, party.ann.page
    await ann.room.fill("a/b")  # no name of a room
    await ann.room.press("Enter")
    await expect(ann.room).to_be_focused()
    await ann.room.fill(f"{party.room}!")
    await ann.room.press("Enter")
    await expect(ann.message).to_be_focused()
    await page.keyboard.type("by keyboard")
    await page.keyboard.press("Enter")
    await expect(ann.said).to_have_text(["by keyboard"])
    # The page forgets the rooms of other tests after 13 seconds. If it forgot one below, there would be fewer
    # controls.
    rooms = [f"{party.room}! 1", f"{party.room} 1"]
    await expect(ann.rooms).to_have_text(rooms, timeout=2 * TIMEOUT * 1000)
    for control in await page.locator(CONTROLS).all():
        await expect(control).to_have_accessible_name(re.compile(r"\w"))
    await page.get_by_label("Your name").focus()
    for place in range(await page.locator(CONTROLS).count()):
        await expect(page.locator(CONTROLS).nth(place)).to_be_focused()
        await expect(page.locator(":focus")).to_have_css("outline-style", "solid")
        await page.keyboard.press("Tab")
    focused = ann.rooms.get_by_role("link", name=party.room, exact=True)
    await focused.focus()
    await party.publish(f"chat/another {party.room}/here", {"name": "Eve"})
    await expect(ann.rooms.first).to_have_text(f"another {party.room} 1")
    await expect(focused).to_be_focused()


async def test_the_page_fits_a_phone_and_is_readable(party: Party) -> None:
    """Nothing is wider than a phone. All text has a contrast of 4.5 to 1 (WCAG)."""
    ann, page = party.ann, party.ann.page
    before = page.viewport_size
    assert before
    await page.set_viewport_size(PHONE)
    party.room = "w" * 40
    await ann.join("w" * 40, party.room)
    await party.announce({"name": "w" * 99})
    await party.say({"name": "w" * 99, "text": "w" * 999})
    await party.say(["w" * 999])
    await ann.say("mine")
    await ann.page.evaluate("notice('a notice')")
    await expect(ann.said).to_have_count(3)
    assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        faint, background = await page.evaluate(CONTRAST)
        assert faint == []
        assert (background > 0.5) == (scheme == "light")
    await page.set_viewport_size(before)


async def test_the_page_is_one_short_file() -> None:
    """It has fewer than 320 lines, and loads nothing from elsewhere."""
    page = (ROOT / "web" / "chat.html").read_text()
    assert len(page.splitlines()) < 320
    assert not re.findall(r"https?://|innerHTML|@import", page)
