"""Every lesson can be copied out: it stands alone, says what it needs, and the ladder lists it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.kit.root import ROOT

LESSONS = sorted((ROOT / "lessons").glob("*.py"))
FILES = [*sorted(ROOT.glob("*.py")), *LESSONS]
OURS = {path.stem for path in [*ROOT.glob("*.py"), *LESSONS]} | {"bench", "lessons", "tests"}


def listed(file: Path) -> dict[str, Requirement]:
    """What a requirements.txt lists, by name, and the files that it includes."""
    found = {}
    for line in file.read_text().splitlines():
        line = line.partition(" #")[0].strip()
        if line.startswith("-r "):
            found.update(listed(file.parent / line.removeprefix("-r ")))
        elif line:
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = requirement
    return found


def block(lesson: Path) -> dict[str, object]:
    """Its PEP 723 block, read as that document says."""
    [found] = re.finditer(
        r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", lesson.read_text()
    )
    assert found["type"] == "script"
    lines = found["content"].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def dependencies(lesson: Path) -> list[Requirement]:
    needed = block(lesson)["dependencies"]
    assert isinstance(needed, list)
    return [Requirement(line) for line in needed]


def installed_with(requirements: list[Requirement]) -> set[str]:
    """The names of all distributions that come with these."""
    todo, seen = list(requirements), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            for line in requires(name) or []:
                further = Requirement(line)
                extras = ["", *requirement.extras]
                if not further.marker or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                    todo.append(further)
    return {name for name, *_ in seen}


def imports(lesson: Path) -> Iterator[str]:
    """The top-level modules that it imports."""
    for node in ast.walk(ast.parse(lesson.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            yield (node.module or "").partition(".")[0]


def test_the_table_lists_every_lesson() -> None:
    """Each row of lessons/README.md links to a file and to its page."""
    readme = (ROOT / "lessons" / "README.md").read_text()
    rows = re.findall(r"^\| .* \| \[`(\S+)`\]\((\S+)\) \| .* \| \[\S+\]\((\S+)\) \|$", readme, re.MULTILINE)
    files = [*LESSONS, ROOT / "multiproc_server.py"]
    assert sorted(name for name, _, _ in rows) == sorted(file.name for file in files)
    for name, file, page in rows:
        assert Path(file).name == name
        assert (ROOT / "lessons" / file).exists()
        assert (ROOT / "lessons" / page).exists()
        assert Path(page).stem == Path(name).stem


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[slb]*/*.md"), ROOT / ".github" / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """It leads to a file, or to a heading of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in LINK.findall(text):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_requirements_list_what_the_lessons_need() -> None:
    """lessons/requirements.txt lists nothing else."""
    needed = {canonicalize_name(needs.name) for lesson in LESSONS for needs in dependencies(lesson)}
    assert needed == listed(ROOT / "lessons" / "requirements.txt").keys()


@pytest.mark.parametrize("lesson", FILES, ids=lambda lesson: lesson.name)
def test_the_dependencies_in_a_file_are_complete(lesson: Path) -> None:
    """Its PEP 723 block agrees with requirements.txt, and covers its imports."""
    assert block(lesson)["requires-python"] == ">=3.11"
    known = [listed(path / "requirements.txt") for path in (ROOT, ROOT / "lessons")]
    needed = dependencies(lesson)
    for needs in needed:
        assert needs in [packages.get(canonicalize_name(needs.name)) for packages in known]
    present = installed_with(needed)
    distributions = packages_distributions()
    for module in set(imports(lesson)) - sys.stdlib_module_names:
        assert present & {canonicalize_name(name) for name in distributions.get(module, [])}, module
    if "uvicorn" in present:
        assert "websockets" in present, "uvicorn needs it for websockets"


@pytest.mark.parametrize("lesson", FILES, ids=lambda lesson: lesson.name)
def test_a_lesson_stands_alone(lesson: Path) -> None:
    """It imports no other file of the project."""
    assert not set(imports(lesson)) & OURS
