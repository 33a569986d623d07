"""Servers for the tests: one that they share, for starting takes a while, and fresh ones to be ended."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.register_assert_rewrite("tests.harness", "tests.checks")

from tests.harness import NAIVE, SERVERS, Server, drain, isolates, running  # noqa: E402


def pytest_xdist_auto_num_workers() -> int:
    """More processes than cores, for most tests wait most of the time."""
    return min(8, 2 * (os.cpu_count() or 1))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Keep together what shares a server, or a port as the README's commands do, and start with the latter.

    Tests with servers of their own come last, each in the process that is free first.
    """
    order = {}
    for item in items:
        if {"command", "shared"} <= set(item.fixturenames):
            group = str(item.callspec.params["command"])
        elif {"command", "fresh", "naive", "step"} & set(item.fixturenames):
            order[item] = 2
            continue
        else:
            group = item.path.stem
        if item.path.stem == "test_readme":
            order[item] = 0
            if isolates():
                continue
        item.add_marker(pytest.mark.xdist_group(group))
        order.setdefault(item, 1)
    items.sort(key=lambda item: order[item])


@pytest.fixture(scope="session", params=SERVERS)
def command(request: pytest.FixtureRequest) -> list[str]:
    """The command of each server in turn: what uses it is run once for each."""
    return SERVERS[request.param]


@pytest.fixture(scope="session")
def shared(command: list[str]) -> Iterator[Server]:
    with running(command) as server:
        yield server


@pytest.fixture
async def server(shared: Server) -> AsyncIterator[Server]:
    """A server with an empty queue. It must come through the test without a traceback."""
    mark = len(shared.log)
    yield shared
    if shared.has_stats and "dead" in shared.stats():
        shared.retry()
    await drain(shared)  # of a test that failed
    assert "Traceback" not in shared.log[mark:], shared.log[mark:]


@pytest.fixture
def fresh(command: list[str]) -> Iterator[Server]:
    """A server of the test's own, which may end it."""
    with running(command) as server:
        yield server


@pytest.fixture
def naive() -> Iterator[Server]:
    """The server as tutorials write it."""
    with running(NAIVE) as server:
        yield server
