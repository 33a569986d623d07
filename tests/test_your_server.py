"""The contract can be tried on a reader's own server (--server), and the report says in words what holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import SERVERS
from tests.kit.root import ROOT
from tests.kit.servers import running, tracebacks
from tests.your_server import port_of

CONTRACT = ROOT / "tests" / "test_contract.py"
OTHER_PATHS = """
from fastapi import FastAPI
from server import consumer, lifespan, producer, stats

app = FastAPI(lifespan=lifespan)
app.get("/stats")(stats)
app.websocket("/in")(producer)
app.websocket("/out/{name}")(consumer)
"""
OTHER_STATS = """
import os
from fastapi import FastAPI
from server import consumer, producer

os.write(1, b"not UTF-8: \\xff")
app = FastAPI()
app.get("/stats")(lambda: {"queued": 0})
app.websocket("/ws/producer")(producer)
app.websocket("/ws/consumer")(consumer)
"""


def report(server: str, words: str, *options: str, folder: Path = ROOT) -> tuple[int, str]:
    """Try the promises with these words in their names. Returns pytest's exit code and its output."""
    command = [sys.executable, "-m", "pytest", "-n", "0", str(CONTRACT), "--server", server, "-k", words]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def command(app: str) -> str:
    return f"{sys.executable} -m uvicorn {app} --timeout-graceful-shutdown 1 --port"


def test_the_report_says_what_is_broken_and_why() -> None:
    """The page shows it. A server without GET /stats is not blamed for lacking it."""
    page = (ROOT / "lessons" / "test_your_copy.md").read_text()
    [(app, words, shown)] = re.findall(
        r'--server "uvicorn (\S+) --port" -k "(.*)"\n```\n\n```text\n(.*?)```', page, re.DOTALL
    )
    code, output = report(command(app), words)
    assert code == 1, output
    assert shown in output
    assert "tests, there was a traceback in the server's log" in output
    assert "3 promises: 1 holds, 1 is broken, 1 was not tried.\n" in output


def test_the_report_says_that_promises_hold(tmp_path: Path) -> None:
    """The server is in the folder in which the command is typed, and has other paths."""
    (tmp_path / "mine.py").write_text(OTHER_PATHS)
    paths = ("--producer-path", "/in", "--consumer-path", "/out/1")
    start = f"env PYTHONPATH={ROOT}:. {command('mine:app')}"
    code, output = report(start, "fragments or left", *paths, folder=tmp_path)
    assert code == 0, output
    assert "Payloads: 1 of 1\n  holds      A payload may come in fragments and compressed\n" in output
    assert "The end: 1 of 1\n  holds      The server says how many payloads were left\n" in output
    assert "2 promises: 2 hold.\n" in output


def test_a_server_with_another_page_of_stats_is_not_blamed_for_it(tmp_path: Path) -> None:
    """Nor for its log, which is not UTF-8. It has tests of its own beside it."""
    (tmp_path / "mine.py").write_text(OTHER_STATS)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    start = f"env PYTHONPATH={ROOT}:. {command('mine:app')}"
    code, output = report(start, "first_in or stats_say", folder=tmp_path)
    assert code == 0, output
    assert "  holds      First in first out\n" in output
    assert "  not tried  Stats say how many payloads wait\n" in output


@pytest.mark.parametrize("lifespan", [None, "lifespan"])
def test_a_log_without_the_count_breaks_no_other_promise(tmp_path: Path, lifespan: str | None) -> None:
    """Servers without GET /stats may log the count or not."""
    (tmp_path / "mine.py").write_text(
        "from fastapi import FastAPI, WebSocketException\n"
        "from server import close, consumer, lifespan, producer\n"
        f"app = FastAPI(lifespan={lifespan})\napp.exception_handler(WebSocketException)(close)\n"
        "app.websocket('/ws/producer')(producer)\napp.websocket('/ws/consumer')(consumer)\n"
    )
    start = f"env PYTHONPATH={ROOT}:. {command('mine:app')}"
    code, output = report(start, "were_left or while_payloads", folder=tmp_path)
    assert code == (0 if lifespan else 1), output
    assert "  holds      The server ends while payloads flow\n" in output
    assert ("  holds      The server says how many payloads were left\n" in output) == bool(lifespan)
    assert ("its log does not say: 7 payloads were still queued\n" in output) == (not lifespan)


def test_a_server_that_runs_already_stays_as_it_is() -> None:
    """It is not ended, and no payload stays in its queue."""
    with running(SERVERS["server.py"]) as server:
        code, output = report(f"ws://127.0.0.1:{server.port}", "left or first_in")
        assert code == 0, output
        assert "  holds      First in first out\n" in output
        assert "  not tried  The server says how many payloads were left\n" in output
        assert server.stats()["queued"] == 0


def test_a_server_that_does_not_start_is_an_error() -> None:
    """A report that all promises are broken would hide the cause."""
    code, output = report(command("nothing:app"), "first_in")
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert 'Could not import module "nothing"' in output
    assert tracebacks(output) == 0


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ("ws://example.invalid", "name a server on this machine"),
        ("wss://127.0.0.1", "name a server on this machine"),
        ("ws://127.0.0.1:8000/ws", "give paths as --producer-path and --consumer-path"),
        ("ws://127.0.0.1:99999", "Port out of range"),
        ("ws://[::1", "Invalid IPv6 URL"),
    ],
)
def test_a_bad_url_is_an_error(server: str, reason: str) -> None:
    with pytest.raises(pytest.UsageError, match=reason):
        port_of(server)


def test_a_url_has_a_port_and_a_command_has_none() -> None:
    assert port_of("ws://localhost:8000") == 8000
    assert port_of("http://127.0.0.1") == 80
    assert port_of("env REDIS_URL=redis://127.0.0.1:6379 uvicorn mine:app --port") is None
    assert port_of("uvicorn mine:app --port") is None
