"""Start a lesson with other constants, so that a test waits less or sends less."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.kit.commands import uvicorn_command, with_options

MODULE = """\
import {lesson} as lesson

for name, value in {constants!r}.items():
    assert hasattr(lesson, name), f"{lesson} has no {{name}}"
    setattr(lesson, name, value)

app = lesson.app
{more}"""


@cache
def folder() -> Path:
    """Return a temporary folder, which is removed when the tests end."""
    path = Path(tempfile.mkdtemp(prefix="lessons-"))
    atexit.register(shutil.rmtree, path)
    return path


def with_constants(lesson: str, more: str = "", /, **constants: object) -> list[str]:
    """Return the command of a lesson such as `lessons.ack_server`, with these constants. The port follows.

    `more` is code that runs after the constants are set. It has the module as `lesson`, and may add routes
    to `app`.
    """
    name = lesson.rpartition(".")[2]
    place = Path(tempfile.mkdtemp(dir=folder()))
    (place / "changed").mkdir()
    code = MODULE.format(lesson=lesson, constants=constants, more=more)
    (place / "changed" / f"{name}.py").write_text(code)
    return with_options(uvicorn_command(f"changed.{name}:app"), "--app-dir", str(place))
