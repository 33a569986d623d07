"""lessons/test_your_copy.py: server.py passes its tests, and the code that tutorials show fails them all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.root import ROOT

LESSON = (ROOT / "lessons" / "test_your_copy.py").read_text()
TESTS = re.findall(r"^def (test_\w+)", LESSON, re.MULTILINE)


def run(app: str, folder: Path) -> tuple[int, set[str], str]:
    """Run the lesson against an app. Returns the exit code, the tests that failed, and the output."""
    copy = folder / "test_your_copy.py"
    lesson = LESSON.replace('APP = "server:app"', f'APP = "{app}"')
    if app == "server:app":  # which takes longer if the machine is busy
        assert "    end = time.monotonic() + seconds\n" in lesson
        lesson = lesson.replace("time.monotonic() + seconds", "time.monotonic() + 12 * seconds")
    copy.write_text(lesson)
    command = [sys.executable, "-m", "pytest", str(copy), "--rootdir", str(folder), "-c", "/dev/null", "-rfE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, set(re.findall(r"^FAILED \S*::(\w+)", done.stdout, re.M)), done.stdout


def test_server_py_passes_the_copied_tests(tmp_path: Path) -> None:
    code, failed, output = run("server:app", tmp_path)
    assert (code, failed) == (0, set()), output
    assert f"{len(TESTS)} passed" in output


def test_the_server_of_tutorials_fails_the_copied_tests(tmp_path: Path) -> None:
    code, failed, output = run("steps.step0_naive:app", tmp_path)
    assert (code, failed) == (1, set(TESTS)), output


@pytest.mark.parametrize("name", TESTS)
def test_the_page_has_a_row_for_each_test(name: str) -> None:
    assert f"| `{name}` | " in (ROOT / "lessons" / "test_your_copy.md").read_text()
