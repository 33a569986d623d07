"""Any file can be copied out of this repository and run alone. It says so if the Python is too old for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, running, shared_redis, uvicorn_command

LESSONS = [path for path in (ROOT / "lessons").glob("*.py") if path.stem != "test_your_copy"]
FILES = sorted([*ROOT.glob("*.py"), *LESSONS])
WITH_A_PAGE = [
    "server",
    "multiproc_server",
    "rooms_server",
    "log_server",
    "ack_server",
    "auth_server",
    "limits_server",
    "redis_server",
    "pubsub_server",
]
# What runs a file on a Python that says it is 3.10. The packages are imported before it says so.
ON_OLD_PYTHON = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[2], run_name="__mp_main__")  # as a process of multiprocessing imports it
sys.version_info = (3, 10, 13, "final", 0)
runpy.run_path(sys.argv[2], run_name="__main__")
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
        assert "Traceback" not in server.log


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_an_old_python_is_refused_in_one_line(file: Path) -> None:
    """Python 3.10 has no asyncio.TaskGroup, and without this check only consumers would notice."""
    ended = subprocess.run(
        [sys.executable, "-c", ON_OLD_PYTHON, str(ROOT), str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr == "this needs Python 3.11 or later\n"
