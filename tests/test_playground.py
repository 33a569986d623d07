"""The playground in a real browser, used as a person would: its buttons, its keyboard, its looks."""

import itertools
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    Error,
    Page,
    WebSocketRoute,
    async_playwright,
    expect,
)

from tests.kit.browser import CONTRAST, FLAGS, barriers
from tests.kit.clients import consumer, drain, numbered, produce, receive, vanish
from tests.kit.commands import CONSUMER, SERVERS, uvicorn_command
from tests.kit.needs import CHROMIUM, needs_browser
from tests.kit.playground import LAPTOP, TALL_PHONE, ZOOMED, Playground, opened
from tests.kit.root import ROOT
from tests.kit.servers import Server, running
from tests.kit.waiting import SLOWNESS, TIMEOUT, until

PHONE = {"width": 360, "height": 740}
SHOWN = 4  # payloads that a lane shows, and may leave unacknowledged
CONTROLS = "button:visible, textarea:visible, select:visible, input:visible, a:visible"
# Each kind of bad input has a button. What comes back: the code, and what the reason says.
BAD = {
    "Not JSON": (1007, "not JSON: "),
    "Cut short": (1007, "not JSON: "),
    "Two values": (1007, "not JSON: "),
    "NaN": (1007, "not JSON: "),
    "Empty": (1007, "not JSON: "),
    "Too deep": (1007, "not JSON: "),
    "Binary": (1003, "a binary frame"),
    "Too large": (1009, "at most 1048576 bytes"),
}


pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    needs_browser,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    assert CHROMIUM, "no browser: CI has to install one"
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Server]:
    with running(SERVERS["server.py"]) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def playground(browser: Browser, site: Server) -> AsyncIterator[Playground]:
    async with opened(browser, site) as playground:
        yield playground
    await drain(site)


@pytest.mark.parametrize("name", ["server.py", "multiproc_server.py"])
async def test_a_payload_is_sent_waits_and_arrives(browser: Browser, name: str) -> None:
    """A payload waits in the queue, and arrives in the next lane, as it was typed."""
    with running(SERVERS[name]) as server:
        async with opened(browser, server) as playground:
            await playground.send('{"a":  1.50}')
            await expect(playground.page.locator("#receipts")).to_have_text("1")
            await expect(playground.page.locator("#depth")).to_have_text("1")
            await playground.add()
            await expect(playground.lanes.locator("li").first).to_have_text(
                '{"a":  1.50}', use_inner_text=False
            )
            await expect(playground.lanes.locator(".count")).to_have_text("1")
            await expect(playground.page.locator("#depth")).to_have_text("0")
            await expect(playground.lanes.locator(".acks").first).to_be_visible(visible=server.acks)
            assert playground.received == ['{"a":  1.50}']
            assert "script-src-attr 'none'; require-trusted-types-for 'script'" in playground.policy


async def test_the_editor_checks_while_the_user_types(playground: Playground) -> None:
    """It says what is wrong. If such a payload is sent, it is refused, and not sent again."""
    page = playground.page
    editor = page.get_by_label("Payload, a JSON value")
    await editor.fill('{"a": 1')
    await expect(page.locator("#verdict")).to_contain_text("Not JSON: ")
    await expect(editor).to_have_attribute("aria-invalid", "true")
    await editor.press_sequentially("}")
    await expect(page.locator("#verdict")).to_have_text("JSON, 8 bytes")
    await expect(editor).to_have_attribute("aria-invalid", "false")
    await playground.send("[NaN]")
    await expect(playground.producer.locator(".state")).to_contain_text(
        "closed with 1007 (not a payload): not JSON: "
    )
    await expect(playground.producer.locator(".state")).to_contain_text(". Not sent again: [NaN]")
    await playground.send("[1]")
    await playground.add()
    await expect(playground.lanes.locator("li").first).to_have_text("[1]")
    assert list(itertools.chain(*playground.sent)) == ["[NaN]", "[1]"]
    assert playground.received == ["[1]"]


async def test_ten_lanes_share_a_stream(playground: Playground) -> None:
    """Each gets some of 200 payloads a second, none is lost, and the page stays smooth."""
    page = playground.page
    await playground.add(10)
    await page.get_by_label("Steady stream").fill("100")
    await expect(page.locator("#rate-text")).to_have_text("200 a second")
    await playground.press("Start the stream")
    await until(lambda: len(playground.received) > 100, "the stream")
    elements = await page.locator("*").count()
    frames, longest = await page.evaluate(
        """() => new Promise((resolve) => {
            const start = performance.now();
            let frames = 0, longest = 0;
            new PerformanceObserver((list) => {
                for (const { duration } of list.getEntries()) longest = Math.max(longest, duration);
            }).observe({ type: "longtask" });
            const count = (now) => {
                frames++;
                now - start < 2000 ? requestAnimationFrame(count) : resolve([frames, longest]);
            };
            requestAnimationFrame(count);
        })"""
    )
    assert await page.locator("*").count() == elements, "the lists grow"
    assert await page.evaluate("lanes.map((lane) => lane.recent.length)") == [SHOWN] * 10
    assert await playground.number("#sent") > 300 / SLOWNESS
    count = await playground.stop()
    await until(lambda: len(playground.received) >= count, "all payloads")
    assert sorted(json.loads(payload)["value"] for payload in playground.received) == list(
        range(1, count + 1)
    )
    counts = [int(text) for text in await playground.lanes.locator(".count").all_inner_texts()]
    assert sum(counts) == count
    assert min(counts) > count / 20
    assert frames > 30 / SLOWNESS, "15 a second would do"
    assert longest < 250 * SLOWNESS, "ms in which the page did not react"


async def test_killed_lanes_lose_nothing(playground: Playground, browser: Browser) -> None:
    """One lane is disconnected, and the tab of one is closed. The third gets all payloads."""
    await playground.add(2)
    async with opened(browser, playground.server) as other:
        await other.add()
    lane = playground.lanes.first
    await playground.press("Disconnect", lane)
    await expect(lane.locator(".state")).to_have_text("closed with 1000 (done)")
    payloads = [str(n) for n in range(6)]
    for payload in payloads:
        await playground.send(payload)
    await expect(playground.lanes.last.locator(".count")).to_have_text("6")
    assert playground.received == payloads
    assert await playground.lanes.last.locator("li").all_inner_texts() == payloads[: -SHOWN - 1 : -1]
    await playground.press("Remove", playground.lanes.last)
    await expect(playground.lanes).to_have_count(1)
    await playground.send("6")
    await expect(playground.page.locator("#depth")).to_have_text("1")
    await playground.press("Connect", lane)
    await expect(lane.locator("li").first).to_have_text("6")


async def test_bad_input_is_answered(playground: Playground) -> None:
    """Each kind has a button, and shows code and reason. Other connections go on."""
    await playground.add()
    group = playground.page.get_by_role("group", name="Bad input")
    assert await group.get_by_role("button").all_inner_texts() == list(BAD)
    for name, (code, reason) in BAD.items():
        await playground.press(name, group)
        answer = re.compile(rf"^{name}: closed with {code} \(.+\): .*{reason}")
        await expect(playground.page.locator("#answer")).to_have_text(answer)
    await expect(playground.producer.locator(".state")).to_have_text("connected")
    await playground.send("1")
    await expect(playground.lanes.locator("li").first).to_have_text("1")


async def test_markup_stays_text(playground: Playground) -> None:
    """The page shows markup as it is. Its policy forbids the browser to run any."""
    page = playground.page
    payload = '"<img src=x onerror=window.ran=1><script>ran=1</script>"'
    await playground.add()
    await playground.send(payload)
    await expect(playground.lanes.locator("li").first).to_have_text(payload)
    await playground.send(payload[1:])
    await expect(playground.producer.locator(".state")).to_contain_text("Not sent again: <img src=x onerror=")
    assert await page.locator("img").count() == 0
    for attempt in (
        "document.body.innerHTML = '<img src=x onerror=window.ran=1>'",
        "document.body.setAttribute('onclick', 'window.ran = 1')",
        "document.createElement('script').text = 'window.ran = 1'",
    ):
        with pytest.raises(Error, match="This document requires 'Trusted"):
            await page.evaluate(f"() => {{ {attempt} }}")
    assert await page.evaluate("window.ran") is None
    assert len(playground.problems) == 3  # the console says so too
    playground.problems.clear()


async def test_the_page_recovers_when_the_server_comes_back(browser: Browser) -> None:
    """On a restart lanes and producer say why they closed, and connect again; the stream goes on.

    The producer sends all the time, and so it may see 1006: see README.md, "1006 instead of 1012".
    """
    stops = r"1012 \(the server stops or restarts\)"
    stops_or_breaks_off = rf"({stops}|1006 \(no connection, or it broke off without a word\))"
    with running(SERVERS["server.py"]) as server:
        async with opened(browser, server) as playground:
            await playground.add(2)
            states = [(playground.producer.locator(".state"), stops_or_breaks_off)]
            states += [(lane.locator(".state"), stops) for lane in await playground.lanes.all()]
            await playground.press("Start the stream")
            await until(lambda: len(playground.received) > 3, "the stream")
            server.interrupt()
            for state, why in states:
                await expect(state).to_have_text(re.compile(rf"^closed with {why}; trying again"))
            await expect(playground.page.locator("#queue-text")).to_have_text("The server does not answer.")
            before = len(playground.received)
            assert server.ends_within(2) is not None
            with running(SERVERS["server.py"], server.port):
                for state, why in states:
                    await expect(state).to_have_text(
                        re.compile(rf"^connected again; it was closed with {why}")
                    )
                await until(lambda: len(playground.received) > before + 3, "the stream to go on")
                await playground.stop()
                assert len(playground.received) == len(set(playground.received))


async def test_a_payload_without_a_receipt_is_sent_again(playground: Playground) -> None:
    """The queue is full, and the producer is told. In the end, all arrives once, in order."""
    page, server = playground.page, playground.server
    early = [f'{{"early": {n}}}' for n in range(server.capacity - 20)]
    await produce(server, early)
    await page.get_by_label("Steady stream").fill("100")
    await playground.press("Start the stream")
    await expect(page.locator("#queue-text")).to_contain_text("Full")
    await expect(playground.producer.locator(".state")).to_contain_text(
        "closed with 1013 (try again later): the queue is full: try again later"
    )
    await playground.add()
    count = await playground.stop()
    await until(lambda: len(playground.received) >= len(early) + count, "all payloads")
    assert playground.received == early + [f'{{"value": {n}}}' for n in range(1, count + 1)]
    assert len(playground.sent) > 1
    for connection, receipts in enumerate(playground.receipts[:-1]):
        unreceipted = playground.sent[connection][len(receipts) :]
        again = playground.sent[connection + 1][: len(unreceipted)]
        assert again == unreceipted[: len(again)]


async def test_a_lane_acknowledges_by_itself_by_hand_or_not_at_all(browser: Browser, site: Server) -> None:
    """The server takes acknowledgements."""
    routes: list[WebSocketRoute] = []
    said: list[str | bytes] = []
    page = await browser.new_page()

    def consumer(route: WebSocketRoute) -> None:
        routes.append(route)
        route.on_message(lambda message: said.append(message))

    await page.route("**/stats", lambda route: route.fulfill(json={"queued": 0, "capacity": 9, "acks": True}))
    await page.route_web_socket(re.compile(f"{CONSUMER}\\?prefetch={SHOWN}$"), consumer)
    await page.goto(site.url("/", "http"))
    playground = Playground(page, site)
    await playground.add()
    unacknowledged = page.locator(".lane .unacknowledged-count")
    choice = page.get_by_label("Acknowledge")
    routes[0].send("1")
    await until(lambda: said == ["ack"], "an acknowledgement")
    await expect(unacknowledged).to_have_text("0")

    await choice.select_option("by hand")
    for payload in "234":
        routes[0].send(payload)
    await expect(unacknowledged).to_have_text("3")
    assert await page.locator(".lane .unacknowledged").all_inner_texts() == ["4", "3", "2"]
    await playground.press("Ack the oldest")
    await expect(unacknowledged).to_have_text("2")
    assert await page.locator(".lane .unacknowledged").all_inner_texts() == ["4", "3"]

    await choice.select_option("not at all")
    await expect(page.get_by_role("button", name="Ack the oldest")).to_be_hidden()
    routes[0].send("5")
    await expect(unacknowledged).to_have_text("3")
    assert said == ["ack"] * 2

    await choice.select_option("by itself")
    await expect(unacknowledged).to_have_text("0")
    assert said == ["ack"] * 5

    await choice.select_option("not at all")
    routes[0].send("6")
    await expect(unacknowledged).to_have_text("1")
    await routes[0].close(code=1012)
    await expect(page.locator(".lane .state")).to_contain_text(
        "closed with 1012 (the server stops or restarts). "
        "1 unacknowledged went back to the queue; trying again"
    )
    await until(lambda: len(routes) == 2, "another connection")
    await page.close()


@pytest.mark.parametrize("name", ["redis_server.py"])
async def test_unacknowledged_payloads_of_a_lane_go_to_another(browser: Browser, name: str) -> None:
    """A lane that is disconnected takes nothing with it."""
    payloads = [str(number) for number in range(6)]
    with running(SERVERS[name]) as server:
        async with opened(browser, server) as playground:
            page, lane, other = playground.page, playground.lanes.first, playground.lanes.last
            unacknowledged, choice = lane.locator(".unacknowledged-count"), lane.get_by_label("Acknowledge")
            await playground.add()
            await expect(page.locator("#acks-text")).to_contain_text("comes back")
            await choice.select_option("not at all")
            for payload in payloads:
                await playground.send(payload)
            await expect(unacknowledged).to_have_text("4")
            await expect(page.locator("#depth")).to_have_text("2")
            assert await lane.locator(".unacknowledged").all_inner_texts() == payloads[3::-1]

            await choice.select_option("by hand")
            await playground.press("Ack the oldest", lane)
            await expect(lane.locator(".count")).to_have_text("5")
            await expect(unacknowledged).to_have_text("4")
            assert await lane.locator(".unacknowledged").all_inner_texts() == payloads[4:0:-1]

            await playground.add()
            await expect(other.locator("li").first).to_have_text("5")
            await expect(page.locator("#depth")).to_have_text("0")
            await playground.press("Disconnect", lane)
            await expect(lane.locator(".state")).to_have_text(
                "closed with 1000 (done). 4 unacknowledged went back to the queue"
            )
            await expect(unacknowledged).to_have_text("0")
            await expect(other.locator(".count")).to_have_text("5")
            await expect(other.locator(".unacknowledged-count")).to_have_text("0")
            assert await other.locator("li").all_inner_texts() == payloads[4:0:-1]
            assert playground.received == [*payloads, *payloads[1:5]]
            assert await drain(server) == []


async def test_addresses_come_from_the_page(browser: Browser) -> None:
    """Behind a proxy, with https and a folder, the page looks for the websockets beside itself."""
    page = await browser.new_page()
    routes: list[str] = []
    await page.route_web_socket(re.compile("."), lambda route: routes.append(route.url))
    await page.route(
        "**/demo/stats", lambda route: route.fulfill(json={"queued": 0, "capacity": 9, "acks": False})
    )
    await page.route("**/demo/?page", lambda route: route.fulfill(path=ROOT / "web" / "index.html"))
    await page.goto("https://proxy.example/demo/?page")
    await page.get_by_role("button", name="Add a consumer").click()
    await until(lambda: len(routes) == 2, "two websockets")
    await page.close()
    assert routes == ["wss://proxy.example/demo/ws/producer", "wss://proxy.example/demo/ws/consumer"]


async def test_the_page_works_by_keyboard(playground: Playground) -> None:
    """Tab reaches every control. Each has a name, shows that it has the focus, and works by key."""
    page = playground.page
    await page.get_by_label("Payload, a JSON value").press("Control+Enter")
    await expect(page.locator("#receipts")).to_have_text("1")
    await page.get_by_role("button", name="Add a consumer").press("Enter")
    await expect(playground.lanes.locator(".count")).to_have_text("1")
    slider = page.get_by_label("Steady stream")
    for key, rate in [("Home", "0.5 a second"), ("End", "200 a second")]:
        await slider.press(key)
        await expect(slider).to_have_attribute("aria-valuetext", rate)
    for control in await page.locator(CONTROLS).all():
        await expect(control).to_have_accessible_name(re.compile(r"\w"))
    await page.get_by_label("Payload, a JSON value").focus()
    reached = []
    for _ in range(await page.locator(CONTROLS).count()):
        place, outline = await page.evaluate(
            """(controls) => {
                const focused = document.activeElement, all = [...document.querySelectorAll(controls)];
                const visible = all.filter((control) => control.checkVisibility());
                return [visible.indexOf(focused), getComputedStyle(focused).outlineStyle];
            }""",
            CONTROLS.replace(":visible", ""),
        )
        reached.append((place, outline))
        await page.keyboard.press("Tab")
    assert reached == [(place, "solid") for place in range(len(reached))]


async def test_the_page_fits_a_phone(browser: Browser, site: Server) -> None:
    """Nothing is wider than the screen, whatever a payload contains."""
    async with opened(browser, site, viewport=PHONE, has_touch=True) as playground:
        await playground.add(2)
        await playground.send(json.dumps(["wide" * 99]))
        await playground.send(json.dumps("w" * 999)[1:])
        await expect(playground.producer.locator(".state")).to_contain_text("1007")
        await expect(playground.page.locator(".count").first).to_have_text("1")
        width = await playground.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
        assert await barriers(playground.page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_is_readable(browser: Browser, site: Server, scheme: str) -> None:
    """In both themes, all text has a contrast of 4.5 to 1 (WCAG)."""
    async with opened(browser, site, color_scheme=scheme) as playground:
        await playground.add()
        await playground.page.get_by_label("Payload, a JSON value").fill("[")
        faint, background = await playground.page.evaluate(CONTRAST)
        assert faint == []
        assert (background > 0.5) == (scheme == "light")
        assert await barriers(playground.page) == []


async def test_the_page_is_one_short_file() -> None:
    """It has at most 435 lines, and loads nothing from elsewhere."""
    page = (ROOT / "web" / "index.html").read_text()
    assert len(page.splitlines()) <= 435
    assert not re.findall(r"https?://|innerHTML|@import", page)


async def test_dead_letters_can_be_seen_and_retried(browser: Browser) -> None:
    """The page shows a payload that crashed five consumers as text. A button puts it back."""
    with running(SERVERS["ack_server.py"]) as server:
        poison = json.dumps("<b>poison</b>")
        await produce(server, [poison])
        async with opened(browser, server) as playground:
            page = playground.page
            await expect(page.locator("#dead")).to_be_hidden()
            # If the page does not get them, it asks again.
            await page.route("**/dead", lambda route: route.abort("connectionrefused"), times=1)
            for _ in range(5):
                async with consumer(server) as taker:
                    assert await receive(taker.websocket) == poison
                    await vanish(taker.websocket)
                await until(lambda: server.queued() + server.stats()["dead"] == 1, "it to come back")
            await expect(page.locator("#dead-count")).to_have_text("1")
            await expect(page.locator("#letters")).to_have_text(poison)
            assert await barriers(page) == []
            await page.get_by_role("button", name="Put them back into the queue").click()
            await expect(page.locator("#dead")).to_be_hidden()
            await expect(page.locator("#depth")).to_have_text("1")


async def test_a_lane_leaves_a_server_that_does_not_answer(browser: Browser) -> None:
    """The page says so, and counts no acknowledgement that the server will never get."""
    with running(SERVERS["ack_server.py"]) as server:
        async with opened(browser, server) as playground:
            await playground.add()
            await playground.page.get_by_label("Acknowledge").select_option("by hand")
            await produce(server, numbered(3))
            await expect(playground.page.locator(".unacknowledged-count")).to_have_text("3")
            server.process.send_signal(signal.SIGSTOP)
            try:
                await playground.press("Disconnect")
                await expect(playground.lanes.locator(".state")).to_have_text("disconnecting")
                await playground.press("Ack the oldest")
                await expect(playground.page.locator(".unacknowledged-count")).to_have_text("3")
            finally:
                server.process.send_signal(signal.SIGCONT)
            await expect(playground.lanes.locator(".state")).to_contain_text("3 unacknowledged went back")


async def test_producer_and_queue_stay_in_view_beside_ten_lanes(browser: Browser, site: Server) -> None:
    """On a laptop, three lanes are in a row. The user sees the queue fill, wherever they scroll."""
    async with opened(browser, site, **LAPTOP) as playground:
        page = playground.page
        await playground.add(10)
        tops = await page.evaluate("lanes.map((lane) => lane.element.getBoundingClientRect().top)")
        assert [tops.count(top) for top in sorted(set(tops))] == [3, 3, 3, 1]
        for position in (0, 10_000):
            await page.evaluate(f"scrollTo(0, {position})")
            for selector in ("#send", "#receipts", "#stream", "#depth", "#bar", "#queue-text"):
                await expect(page.locator(selector)).to_be_in_viewport(ratio=1)
        await expect(page.get_by_role("group", name="Bad input")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("screen", [TALL_PHONE, ZOOMED], ids=["phone", "zoom 200%"])
async def test_the_queue_is_in_view_after_pressing_send(
    browser: Browser, site: Server, screen: dict[str, object]
) -> None:
    """On a phone and at 200% zoom. The answers to bad input are in view, too."""
    async with opened(browser, site, **screen) as playground:
        page = playground.page
        send, depth, answer = page.locator("#send"), page.locator("#depth"), page.locator("#answer")
        await send.click()
        await expect(depth).to_have_text("1")
        for element in (send, depth, page.locator("#bar"), page.locator("#queue-text")):
            await expect(element).to_be_in_viewport(ratio=1)
        await playground.add(2)
        await expect(depth).to_be_in_viewport(ratio=1)
        # The answer is below the buttons. At first, they end where the screen ends.
        group = page.get_by_role("group", name="Bad input")
        await group.evaluate("(group) => scrollBy(0, group.getBoundingClientRect().bottom - innerHeight)")
        await group.get_by_role("button").last.evaluate("(button) => button.click()")
        await expect(answer).to_contain_text("1009")
        for element in (answer, depth):
            await expect(element).to_be_in_viewport(ratio=1)


async def test_the_numbers_add_up(playground: Playground) -> None:
    """A sent payload has a receipt, was refused, or has no answer. Lanes' counts can be reset."""
    page = playground.page
    await playground.add()
    for payload in ("1", "nonsense", "2"):
        await playground.send(payload)
    await expect(page.locator("#receipts")).to_have_text("2")
    await expect(page.locator("#refused")).to_have_text("1")
    await expect(page.locator("#waiting")).to_have_text("0")
    await expect(page.locator("#sent")).to_have_text("3")
    await expect(playground.lanes.locator(".count")).to_have_text("2")
    await playground.press("Reset counts")
    await expect(playground.lanes.locator(".count")).to_have_text("0")
    await playground.send("3")
    await expect(playground.lanes.locator(".count")).to_have_text("1")


async def test_rates_are_0_without_a_connection(browser: Browser) -> None:
    """A lane's rate is 0 as soon as it is disconnected, and all are as soon as the server ends."""
    with running(SERVERS["server.py"]) as server:
        async with opened(browser, server) as playground:
            page, lane = playground.page, playground.lanes.first
            rate, total = lane.locator(".rate"), page.locator("#total")
            await playground.add(2)
            await playground.press("Start the stream")
            for other in await playground.lanes.all():
                await expect(other.locator(".rate")).not_to_have_text("0")
            await playground.press("Disconnect", lane)
            await expect(lane.locator(".state")).to_have_text("closed with 1000 (done)")
            await page.evaluate("new Promise(requestAnimationFrame)")
            assert await rate.inner_text() == "0"
            await expect(page.locator("#pace")).to_contain_text("a second now")
            # In the page, because by the time that the test has looked, seconds may have passed.
            looking = page.evaluate(
                """() => new Promise((resolve) => {
                    const look = () => lanes[1].connection.isOpen || producer.connection.isOpen
                        ? requestAnimationFrame(look)
                        : requestAnimationFrame(() => resolve([find("#total"), find("#pace")].map(
                            (element) => element.textContent)));
                    look();
                })"""
            )
            server.interrupt()
            assert await looking == [
                "0 connected from this page, 0 payloads a second",
                "waits for a connection",
            ]
            await expect(total).to_be_visible()


async def test_unknown_numbers_are_shown_as_unknown(browser: Browser) -> None:
    """Before the login, or if the server cannot count, the page says why it has no numbers."""

    async def shows_nothing(page: Page, why: str) -> None:
        await expect(page.locator("#queue-text")).to_have_text(why)
        await expect(page.locator("#depth")).to_have_text("\N{EN DASH}")
        await expect(page.locator("#capacity")).to_have_text("unknown")
        await expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", "unknown")
        await expect(page.get_by_role("meter")).to_have_attribute("aria-valuenow", "0")
        await expect(page.locator("#acks-text")).to_be_empty()

    with running(SERVERS["server.py"]) as server:
        async with opened(browser, server) as playground:
            page = playground.page
            await playground.send("1")
            await expect(page.locator("#capacity")).to_have_text("of 1,000 payloads")
            await expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", "1 of 1,000 payloads")
            server.kill()
            await shows_nothing(page, "The server does not answer.")
        with running(SERVERS["server.py"], server.port) as server:
            page = await browser.new_page()
            await page.route("**/stats", lambda route: route.fulfill(status=401, json={"detail": "who?"}))
            await page.goto(server.url("/", "http"))
            await expect(page.locator("#producer .state")).to_have_text("log in first")
            await shows_nothing(page, "Log in first.")
            # As redis_server.py answers without Redis.
            why = "Redis does not answer: try again later"
            await page.route("**/stats", lambda route: route.fulfill(status=503, json={"detail": why}))
            await page.reload()
            await shows_nothing(page, why)
            await expect(page.locator("#producer .state")).to_contain_text(why)
            await page.close()


# The buttons that stand out.
PRIMARY = """() => [...document.querySelectorAll("button")].filter((button) => button.checkVisibility()
    && getComputedStyle(button).backgroundColor !== getComputedStyle(find("#add")).backgroundColor)
    .map((button) => button.textContent)"""


async def test_one_button_stands_out(playground: Playground) -> None:
    """The user presses it first: Send or, if the server wants a password, Log in."""
    page = playground.page
    assert await page.evaluate(PRIMARY) == ["Send"]
    await playground.add()
    assert await page.evaluate(PRIMARY) == ["Send"]
    # In one step, for the page hides the form again with its next look at /stats.
    with_login = f"() => {{ find('#login').hidden = false; return ({PRIMARY})(); }}"
    assert await page.evaluate(with_login) == ["Log in"]
    assert await barriers(page) == []


async def test_without_consumers_the_page_says_what_to_do(playground: Playground) -> None:
    """It explains what this server promises to consumers. Bad input comes last."""
    page = playground.page
    empty = page.get_by_text("No consumer yet. Press Add a consumer: it takes what waits in the queue.")
    await expect(empty).to_be_visible()
    await expect(page.locator("#acks-text")).to_have_text(
        "A consumer confirms no payload (no acknowledgements). If it leaves, payloads on their way are lost."
    )
    await playground.add()
    await expect(empty).to_be_hidden()
    await playground.press("Remove")
    await expect(empty).to_be_visible()
    assert await page.get_by_role("heading", level=2).all_inner_texts() == [
        "Producer",
        "Queue",
        "Consumers",
        "Bad input",
    ]


# The steps, which steps/with_page.py serves with the page


@pytest.mark.parametrize(("step", "lost"), [("step0", 1), ("step1", 0), ("step7", 0)])
async def test_a_class_sees_a_departed_consumer_swallow_a_payload(
    browser: Browser, step: str, lost: int
) -> None:
    """steps/README.md says what to press. The page shows what was sent, what waits, and what arrives."""
    with running(uvicorn_command(f"steps.with_page:{step}")) as server:
        async with opened(browser, server) as playground:
            await playground.add()
            await playground.press("Disconnect", playground.lanes)
            await expect(playground.lanes.locator(".state")).to_have_text("closed with 1000 (done)")
            for payload in ("1", "2", "3"):
                await playground.send(payload)
            await expect(playground.page.locator("#receipts")).to_have_text("3")
            await expect(playground.page.locator("#depth")).to_have_text(str(3 - lost))
            await playground.add()
            await expect(playground.lanes.last.locator(".count")).to_have_text(str(3 - lost))
            assert playground.received == ["1", "2", "3"][lost:]


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        pytest.param("step0", r"1006 \(no connection, .*\)$", id="step0 breaks off"),
        pytest.param("step3", r"1000 \(done\): it got a receipt$", id="step3 queues it"),
        pytest.param("step4", r"1007 \(not a payload\): not JSON: ", id="step4 says what is wrong"),
    ],
)
async def test_a_class_sees_how_a_step_answers_bad_input(browser: Browser, step: str, answer: str) -> None:
    """In the page, and in the terminal: step 0 logs a traceback."""
    with running(uvicorn_command(f"steps.with_page:{step}")) as server:
        async with opened(browser, server) as playground:
            await playground.press("Not JSON")
            closed = re.compile(f"^Not JSON: closed with {answer}")
            await expect(playground.page.locator("#answer")).to_have_text(closed)
            assert ("Traceback" in server.log) == (step == "step0")


async def test_nonsense_is_sent_to_a_naive_server_once(browser: Browser) -> None:
    """Step 0 breaks off without a close code. The page knows what was wrong, and goes on."""
    with running(uvicorn_command("steps.with_page:step0")) as server:
        async with opened(browser, server) as playground:
            await playground.page.locator("#payload").fill("nonsense")
            await playground.press("Send all the same")
            await expect(playground.producer.locator(".state")).to_contain_text("Not sent again: nonsense")
            await playground.send("1")
            await expect(playground.page.locator("#receipts")).to_have_text("1")
            assert server.log.count("raise JSONDecodeError") == 1


@pytest.mark.parametrize(
    ("step", "depth", "limit", "text", "state"),
    [
        pytest.param(
            "step4", "1,001", "payloads, no limit", "Payloads wait", "connected", id="step4 has none"
        ),
        pytest.param("step5", "1,000", "of 1,000 payloads", "Full: ", "closed with 1013", id="step5 has one"),
    ],
)
async def test_a_class_sees_whether_the_queue_has_a_limit(
    browser: Browser, step: str, depth: str, limit: str, text: str, state: str
) -> None:
    """One payload more than 1,000 makes the difference."""
    with running(uvicorn_command(f"steps.with_page:{step}")) as server:
        async with opened(browser, server) as playground:
            await produce(server, ["1"] * 1000)
            await playground.send("1")
            await expect(playground.producer.locator(".state")).to_contain_text(state)
            await expect(playground.page.locator("#depth")).to_have_text(depth)
            await expect(playground.page.locator("#capacity")).to_have_text(limit)
            await expect(playground.page.locator("#queue-text")).to_contain_text(text)
            await expect(playground.page.get_by_role("meter")).to_have_attribute("aria-valuenow", "1000")


@pytest.mark.parametrize("step", range(8))
async def test_every_step_can_serve_the_page(step: int) -> None:
    """It also says how many payloads are queued."""
    with running(uvicorn_command(f"steps.with_page:step{step}")) as server:
        status, _, body = server.get("/")
        assert (status, body) == (200, (ROOT / "web" / "index.html").read_text())
        await produce(server, ["1", "2"])
        assert server.stats()["queued"] == 2
