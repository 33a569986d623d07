"""Servers for the tests: one that they share, for starting takes a while, and fresh ones to be ended."""

from collections.abc import AsyncIterator, Iterator

import pytest

pytest.register_assert_rewrite("tests.harness", "tests.checks")

from tests.harness import NAIVE, SERVERS, Server, drain, running  # noqa: E402


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
