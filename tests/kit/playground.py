"""Open web/index.html in a browser, and use it."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, WebSocket, expect

from tests.kit.commands import PRODUCER
from tests.kit.servers import Server
from tests.kit.waiting import TIMEOUT

# A laptop, a phone, and the laptop at 200% zoom: the screens on which the queue has to be in view.
LAPTOP, TALL_PHONE, ZOOMED = (
    {"viewport": {"width": 1280, "height": 800}},
    {"viewport": {"width": 390, "height": 844}, "has_touch": True},
    {"viewport": {"width": 640, "height": 400}, "device_scale_factor": 2},
)


class Playground:
    """The page, opened; and what its websockets have sent and received."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.policy = ""
        self.problems: list[str] = []  # in the console
        self.requested: list[str] = []
        self.sent: list[list[str | bytes]] = []  # by each connection of a producer
        self.receipts: list[list[str | bytes]] = []  # to each
        self.received: list[str | bytes] = []  # by consumers
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._request)
        page.on("websocket", self._websocket)

    def _console(self, message: ConsoleMessage) -> None:
        # That the server is not there is no fault of the page's.
        if message.type in ("error", "warning") and "net::ERR_CONNECTION_" not in message.text:
            self.problems.append(message.text)

    def _request(self, request: Request) -> None:
        self.requested.append(request.url)

    def _websocket(self, websocket: WebSocket) -> None:
        self.requested.append(websocket.url)
        if websocket.url.endswith(PRODUCER):
            self.sent.append([])
            self.receipts.append([])
            sent, receipts = self.sent[-1], self.receipts[-1]
            websocket.on("framesent", lambda payload: sent.append(payload))
            websocket.on("framereceived", lambda payload: receipts.append(payload))
        else:
            websocket.on("framereceived", lambda payload: self.received.append(payload))

    @property
    def producer(self) -> Locator:
        return self.page.locator("#producer")

    @property
    def lanes(self) -> Locator:
        return self.page.get_by_role("article")

    async def press(self, name: str, within: Locator | None = None) -> None:
        await (within or self.page.locator("main")).get_by_role("button", name=name, exact=True).click()

    async def add(self, count: int = 1) -> None:
        """Add consumers, and wait until they are connected."""
        lanes = await self.lanes.count()
        for _ in range(count):
            await self.press("Add a consumer")
        for lane in range(lanes, lanes + count):
            await expect(self.lanes.nth(lane).locator(".state")).to_have_text("connected")

    async def send(self, payload: str) -> None:
        await self.page.get_by_label("Payload, a JSON value").fill(payload)
        await self.page.locator("#send").click()

    async def number(self, selector: str) -> float:
        return float((await self.page.locator(selector).inner_text()).replace(",", ""))

    async def stop(self) -> int:
        """Stop the stream, and wait until each payload has its receipt. How many there were."""
        await self.press("Stop the stream")
        await self.page.evaluate(
            "new Promise(requestAnimationFrame)"
        )  # the counts are drawn with the next frame
        await expect(self.page.locator("#waiting")).to_have_text("0")
        count = int(await self.number("#sent"))
        assert count == await self.number("#receipts") + await self.number("#refused")
        return count


@asynccontextmanager
async def opened(browser: Browser, server: Server, **options: object) -> AsyncIterator[Playground]:
    """Open the page. Whatever happens there, the console stays empty, and nothing comes from elsewhere."""
    page = await browser.new_page(**options)  # type: ignore[arg-type]
    page.set_default_timeout(1000 * TIMEOUT)
    playground = Playground(page, server)
    try:
        response = await page.goto(server.url("/", "http"))
        assert response
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        policy = page.locator("meta[http-equiv='Content-Security-Policy']")
        playground.policy = await policy.get_attribute("content") or ""
        await expect(page.locator("#producer .state")).to_have_text("connected")
        await expect(page.locator("#depth")).to_have_text(re.compile(r"\d"))
        yield playground
    finally:
        await page.close()
    assert not playground.problems
    foreign = [
        url for url in playground.requested if not re.match(rf"(http|ws)://127.0.0.1:{server.port}/", url)
    ]
    assert not foreign
