"""Any file can be copied out of this repository and run alone. It says so if the Python is too old for it."""

import ast
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lessons import partitioned_server, redis_server
from tests.kit.commands import uvicorn_command
from tests.kit.redis import shared_redis
from tests.kit.root import ROOT
from tests.kit.servers import running, tracebacks
from tests.kit.waiting import wait_for

LESSONS = [path for path in (ROOT / "lessons").glob("*.py") if path.stem != "test_your_copy"]
FILES = sorted([*ROOT.glob("*.py"), *LESSONS])
WITH_A_PAGE = [
    "server",
    "multiproc_server",
    "rooms_server",
    "log_server",
    "log_redis_server",
    "ack_server",
    "auth_server",
    "limits_server",
    "redis_server",
    "partitioned_server",
    "pubsub_server",
]
# What runs files on a Python that says it is 3.10. The packages are imported before it says so.
ON_OLD_PYTHON = """
import runpy, sys
_, root, *files = sys.argv
sys.path.insert(0, root)
for file in files:
    runpy.run_path(file, run_name="__mp_main__")  # as a process of multiprocessing imports it
sys.version_info = (3, 10, 13, "final", 0)
for file in files:
    try:
        runpy.run_path(file, run_name="__main__")
        print(file, "ran")
    except SystemExit as ended:
        print(file, ended)
"""


def copied(name: str, folder: Path) -> list[str]:
    """Copy a server's file into a folder. Returns the command that runs the copy, which a port completes."""
    [source] = [path for path in FILES if path.stem == name]
    shutil.copy(source, folder)
    if name == "multiproc_server":
        return [sys.executable, str(folder / source.name), "--workers", "1", "--port"]
    command = uvicorn_command(f"{name}:app")
    return [*command[:-1], "--app-dir", str(folder), command[-1]]


@pytest.mark.parametrize("name", WITH_A_PAGE)
def test_a_copied_server_says_what_it_is(name: str, tmp_path: Path) -> None:
    """Without web/ beside it, GET / answers in a few plain words, not with 500 and a traceback."""
    with running(copied(name, tmp_path), env={"REDIS_URL": shared_redis().url()}) as server:
        status, content_type, body = server.get("/")
        assert (status, content_type) == (200, "text/plain; charset=utf-8")
        assert "/ws" in body
        assert tracebacks(server.log) == 0


@pytest.mark.parametrize("name", [file.stem for file in FILES if "def lifespan" in file.read_text()])
def test_ctrl_c_pressed_twice_ends_a_server_without_a_traceback(name: str, tmp_path: Path) -> None:
    """By default, Starlette would log how uvicorn cancels its lifespan."""
    with running(copied(name, tmp_path), env={"REDIS_URL": shared_redis().url()}) as server:
        wait_for(lambda: "Application startup complete" in server.log, "the first process to start")
        server.interrupt()
        time.sleep(0.01)  # or the system might send the two as one
        server.interrupt()
        assert server.ends_within(5) is not None
        assert tracebacks(server.log) == 0, server.log


def test_an_old_python_is_refused_in_one_line() -> None:
    """Python 3.10 has no asyncio.TaskGroup, and without this check only consumers would notice."""
    command = [sys.executable, "-c", ON_OLD_PYTHON, str(ROOT), *map(str, FILES)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [f"{file} this needs Python 3.11 or later" for file in FILES]
    assert (ended.returncode, ended.stderr) == (0, "")


# How many texts there are of a function that several servers have, if not one. Each has its reason: an
# idea that the servers do not share, or another answer. Otherwise all copies are the same text.
TEXTS = {
    "Broker.connect": 2,
    "Broker.send": 2,
    "Channel.__init__": 5,
    "Channel.acknowledge": 2,
    "Channel.dead": 2,
    "Channel.deal": 2,
    "Channel.deliver": 4,
    "Channel.fetch": 3,
    "Channel.give_back": 2,
    "Channel.put": 4,
    "Channel.qsize": 4,
    "Channel.redeliver": 3,
    "Channel.retry": 2,
    "Channel.start": 2,
    "Channel.stop": 2,
    "Router.__init__": 2,
    "Router.on": 2,
    "Storage.__init__": 2,
    "Storage.append": 2,
    "Storage.connect": 2,
    "Storage.finish": 2,
    "Storage.open": 2,
    "Storage.read": 2,
    "Storage.start_job": 2,
    "Storage.stats": 2,
    "Storage.stop_job": 2,
    "Unacknowledged.__init__": 3,
    "Unacknowledged.blame": 2,
    "body": 2,
    "check": 2,
    "check_name": 2,
    "connect": 3,
    "consumer": 5,
    "dead": 2,
    "endpoint": 2,
    "explain": 2,
    "find_node": 2,
    "handle": 2,
    "index": 6,
    "lifespan": 8,
    "log_in": 2,
    "post": 2,
    "producer": 7,
    "put_batch": 3,
    "receive": 2,
    "receive_acks": 2,
    "refuse": 3,
    "retry": 3,
    "same_origin": 3,
    "send": 2,
    "send_messages": 2,
    "send_payloads": 3,
    "stats": 9,
    "watch": 2,
}


def functions(tree: ast.Module | ast.ClassDef, source: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each function, decorators included, and of each method of a class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            above = "\n".join(ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, f"{above}\n{ast.get_source_segment(source, node)}"
        elif isinstance(node, ast.ClassDef):
            for name, text in functions(node, source):
                yield f"{node.name}.{name}", text


def copies(files: list[Path]) -> dict[str, dict[str, list[str]]]:
    """Return, for each function that several files have, which files have which text."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in files:
        source = file.read_text()
        for name, text in functions(ast.parse(source), source):
            found.setdefault(name, {}).setdefault(text, []).append(file.stem)
    return {name: texts for name, texts in found.items() if sum(map(len, texts.values())) > 1}


def test_the_copies_of_a_function_in_the_servers_are_the_same_text() -> None:
    """The repetition is intended: a diff of two servers shows the idea in which they differ, and no more."""
    servers = [file for file in FILES if file.stem.endswith("_server") or file.stem == "server"]
    found = {name: len(texts) for name, texts in copies(servers).items() if len(texts) > 1}
    assert found == TEXTS


@pytest.mark.parametrize("name", ["give_back", "give_back_unknown", "keep_running", "put", "qsize", "report"])
def test_a_partition_is_the_channel_of_redis_server(name: str) -> None:
    """Only the names of the Streams differ."""
    texts = []
    for file, method in (("redis_server", f"Channel.{name}"), ("partitioned_server", f"Partition.{name}")):
        source = (ROOT / "lessons" / f"{file}.py").read_text()
        texts.append(dict(functions(ast.parse(source), source))[method])
    assert texts[0].replace("STREAM", "self.stream") == texts[1]


@pytest.mark.parametrize("name", ["PUT", "COUNT", "TAKE", "REPORT", "RENEW", "RETRY", "LEAVE"])
def test_the_scripts_of_partitioned_server_are_those_of_redis_server(name: str) -> None:
    assert getattr(partitioned_server, name) == getattr(redis_server, name)


def test_the_copies_of_a_function_in_the_clients_are_the_same_text() -> None:
    clients = [file for file in FILES if file.stem.endswith("_client")]
    for name in ("give_up", "keep_trying", "pause"):
        [(_, same)] = copies(clients)[name].items()
        assert len(same) == 3
