"""Skip tests if the program that they need is not installed. On CI, it must be installed."""

import os
import shutil

import pytest

# The first draws pages in half the time, because it can only run without a window.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def needed(program: str | None, name: str, package: str) -> pytest.MarkDecorator:
    reason = f"needs {name} (Debian: apt install {package}; macOS: brew install {package})"
    return pytest.mark.skipif(program is None and "CI" not in os.environ, reason=reason)


needs_browser = needed(CHROMIUM, "Chromium or Google Chrome", "chromium")
needs_nginx = needed(NGINX, "nginx", "nginx")
