"""Servers for the tests: one that they share, for starting takes a while, and fresh ones to be ended."""

import os
import shlex
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import pytest

from tests import your_server

pytest.register_assert_rewrite("tests.kit", "tests.checks")

from tests.kit.clients import drain  # noqa: E402
from tests.kit.commands import NAIVE, SERVERS  # noqa: E402
from tests.kit.namespaces import isolates  # noqa: E402
from tests.kit.servers import Server, Yours, running, tracebacks  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    your_server.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--server"):
        your_server.check_arguments(config)
        your_server.be_brief(config)
        # The processes of pytest-xdist have a workerinput. The first process tries it for all.
        if not hasattr(config, "workerinput"):
            try_to_start(config)
        config.pluginmanager.register(your_server.Report(config))


def pytest_xdist_auto_num_workers() -> int:
    """More processes than cores, for most tests wait most of the time."""
    return min(8, 3 * (os.cpu_count() or 1))


def yours(config: pytest.Config) -> Yours:
    """The command that --server names. It runs in the folder in which pytest was started."""
    server = config.getoption("--server")
    paths = (config.getoption("--producer-path"), config.getoption("--consumer-path"))
    port = your_server.port_of(server)
    try:
        command = shlex.split(server)
    except ValueError as error:  # an open quotation
        raise pytest.UsageError(f"--server {server}: {error}") from None
    return Yours(command, config.invocation_params.dir, *paths, port)


def try_to_start(config: pytest.Config) -> None:
    """Raise UsageError if the server that --server names does not run."""
    try:
        with running(yours(config)):
            pass
    except (OSError, AssertionError) as error:
        # pytest adds to an assertion's message how it came about.
        why = str(error).partition("\nassert ")[0]
        raise pytest.UsageError(f"--server: the server does not run: {why}") from None


def is_yours(item: pytest.Function) -> bool:
    """Whether a test is for the server that --server names."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("command") == "yours"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Keep together what shares a server, or a port as the README's commands do, and start with the latter.

    Tests with servers of their own come last, each in the process that is free first.
    """
    server = config.getoption("--server")
    items[:] = [item for item in items if is_yours(item) == bool(server)]
    if server:
        for item in items if your_server.port_of(server) else []:
            item.add_marker(pytest.mark.xdist_group("one server for all"))
        return
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


@pytest.fixture(scope="session", params=[*SERVERS, "yours"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """The command of each server in turn, or the one of --server: what uses it is run once for each."""
    return yours(request.config) if request.param == "yours" else SERVERS[request.param]


def how_long(fixture_name: str, config: pytest.Config) -> Literal["session", "function"]:
    """Keep a server for all tests. But one that may have faults must not harm the next test."""
    server = config.getoption("--server")
    return "function" if server and not your_server.port_of(server) else "session"


@pytest.fixture(scope=how_long)
def shared(command: list[str]) -> Iterator[Server]:
    with running(command) as server:
        yield server


@pytest.fixture
async def server(shared: Server) -> AsyncIterator[Server]:
    """A server with an empty queue. It must come through the test without a traceback."""
    mark = len(shared.log)
    yield shared
    if not shared.yours or shared.yours.port:  # else it is killed now, and may be unable to answer
        if shared.has_stats and "dead" in shared.stats():
            shared.retry()
        await drain(shared)  # of a test that failed
    assert tracebacks(shared.log[mark:]) == 0, f"{your_server.NO_TRACEBACK}:\n{shared.log[mark:]}"


@pytest.fixture
def fresh(command: list[str]) -> Iterator[Server]:
    """A server of the test's own, which may end it."""
    if isinstance(command, Yours) and command.port:
        pytest.skip("it ends the server: give --server a command, not a URL")
    with running(command) as server:
        yield server


@pytest.fixture
def naive() -> Iterator[Server]:
    """The server as tutorials write it."""
    with running(NAIVE) as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped because something is missing on this machine, and how to get it."""
    missing: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        # (path, line, reason) of a skipped test
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith("needs "):
            missing[reason] = missing.get(reason, 0) + 1
    for reason, count in missing.items():
        terminalreporter.write_line(f"{count} tests were skipped: this {reason}")
