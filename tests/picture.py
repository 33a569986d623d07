"""Take the README's picture of the page: `python -m tests.picture` writes web/playground.png."""

import asyncio
import re

from playwright.async_api import FloatRect, async_playwright, expect

from tests.kit.browser import FLAGS
from tests.kit.commands import SERVERS
from tests.kit.needs import CHROMIUM
from tests.kit.playground import LAPTOP, opened
from tests.kit.root import ROOT
from tests.kit.servers import running
from tests.kit.waiting import TIMEOUT

CLIP: FloatRect = {"x": 0, "y": 0, "width": 1280, "height": 730}  # the page without the space below it


async def main() -> None:
    expect.set_options(timeout=1000 * TIMEOUT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with running(SERVERS["server.py"]) as server:
            async with opened(browser, server, **LAPTOP) as playground:
                await playground.add(3)
                await playground.press("NaN")
                await playground.page.get_by_label("Steady stream").fill("95")
                await playground.press("Start the stream")
                for lane in await playground.lanes.all():
                    # One after the other, so that each has a few payloads to show.
                    await expect(lane.locator("li").last).not_to_be_empty()
                    await playground.press("Disconnect", lane)
                await expect(playground.page.locator("#depth")).to_have_text(re.compile("^3..$"))
                await playground.page.screenshot(path=ROOT / "web" / "playground.png", clip=CLIP)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
