"""What the documentation says of the tests is so, and its code is that of the examples."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest

import context_async_sqlalchemy
from context_async_sqlalchemy import (
    fastapi_utils,
    postgres,
    pytest_plugin,
    starlette_utils,
    test_utils,
)
from tests.helpers.public import public_names

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
THREATS = (ROOT / "docs" / "threat-model.md").read_text()
PROMISES = RELIABILITY + THREATS
CHECKS = re.findall(r"^- `(?:tests/)?([\w/]+\.py)`: \*(.+)\*$", PROMISES, re.MULTILINE)

README = ROOT / "README.md"
HOME = ROOT / "docs" / "index.md"
STARTED = ROOT / "docs" / "getting-started.md"
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))


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
    assert len(CHECKS) == PROMISES.count(".py`: *")
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
    assert page in (README, HOME, STARTED), "a block that is in no example that this page names"
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


def test_every_block_is_found() -> None:
    # A fence of another kind, as an indented one, would hide its code from the test above.
    fences = sum(
        len(re.findall(r"^\s*(?:```|~~~)[ \t]*py", p.read_text(), re.MULTILINE)) for p in PAGES
    )
    assert len(BLOCKS) == fences
    assert len(BLOCKS) > 50


FENCE = re.compile(r"^(?:```|~~~)([^\n]*)\n(.*?)^(?:```|~~~)$", re.DOTALL | re.MULTILINE)
FENCES = [
    (page, *fence) for page in [*PAGES, *EXAMPLES] for fence in FENCE.findall(page.read_text())
]
COMMANDS = [
    (page, line) for page, kind, code in FENCES if kind == "sh" for line in code.splitlines()
]
INLINE = [
    (page, " ".join(command.split()))  # which may be broken over a line
    for page in [*PAGES, *EXAMPLES, ROOT / "CHANGELOG.md"]
    for command in re.findall(r"`(pip\s+install\s[^`]+)`", FENCE.sub("", page.read_text()))
]


def test_a_block_is_of_a_kind_that_is_checked() -> None:
    # Without a name it is what a program prints, or a message of PostgreSQL's.
    assert {kind for _, kind, _ in FENCES} <= {"python", "sh", "sql", "toml", "html", ""}


@pytest.mark.parametrize(("page", "line"), [*COMMANDS, *INLINE])
def test_what_a_command_names_exists(
    page: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVIRONMENT", "development")  # for what it imports
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:  # the environment
        words = words[1:]
    match words:
        case [] | ["curl" | "alembic" | "cd" | "docker" | "export" | "tasks" | "tasks()", *_]:
            pass
        case ["pip", "install", *packages]:
            extras = set(re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", line))))
            assert packages
            assert extras <= set(PROJECT["project"]["optional-dependencies"])
            if "--group" in packages:
                assert '\npip install "pip>=25.1"\n' in page.read_text()
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["uvicorn" | "gunicorn", name, *_]:
            module, _, application = name.partition(":")
            places = [f"examples.{module}"] if page == STARTED else [module]
            assert hasattr(importlib.import_module(places[0]), application)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths if not path.startswith("-"))
        case _:
            pytest.fail(f"{line!r} is of no kind that is checked")


def test_one_place_says_how_to_install_what_is_published() -> None:
    # Until it is, that name is another code base's: a reader would get that one.
    pages = [page for page, line in [*COMMANDS, *INLINE] if PROJECT["project"]["name"] in line]
    assert pages == [STARTED]
    assert len(INLINE) > 20


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.parent.name)
def test_a_readme_names_what_its_example_needs_of_the_others(page: Path) -> None:
    sources = "".join(file.read_text() for file in page.parent.rglob("*.py"))
    needed = set(re.findall(r"\bexamples\.(\w+)", sources)) - {page.parent.name}
    assert needed - set(re.findall(r"\.\./(\w+)", page.read_text())) == set()


def modules_of(source: str) -> set[str]:
    """Return the modules under examples/ that a module imports, or names in a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found |= {module, *(f"{module}.{name.name}" for name in names)}
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case ast.Constant(value=str(value)):
                name = value.partition(" ")[0].partition(":")[0]
                name = name.removesuffix(".py").replace("/", ".")  # Alembic takes a path
                # `load` and `load_program` take the name of a how-to's program.
                found |= {name, f"examples.{name}", f"examples.how_to.{name}"}
    return {name for name in found if name.startswith("examples.")}


def test_every_example_that_a_page_names_is_run_by_a_test() -> None:
    tests = [*TESTS.rglob("*.py"), *(ROOT / "examples").rglob("test_*.py")]
    waiting = set().union(*(modules_of(test.read_text()) for test in tests))
    run: set[Path] = set(tests)
    while waiting:
        path = ROOT / waiting.pop().replace(".", "/")
        for file in (path.with_suffix(".py"), path / "__init__.py", path / "__main__.py"):
            if file.exists() and file not in run:
                run.add(file)
                waiting |= modules_of(file.read_text())
    named = {example for page in PAGES for example in examples_of(page)}
    assert named - run == set()
    assert len(named) > 20


def sections_of(page: Path) -> dict[str, str]:
    """Return what is under each heading of a page, with the links that the README would have."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    if page != README:
        text = re.sub(r"\]\((?!http)", "](docs/", text)
    _, *rest = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))


def test_the_readme_is_the_short_form_of_the_home_page() -> None:
    readme, home = sections_of(README), sections_of(HOME)
    assert home["context-async-sqlalchemy"].startswith(readme["context-async-sqlalchemy"])
    same = {"The promise", "How it compares", "See it work", "Applications to copy"}
    assert {title: readme[title] for title in same} == {title: home[title] for title in same}
    assert readme.keys() - same - home.keys() == {"A complete application", "Documentation"}
    more = {"The same by hand", "The same with `Depends`", "Where to go"}
    assert home.keys() - readme.keys() == more


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(links) > 40


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    modules = [context_async_sqlalchemy, starlette_utils, test_utils, postgres, pytest_plugin]
    for module in modules:
        for name in public_names(module):
            assert f"::: {module.__name__}.{name}\n" in page + "\n", name
    for name in set(fastapi_utils.__all__) - set(starlette_utils.__all__):
        assert name in page, name


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
