"""web/log.html in a real browser: a job goes on while the tab is closed, and its words are there later."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Self

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, Route, async_playwright, expect

from tests.kit.browser import CONTRAST, FLAGS
from tests.kit.commands import uvicorn_command
from tests.kit.needs import CHROMIUM, needs_browser
from tests.kit.servers import Server, running, tracebacks
from tests.kit.waiting import TIMEOUT, until

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    needs_browser,
]
QUESTION = " ".join(f"word{number}" for number in range(30))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(uvicorn_command("lessons.log_server:app")) as server:
        yield server
        assert tracebacks(server.log) == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    assert CHROMIUM, "no browser: CI has to install one"
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    context = await browser.new_context(viewport={"width": 360, "height": 740})
    yield context
    await context.close()


async def opened(context: BrowserContext, server: Server) -> tuple[Page, list[str]]:
    """Open the page. Returns what its console says, too."""
    page = await context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    response = await page.goto(server.url("/", "http"))
    assert response
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    return page, problems


async def start(page: Page, question: str) -> None:
    await page.get_by_label("Your question").fill(question)
    await page.get_by_role("button", name="Start a job").click()


async def has_words(page: Page, count: int) -> None:
    """Wait until so many words have come over the websocket."""
    await expect(page.locator("#websocket > *").nth(count - 1)).to_be_attached()


class Proxy:
    """Forwards connections to a server. While it is broken, it answers 502."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.broken = False
        self.refused = ""  # the requests
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self.listener = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.break_down()
        self.listener.close()

    def break_down(self) -> None:
        """Break all connections, and accept no more."""
        self.broken = True
        for writer in self.writers:
            writer.transport.abort()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if self.broken:
            with suppress(OSError):
                self.refused += (await reader.read(65536)).decode()
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            writer.close()
            return
        answers, requests = await asyncio.open_connection("127.0.0.1", self.server.port)
        self.writers.append(requests)
        await asyncio.gather(forward(reader, requests), forward(answers, writer))


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_a_job_goes_on_while_the_tab_is_closed(context: BrowserContext, server: Server) -> None:
    """The next tab shows the whole answer, over both transports, and marks what is new."""
    page, problems = await opened(context, server)
    await start(page, QUESTION)
    await expect(page.locator("#websocket")).to_contain_text("word1")
    await expect(page.locator("#source")).to_contain_text("word1")
    await page.close()
    page, more = await opened(context, server)
    for pane in ("#websocket", "#source"):
        await expect(page.locator(f"{pane}-state")).to_have_text("The job has ended: done")
        assert (await page.locator(pane).inner_text()).split() == ["You", "asked:", *QUESTION.split()]
        await expect(page.locator(f"{pane} mark").last).to_have_text("word29")
        await expect(page.locator(f"{pane} span").first).to_have_text("You")
    assert problems + more == []


async def test_a_job_can_be_stopped(context: BrowserContext, server: Server) -> None:
    page, problems = await opened(context, server)
    await start(page, "<b>word</b> " * 1000)
    await expect(page.locator("#source")).to_contain_text("<b>word</b> <b>word</b>")
    await page.get_by_role("button", name="Stop it").click()
    await expect(page.locator("#news")).to_have_text("The job has ended: stopped")
    assert problems == []


async def test_the_page_says_why_a_job_cannot_be_stopped(context: BrowserContext, server: Server) -> None:
    page, _ = await opened(context, server)
    await start(page, "word " * 1000)
    await has_words(page, 1)
    refusal = {"detail": "Redis is gone"}
    await page.route("**/jobs/*", lambda route: route.fulfill(status=503, json=refusal), times=1)
    for said in ("Redis is gone", "The job has ended: stopped"):
        await page.get_by_role("button", name="Stop it").click()
        await expect(page.locator("#news")).to_have_text(said)


async def test_the_page_says_that_the_server_has_lost_a_job(context: BrowserContext) -> None:
    """The page reconnects after a restart. It says the same when it is opened again."""
    command = uvicorn_command("lessons.log_server:app")
    with running(command) as first:
        page, _ = await opened(context, first)
        await start(page, "word " * 1000)
        await expect(page.locator("#websocket")).to_contain_text("word")
        first.interrupt()
        assert first.ends_within(2) is not None
        await expect(page.locator("#websocket-state")).to_have_text(
            re.compile("closed with .*; trying again")
        )
        with running(command, first.port):
            for _ in range(2):
                await expect(page.locator("#news")).to_have_text(
                    "The server no longer has this job. Start another one."
                )
                await expect(page.get_by_role("button", name="Stop it")).to_be_disabled()
                await page.reload()


async def test_each_tab_reconnects_to_its_own_job(context: BrowserContext, server: Server) -> None:
    tabs = []
    for _ in range(2):
        page, _ = await opened(context, server)
        await start(page, "word " * 1000)
        await has_words(page, 1)
        tabs.append(page)
    for page in tabs:
        shown = await page.evaluate("socket.close(), find('#websocket').children.length")
        await has_words(page, shown + 1)
        await expect(page.locator("#news")).to_have_text(re.compile("^job-.* is running$"))


async def test_an_older_job_does_not_change_what_is_new_of_the_last_job(
    context: BrowserContext, server: Server
) -> None:
    """Another tab still shows the older job."""
    older, _ = await opened(context, server)
    await start(older, "word " * 1000)
    await has_words(older, 10)
    page, _ = await opened(context, server)
    await start(page, "two words")
    for pane in ("#websocket", "#source"):
        await expect(page.locator(f"{pane}-state")).to_have_text("The job has ended: done")
    shown = await older.evaluate("find('#websocket').children.length")
    await has_words(older, shown + 1)
    await page.reload()
    assert await page.evaluate("seen") == 4


async def test_the_page_reconnects_after_a_proxy_has_answered_502(
    context: BrowserContext, server: Server
) -> None:
    """An EventSource does not try again after such an answer, so the page does. No word is lost."""
    async with Proxy(server) as proxy:
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{proxy.port}/")
        await start(page, QUESTION)
        await expect(page.locator("#source")).to_contain_text("word1")
        proxy.break_down()
        await until(lambda: "GET /streams/" in proxy.refused, "the EventSource to get a 502")
        await expect(page.locator("#source-state")).to_have_text("closed; trying again")
        proxy.broken = False
        for pane in ("#websocket", "#source"):
            await expect(page.locator(f"{pane}-state")).to_have_text("The job has ended: done")
            assert (await page.locator(pane).inner_text()).split() == ["You", "asked:", *QUESTION.split()]


async def test_five_quick_clicks_start_one_job(context: BrowserContext, server: Server) -> None:
    page, problems = await opened(context, server)
    requests: list[Route] = []

    def hold(request: Route) -> None:
        requests.append(request)

    await page.route("**/jobs", hold)
    button = page.get_by_role("button", name="Start a job")
    await button.click(click_count=5)
    await until(lambda: len(requests) > 0, "a request")
    await expect(button).to_be_disabled()
    for request in requests:
        await request.continue_()
    await expect(page.locator("#news")).to_have_text(re.compile("^job-.* is running$"))
    await expect(button).to_be_enabled()
    assert len(requests) == 1
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_is_readable(browser: Browser, server: Server, scheme: str) -> None:
    """All text has enough contrast, and nothing is wider than a phone."""
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 740})  # type: ignore[arg-type]
    page, _ = await opened(context, server)
    await start(page, "two words")
    await expect(page.locator("#source-state")).to_have_text("The job has ended: done")
    assert (await page.evaluate(CONTRAST))[0] == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await context.close()
