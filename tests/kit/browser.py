"""Options for Chromium, and checks that people can read and use a page."""

from playwright.async_api import Page

from tests.kit.root import ROOT

FLAGS = [
    "--no-sandbox",  # which a container's root cannot have
    "--disable-gpu",
    "--in-process-gpu",  # a process less
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = ROOT / "tests" / "typescript" / "node_modules" / "axe-core" / "axe.min.js"

# What text stands out less from its background than WCAG asks; and how light the page is.
CONTRAST = """() => {
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => parse(color).slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return parse(color)[3] === 0 ? behind(element.parentElement) : color;
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
        const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
        if (!texts.some((text) => text.data.trim()) || !element.checkVisibility()) continue;
        const pair = [getComputedStyle(element).color, behind(element)];
        const [high, low] = pair.map(light).sort((a, b) => b - a);
        if ((high + 0.05) / (low + 0.05) < 4.5) faint.push([element.outerHTML, ...pair]);
    }
    return [faint, light(behind(document.body))];
}"""


async def barriers(page: Page) -> list[str]:
    """Return what axe-core finds in the page that is hard to use for some people (WCAG and more)."""
    assert AXE.exists(), "`npm ci --prefix tests/typescript` installs axe-core"
    await page.evaluate(AXE.read_text())
    found: list[str] = await page.evaluate(
        """async () => (await axe.run()).violations.map(
            ({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html)}`)"""
    )
    return found
