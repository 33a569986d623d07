"""The diffs that the READMEs show. `python -m tests.diffs README.md` writes them anew.

A ```diff block begins with the names of two files:

    --- steps/step0_naive.py
    +++ steps/step1_keep_receiving.py

What follows is `diff -U1` of the two files below their docstrings, with the line numbers left out.
"""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?<=^```diff\n)--- (\S+)\n\+\+\+ (\S+)\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)


def without_docstring(source: str) -> str:
    """Return what is below the docstring. The docstrings of two steps have little in common."""
    end = ast.parse(source).body[0].end_lineno or 0
    return "".join(source.splitlines(keepends=True)[end:]).lstrip("\n")


def diff(old: str | Path, new: str | Path, context: int = 1) -> list[str]:
    """Compare two files below their docstrings, with `diff`. Leave out the line numbers."""
    with tempfile.NamedTemporaryFile("w") as before, tempfile.NamedTemporaryFile("w") as after:
        for file, path in (before, old), (after, new):
            file.write(without_docstring((ROOT / path).read_text()))
            file.flush()
        command = ["diff", f"-U{context}", before.name, after.name]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return ["@@" if line.startswith("@@ ") else line for line in lines[2:]]


def changes(old: str | Path, new: str | Path) -> list[str]:
    """Return the lines that were added or removed."""
    return [line for line in diff(old, new, context=0) if line != "@@"]


def refreshed(text: str) -> str:
    """Return the text of a page with every ```diff block as it should be."""

    def block(found: re.Match[str]) -> str:
        old, new = found.groups()
        return "\n".join([f"--- {old}", f"+++ {new}", *diff(old, new)]) + "\n"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(refreshed(Path(name).read_text()))
