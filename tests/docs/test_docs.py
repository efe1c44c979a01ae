"""What the documentation says of the tests is so, and its code is that of the examples."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import shlex
import textwrap
import tomllib
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
THREATS = (ROOT / "docs" / "threat-model.md").read_text()
PROMISES = RELIABILITY + THREATS
CHECKS = re.findall(r"^ *- `(?:tests/)?([\w/]+\.py)`: \*(.+)\*$", PROMISES, re.MULTILINE)

README = ROOT / "README.md"
HOME = ROOT / "docs" / "index.md"
STARTED = ROOT / "docs" / "getting-started.md"
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))


# In a tab, it is indented.
FENCE = re.compile(
    r"^(?P<indent> *)(?:```|~~~)(?P<kind>[^\n]*)\n(?P<code>.*?)^(?P=indent)(?:```|~~~)$",
    re.DOTALL | re.MULTILINE,
)


def fences_of(page: Path) -> list[tuple[str, str]]:
    """Return the kind and the code of each block of a page."""
    fences = FENCE.finditer(page.read_text())
    return [(fence["kind"], textwrap.dedent(fence["code"])) for fence in fences]


def blocks_of(page: Path) -> list[str]:
    """Return the Python code of a page, block by block."""
    return [code for kind, code in fences_of(page) if kind == "python"]


BLOCKS = [(page, code) for page in PAGES for code in blocks_of(page)]


def examples_of(page: Path) -> list[Path]:
    """Return the files under examples/ that a page names."""
    return [ROOT / name for name in re.findall(r"`(examples/[\w/]+\.py)`", page.read_text())]


def diff(old: Path, new: Path) -> list[str]:
    """Return all lines of two files, with those that differ marked."""
    before, after = (file.read_text().splitlines() for file in (old, new))
    lines = [*difflib.unified_diff(before, after, n=len(before), lineterm="")]
    return [line.rstrip() for line in lines[3:]]


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


def test_the_code_of_a_page_fits_beside_its_menus() -> None:
    too_long = [
        (page.name, line) for page, code in BLOCKS for line in code.splitlines() if len(line) > 80
    ]
    assert too_long == []


def test_every_block_is_found() -> None:
    # A fence of another kind, such as `py`, would hide its code from the test above.
    fences = sum(
        len(re.findall(r"^\s*(?:```|~~~)[ \t]*py", p.read_text(), re.MULTILINE)) for p in PAGES
    )
    assert len(BLOCKS) == fences
    assert len(BLOCKS) > 50


FENCES = [(page, *fence) for page in [*PAGES, *EXAMPLES] for fence in fences_of(page)]
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
    kinds = {"python", "diff", "sh", "sql", "toml", "html", ""}
    assert {kind for _, kind, _ in FENCES} <= kinds


DIFFS = [(page, shown) for page, kind, shown in FENCES if kind == "diff"]


@pytest.mark.parametrize(
    ("page", "shown"), DIFFS, ids=[f"{page.stem}-{n}" for n, (page, _) in enumerate(DIFFS)]
)
def test_a_diff_is_part_of_that_of_two_examples_which_its_page_names_in_this_order(
    page: Path, shown: str
) -> None:
    named = list(dict.fromkeys(examples_of(page)))
    diffs = [diff(old, new) for old, new in combinations(named, 2)]
    wanted = shown.splitlines()
    starts = [(lines, start) for lines in diffs for start in range(len(lines))]
    assert any(lines[start : start + len(wanted)] == wanted for lines, start in starts)
    assert {line[:1] for line in wanted} & {"+", "-"}
    assert [line for line in wanted if len(line) > 81] == []  # 80, and the mark


@pytest.mark.parametrize(("page", "line"), [*COMMANDS, *INLINE])
def test_what_a_command_names_exists(
    page: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVIRONMENT", "development")  # for what it imports
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:  # the environment
        words = words[1:]
    match words:
        case [] | [
            "curl" | "alembic" | "cd" | "cp" | "docker" | "export" | "tasks" | "tasks()",
            *_,
        ]:
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
            if page == STARTED:
                module = f"examples.{module}"
            elif module.startswith("library."):  # in the copy of an application
                module = f"examples.tutorial.complete.{module}"
            assert hasattr(importlib.import_module(module), application)
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


def modules_of(path: Path) -> set[str]:
    """Return the modules under examples/ that a module imports, or names in a string."""
    found = set()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=module, names=names, level=1):
                inside = f"{package}.{module}" if module else package
                found |= {inside, *(f"{inside}.{name.name}" for name in names)}
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
    waiting = set().union(*(modules_of(test) for test in tests))
    run: set[Path] = set(tests)
    while waiting:
        path = ROOT / waiting.pop().replace(".", "/")
        for file in (path.with_suffix(".py"), path / "__init__.py", path / "__main__.py"):
            if file.exists() and file not in run:
                run.add(file)
                waiting |= modules_of(file)
    named = {example for page in PAGES for example in examples_of(page)}
    assert named - run == set()
    assert len(named) > 20


def sections_of(page: Path) -> dict[str, str]:
    """Return what is under each heading of a page, with the links that the README would have."""
    text = page.read_text()
    if page != README:
        text = re.sub(r"\]\((?!http)", "](docs/", text)
    _, *rest = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))


def test_the_readme_is_the_short_form_of_the_home_page() -> None:
    readme, home = sections_of(README), sections_of(HOME)
    assert list(readme) == list(home)
    differ = [title for title in readme if readme[title] != home[title]]
    assert differ == ["Where to go"]  # the README has it as a table


def test_the_home_page_is_read_in_two_minutes() -> None:
    assert len(FENCE.sub("", HOME.read_text()).split()) <= 450


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(links) > 40


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
