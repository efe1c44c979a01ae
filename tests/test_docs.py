"""What the documentation says of the tests is so, and its code is that of the examples."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
CHECKS = re.findall(r"^- `(\w+\.py)`: \*(.+)\*$", RELIABILITY, re.MULTILINE)

README = ROOT / "README.md"
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    """Return the Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


BLOCKS = [(page, code) for page in PAGES for code in blocks_of(page)]


def examples_of(page: Path) -> list[Path]:
    """Return the files under examples/ that a page names."""
    return [ROOT / name for name in re.findall(r"`(examples/[\w/]+\.py)`", page.read_text())]


def is_part_of(code: str, program: str) -> bool:
    """Return whether `code` is consecutive lines of `program`, perhaps dedented."""
    wanted, lines = code.splitlines(), program.splitlines()
    starts = range(len(lines) - len(wanted) + 1)
    parts = ("\n".join(lines[start : start + len(wanted)]) for start in starts)
    return any(textwrap.dedent(part).splitlines() == wanted for part in parts)


def test_every_promise_names_its_tests() -> None:
    assert len(CHECKS) == RELIABILITY.count(".py`: *")
    assert len(CHECKS) > 20


@pytest.mark.parametrize(("file", "sentence"), CHECKS)
def test_the_tests_that_are_named_exist(file: str, sentence: str) -> None:
    name = f"test_{sentence.replace(' ', '_')}("
    assert f"def {name}" in (TESTS / file).read_text()


@pytest.mark.parametrize(
    ("page", "code"), BLOCKS, ids=[f"{page.stem}-{n}" for n, (page, _) in enumerate(BLOCKS)]
)
def test_every_block_is_part_of_the_example_that_its_page_names_or_runs(
    page: Path, code: str
) -> None:
    if any(is_part_of(code, example.read_text()) for example in examples_of(page)):
        return
    assert page == README, "a block that is in none of the examples that this page names"
    exec(compile(code, str(page), "exec"), {"__name__": "readme"})


def test_every_block_is_found() -> None:
    # A fence of another kind, as an indented one, would hide its code from the test above.
    fences = sum(
        len(re.findall(r"^\s*(?:```|~~~)[ \t]*py", p.read_text(), re.MULTILINE)) for p in PAGES
    )
    assert len(BLOCKS) == fences
    assert len(blocks_of(README)) >= 3


@pytest.mark.parametrize("page", HOW_TO, ids=[page.stem for page in HOW_TO])
def test_every_how_to_shows_its_program(page: Path) -> None:
    assert examples_of(page)
    assert blocks_of(page)


def test_every_program_has_its_how_to() -> None:
    shown = {example for page in HOW_TO for example in examples_of(page)}
    programs = set((ROOT / "examples" / "how_to").glob("[!_]*.py"))
    assert shown >= programs
    assert len(programs) >= 5


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f():\n    a = 1\n", True),
        ("a = 1\nif a:\n    b = 2\n", True),  # dedented
        ("a = 1\n\nif a:\n", False),
        ("a = 2\n", False),
        ("def f():\na = 1\n", False),
        ("a = 1\nb = 2\n", False),  # a line left out
        ("f(", False),  # half a line
    ],
)
def test_a_block_that_differs_is_told(code: str, expected: bool) -> None:
    program = "def f():\n    a = 1\n    if a:\n        b = 2\n"
    assert is_part_of(code, program) is expected
