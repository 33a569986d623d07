"""The READMEs tell the truth: their excerpts stand in the files, and their commands print what they show.

A section's ```console blocks are terminals side by side, those of a server and of its clients. Each runs its
commands in turn. A command or a ^C is typed once the output shown above it in its terminal has appeared; a ^C
also waits for all commands elsewhere that end by themselves. Where the first block starts a Redis, or what is
behind a gateway, it goes on through all blocks that follow: one server after the other can use it. All have
the default ports; where the system gives each section a network of its own, they are played side by side.
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.diffs import BLOCK, refreshed
from tests.kit.namespaces import alone, enter, interrupt
from tests.kit.redis import redis_executable
from tests.kit.root import ROOT
from tests.kit.scripts import WAITING
from tests.kit.waiting import TIMEOUT, wait_for

PAGES = [ROOT / "README.md", *sorted((ROOT / "steps").glob("*.md"))]
PAGES += sorted((ROOT / "lessons").glob("*.md"))
READMES = [path for path in PAGES if path.exists()]
NAIVE = ROOT / "lessons" / "naive"
PORT, REDIS_PORT, BEHIND_PORT = 8000, 6379, 8001  # the READMEs' commands use the defaults
SERVER = re.compile(r"\$ (?:\w+=\S+ )?(uvicorn|python \S*server\.py)")
BEHIND = {
    REDIS_PORT: re.compile(r"\$ .*redis-server"),
    BEHIND_PORT: re.compile(rf"\$ uvicorn \S+ --port {BEHIND_PORT}\n"),
}
SECONDS = re.compile(r"\b((?:timeout|sleep) )(\d+)")  # in commands
STRETCH = float(os.environ.get("TEST_SLOWNESS", "1"))  # of these; they have room for a neighbour on the core
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{Path(redis_executable()).parent}",
    "WEBSOCKETS_BACKOFF_INITIAL_DELAY": "0.5",
    "UVICORN_LOOP": "asyncio",  # the README's readers have no uvloop, the benchmark's and so the tests' have
    "PYTHONUNBUFFERED": "",  # or a line and its end are two writes, and another's line may come between
}
# What differs from run to run: process ids, the clients' ports, times, Redis's ids (times too), shares of
# payloads, memory, random ids; and from system to system, how a connection fails.
VARYING = [
    r"\[\d+\]",
    r"(?<=127\.0\.0\.1:)\d{5}",
    r"(?<=port=)\d{5}",
    r"\d{10}\.\d+",
    r"\d{13}-\d+",
    r"^\d+(?= payloads$| MB$)",
    r"\b[0-9a-f]{16}\b",
    r"(?<=Redis is gone \().*(?=\): )",
    r"(?<=no Redis at redis://localhost:6379/0 \().*(?=\): )",
]


def normal(text: str) -> str:
    for pattern in VARYING:
        text = re.sub(pattern, "#", text, flags=re.MULTILINE)
    return text


def behind(block: str) -> int | None:
    """The port of what the block starts for other servers to use, if it does."""
    return next((port for port, pattern in BEHIND.items() if pattern.match(block)), None)


def scenarios(readme: Path) -> Iterator[tuple[str, list[str]]]:
    """A heading, and the console blocks below it that are played together."""
    for section in re.split(r"^#+ ", readme.read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```console\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        first = next((n for n, block in enumerate(blocks) if behind(block)), len(blocks))
        starts = [n for n, block in enumerate(blocks) if n == first or (n < first and SERVER.match(block))]
        assert starts[:1] == [0] or not blocks, f"belongs to no server: {blocks[0]}"
        for start, end in itertools.pairwise([*starts, len(blocks)]):
            yield section.splitlines()[0], blocks[start:end]


class Terminal:
    """A console block, played."""

    def __init__(self, block: str, folder: str, place: int | None) -> None:
        self.block = block
        self.steps = re.split(r"^(\$ .*|\^C)\n", block, flags=re.MULTILINE)[
            1:
        ]  # typed, shown, typed, shown ...
        self.output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self.env = {**ENV, "TMPDIR": folder}
        self.place = place
        self.process: subprocess.Popen[str] | None = None
        self.expected = ""

    def printed(self) -> str:
        """What the commands printed, but for the consumers' greeting where the page leaves it out."""
        printed = Path(self.output.name).read_text()
        return printed if WAITING in self.block else printed.replace(WAITING, "")

    def shows(self, end: str = "") -> bool:
        """Whether all that was expected so far is there; with `end` r"\\Z", and nothing else."""
        lines = normal(self.expected).splitlines(keepends=True)
        pattern = "".join(r"(?:.*\n)*?" if line == "...\n" else re.escape(line) for line in lines)
        return re.match(pattern + end, normal(self.printed())) is not None

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def interrupts(self) -> bool:
        return self.steps[:1] == ["^C"]

    def ready(self) -> bool:
        """Whether the next step may be typed."""
        return bool(self.steps) and self.shows() and (self.interrupts() or not self.running())

    def type(self) -> None:
        typed, shown, *self.steps = self.steps
        typed = SECONDS.sub(lambda found: f"{found[1]}{int(found[2]) * STRETCH:g}", typed)
        if typed == "^C":
            assert self.process
            interrupt(self.process, self.place)
        else:
            self.process = subprocess.Popen(
                [*enter(self.place), "bash", "-c", "trap : INT; " + typed.removeprefix("$ ")],
                cwd=ROOT, env=self.env, text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.expected += shown

    def kill(self) -> None:
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()


def listens(port: int, place: int | None = None) -> bool:
    """Whether somebody accepts connections there, in a place of alone()."""
    rows = Path(f"/proc/{place or 'self'}/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)


def start(terminal: Terminal, port: int, place: int | None) -> None:
    """Type its first command, and wait until somebody accepts connections, or the command has ended."""
    terminal.type()
    ready = f"port {port} to answer"
    wait_for(lambda: listens(port, place) or not terminal.running(), ready, 3 * TIMEOUT, longest=0.2)


def finish(terminals: list[Terminal], deadline: float) -> None:
    """Type what is left to type, until all have ended or it is too late."""
    while any(terminal.steps or terminal.running() for terminal in terminals):
        ready = [terminal for terminal in terminals if terminal.ready()]
        if any((t.steps or t.running()) and not t.interrupts() for t in terminals):
            ready = [terminal for terminal in ready if not terminal.interrupts()]
        if ready:
            ready[0].type()
        elif time.monotonic() > deadline:
            break
        time.sleep(0.05)


def play(blocks: list[str], place: int | None) -> None:
    names = {PORT: "", REDIS_PORT: "redis", BEHIND_PORT: str(BEHIND_PORT)}  # of what needs a port
    ports = [port for port, name in names.items() if any(name in block for block in blocks)]
    wait_for(
        lambda: not any(listens(port, place) for port in ports),
        f"ports {ports}, which the commands need, to be free",
    )
    deadline = time.monotonic() + 6 * TIMEOUT
    folder = tempfile.TemporaryDirectory()  # for what they write
    terminals = [Terminal(block, folder.name, place) for block in blocks]
    try:
        playing: list[Terminal] = []
        for block, terminal in zip(blocks, terminals, strict=True):
            if port := behind(block):
                start(terminal, port, place)
                continue
            if SERVER.match(block):
                finish(playing, deadline)
                playing = []
                start(terminal, PORT, place)
            else:
                terminal.type()
            playing.append(terminal)
        finish(playing, deadline)
        finish(terminals, deadline)
        printed = "\n".join(f"{each.block}\nprinted:\n{each.printed()}" for each in terminals)
        for terminal in terminals:
            assert terminal.shows(r"\Z"), f"expected:\n{terminal.expected}\nall terminals:\n{printed}"
        late = [terminal for terminal in terminals if terminal.steps or terminal.running()]
        assert not late, "\n".join(f"{each.block}\nso far:\n{each.printed()}" for each in late)
    finally:
        for terminal in terminals:
            terminal.kill()
        folder.cleanup()


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(blocks, id=f"{path.relative_to(ROOT)}: {heading}")
        for path in READMES
        for heading, blocks in scenarios(path)
    ],
)
def test_the_commands_of_a_section_print_what_it_shows(blocks: list[str]) -> None:
    with alone() as place:
        play(blocks, place)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_excerpts_are_in_the_files_word_for_word(path: Path) -> None:
    """A program prints the output that is shown below it."""
    folders = path.parent, ROOT, NAIVE, ROOT / "steps", ROOT / "tests" / "examples"
    files = [file.read_text() for folder in folders for file in folder.glob("*.py")]
    blocks = re.findall(
        r"^```python\n(.*?)^```\n+(?:```text\n(.*?)^```)?", path.read_text(), re.MULTILINE | re.DOTALL
    )
    for block, printed in blocks:
        if printed:
            assert subprocess.check_output([sys.executable, "-c", block], text=True) == printed
        else:
            assert any(block in file for file in files), f"stands in no file:\n{block}"


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_diff_is_that_of_its_two_files(path: Path) -> None:
    """`python -m tests.diffs` writes it."""
    page = path.read_text()
    assert refreshed(page) == page
    assert page.count("```diff\n") == len(BLOCK.findall(page)), "a diff that names no two files"


def test_the_first_command_sets_up_and_starts_the_server(tmp_path: Path) -> None:
    """The first command sets up and starts the server in a fresh copy; lines in are lines out.

    The packages come from the network, so the set-up is run here; the server and its clients are run where
    nobody else can have the port.
    """
    for name in ("server.py", "ws_producer_client.py", "ws_consumer_client.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "web", tmp_path / "web")
    found = re.search(
        r"^```sh\n(?:git clone .*\n)?(.*) && (python server\.py)\n```",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert found, "the first command does not end by starting the server"
    set_up, serve = found.groups()
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run(["bash", "-c", set_up], cwd=tmp_path, env=env, check=True)

    def command(line: str, place: int | None) -> list[str]:
        there = (
            f"cd {shlex.quote(str(tmp_path))} && . .venv/bin/activate && {line}"  # enter() changes folders
        )
        return [*enter(place), "bash", "-c", there]

    with alone() as place, tempfile.NamedTemporaryFile("w+") as log:
        wait_for(lambda: not listens(PORT, place), f"port {PORT}, which the server needs, to be free")
        server = subprocess.Popen(
            command(serve, place), env=env, stdout=log, stderr=log, text=True, start_new_session=True
        )

        def logged() -> str:
            return Path(log.name).read_text()

        try:
            # Not that somebody listens there: that could be another server.
            wait_for(
                lambda: f"running on http://127.0.0.1:{PORT}" in logged() or server.poll() is not None,
                "the server",
                3 * TIMEOUT,
            )
            assert server.poll() is None, logged()
            lines = "".join(f'{{"line": {number}}}\n' for number in range(100))
            produce = command("python ws_producer_client.py -", place)
            subprocess.run(produce, env=env, input=lines, text=True, check=True)
            consume = command("python ws_consumer_client.py --count 100", place)
            assert subprocess.check_output(consume, env=env, text=True) == lines
            interrupt(server, place)
            server.wait(TIMEOUT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
