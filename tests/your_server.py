"""Try the contract on a server that is named on the command line, and report in plain words.

    python -m pytest tests/test_contract.py --server "uvicorn mine:app --port"
    python -m pytest tests/test_contract.py --server ws://127.0.0.1:8000

A free port is added to a command, and each test starts a server of its own. A URL names a server that
already runs on this machine. All tests share it, and those that must start or stop it are left out.
"""

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

CONTRACT = Path(__file__).parent / "test_contract.py"
NO_TRACEBACK = "no traceback"  # what every test checks at its end
WORDS = {"passed": "holds", "failed": "BROKEN", "skipped": "not tried"}
WIDTH = 110  # columns of the report


class Result(NamedTuple):
    """How one test ended."""

    promise: str
    case: str  # if the promise has several tests
    outcome: str  # passed, failed or skipped
    reason: str  # for failed and skipped


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("your server", "try tests/test_contract.py on your own server")
    group.addoption("--server", metavar="COMMAND", help="a command that takes a port, or ws://127.0.0.1:PORT")
    group.addoption("--producer-path", default="/ws/producer", metavar="PATH")
    group.addoption("--consumer-path", default="/ws/consumer", metavar="PATH")


def port_of(server: str) -> int | None:
    """Return the port in the URL of a running server, or None for a command."""
    if not re.match(r"\w+://", server):  # a command may have a URL in it, such as that of a database
        return None
    try:
        url = urlsplit(server)
        port = url.port or 80
    except ValueError as error:
        raise pytest.UsageError(f"--server {server}: {error}") from None
    if url.hostname not in ("127.0.0.1", "localhost") or url.scheme not in ("ws", "http"):
        raise pytest.UsageError(f"--server {server}: name a server on this machine, as ws://127.0.0.1:PORT")
    if url.path.strip("/"):
        raise pytest.UsageError(f"--server {server}: give paths as --producer-path and --consumer-path")
    return port


def check_arguments(config: pytest.Config) -> None:
    """Raise UsageError for a bad --server, or for tests that are about our own servers."""
    port_of(config.getoption("--server"))
    for argument in config.args:
        if not Path(argument.partition("::")[0]).resolve() == CONTRACT:
            raise pytest.UsageError("--server is for tests/test_contract.py alone")


def be_brief(config: pytest.Config) -> None:
    """Print our report in place of tracebacks, unless the command line asks for them (--tb=short)."""
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
    config.option.reportchars = ""
    config.option.durations = None


def reason_for(error: BaseException) -> str:
    """Say in one line why a test failed or was skipped."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "nothing came in time"
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, AssertionError | pytest.skip.Exception):
        return said
    return f"{type(error).__name__}: {said}"


def headings() -> dict[str, str]:
    """Return the heading above each test of the contract, by the test's name."""
    found: dict[str, str] = {}
    heading = ""
    for line in CONTRACT.read_text().splitlines():
        if re.fullmatch(r"# \w[\w ]*", line):
            heading = line.removeprefix("# ")
        elif test := re.match(r"(?:async )?def (test_\w+)", line):
            found[test[1]] = heading
    return found


class Report:
    """Collects how the tests end. Prints which promises hold, which do not, and which were not tried."""

    def __init__(self, config: pytest.Config) -> None:
        self.server = config.getoption("--server")
        self.results: list[Result] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the reason, in the process that runs the test."""
        report = yield
        if call.excinfo:
            report.user_properties.append(("reason", reason_for(call.excinfo.value)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, _, case = report.nodeid.partition("::")[2].removesuffix("]").partition("[")
        case = case.removeprefix("yours").removeprefix("-")
        reason = str(dict(report.user_properties).get("reason", ""))
        if report.when == "teardown" and report.failed:
            if not reason.startswith(NO_TRACEBACK):
                return  # a shared queue could not be emptied, which is no promise
            self.results.append(Result(NO_TRACEBACK, name, report.outcome, reason))
        elif report.when == "call" or not report.passed:
            self.results.append(Result(name, case, report.outcome, reason))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.results:
            return
        promises: dict[str, list[Result]] = defaultdict(list)
        for result in self.results:
            promises[result.promise].append(result)
        lines: dict[str, list[str]] = defaultdict(list)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for name, heading in headings().items():
            if name in promises:
                outcome = outcome_of(promises[name])
                counts[heading][outcome] += 1
                lines[heading] += describe(name, promises[name])
        write = terminalreporter.write_line
        terminalreporter.section(f"the contract, tried on: {self.server}")
        for heading, described in lines.items():
            holding = counts[heading]["passed"]
            tried = holding + counts[heading]["failed"]
            write("")
            write(f"{heading}: {holding} of {tried}" if tried else f"{heading}: not tried")
            for line in described:
                write(line)
        total = sum(counts.values(), Counter[str]())
        write("")
        if NO_TRACEBACK in promises:
            write(f"After {len(promises[NO_TRACEBACK])} tests, there was a traceback in the server's log.")
        said = [
            f"{total[outcome]} {one if total[outcome] == 1 else several}"
            for outcome, (one, several) in TOTALS.items()
            if total[outcome]
        ]
        promise = "promise" if total.total() == 1 else "promises"
        write(f"{total.total()} {promise}: {', '.join(said)}.")
        if total["failed"]:
            write("For the details of one of them, add: -k WORD --tb=short")


TOTALS = {  # for one promise, and for several
    "passed": ("holds", "hold"),
    "failed": ("is broken", "are broken"),
    "skipped": ("was not tried", "were not tried"),
}


def outcome_of(results: list[Result]) -> str:
    """A promise is broken if one of its tests failed. It was not tried if all were skipped."""
    outcomes = {result.outcome for result in results}
    return next(outcome for outcome in ("failed", "passed", "skipped") if outcome in outcomes)


def describe(name: str, results: list[Result]) -> list[str]:
    """Say how a promise fared, in one line or a few."""
    outcome = outcome_of(results)
    sentence = name.removeprefix("test_").replace("_", " ")
    line = f"  {WORDS[outcome]:9}  {sentence[0].upper()}{sentence[1:]}"
    if outcome == "passed":
        return [line]
    found = [result for result in results if result.outcome == outcome]
    reason = found[0].reason
    if len(results) > 1 and outcome == "failed":
        reason = f"{len(found)} of {len(results)} cases, such as {found[0].case}: {reason}"
    indent = " " * 13
    return [line, *textwrap.wrap(reason, WIDTH, initial_indent=indent, subsequent_indent=indent, max_lines=2)]
