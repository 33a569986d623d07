"""Wait for a condition, with a deadline. On a slow machine, TEST_SLOWNESS extends all deadlines."""

import asyncio
import itertools
import os
import time
from collections.abc import Callable

# Every timeout is multiplied by it. Where more processes than cores run tests, all take longer.
SLOWNESS = float(os.environ.get("TEST_SLOWNESS", "1")) * max(
    1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) / (os.cpu_count() or 1)
)
TIMEOUT = 10 * SLOWNESS  # seconds after which a condition that must come true never will
PAUSES = [0.005, 0.01, 0.02]  # seconds between the first looks at a condition


def wait_for(
    condition: Callable[[], bool], what: str, timeout: float = TIMEOUT, longest: float = 0.04
) -> None:
    """Wait until the condition holds. Raise AssertionError after `timeout` seconds.

    A pause between two looks at the condition is at most `longest` seconds.
    """
    deadline, pauses = time.monotonic() + timeout, itertools.chain(PAUSES, itertools.repeat(longest))
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        time.sleep(next(pauses))


async def until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:  # noqa: ASYNC109
    """Do the same as wait_for(), without blocking the event loop."""
    deadline, pauses = time.monotonic() + timeout, itertools.chain(PAUSES, itertools.repeat(0.04))
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        await asyncio.sleep(next(pauses))
