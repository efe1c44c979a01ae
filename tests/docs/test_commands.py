"""Every command of a page is run as its reader would: where there is nothing yet."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.helpers.database import new_database
from tests.helpers.reader_shell import FILES, WORKERS, Place, needs_postgresql
from tests.helpers.readers import PAGES, ROOT, Reader, Step, readers_of, steps_of

# What is not run here, and why.
EXCEPTIONS = {
    r"\bmake \w|^docker \w": "CI runs the targets that take no minutes; a test has no container",
    r"^python -m benchmarks\b": "in the environment of `make bench`, which takes minutes",
}
# A page that says to do first what another says.
CONTINUED = {"examples/worker/README.md": "examples/sqlmodel_tasks/README.md"}
# Where a page comes to the servers of its reader's own.
END = "ENVIRONMENT=production"

UV = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
OLDEST = (ROOT / "tests" / "oldest.txt").read_text().split()

runs_commands = pytest.mark.skipif(
    f"sqlalchemy=={version('sqlalchemy')}" in OLDEST,
    reason="a reader installs what is newest, whichever versions are tested",
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def without_exceptions(reader: Reader) -> Reader:
    """Return the reader without what is not run."""

    def is_run(step: Step) -> bool:
        return bool(step.file) or not any(re.search(pattern, step.text) for pattern in EXCEPTIONS)

    return Reader(reader.page, list(filter(is_run, reader.steps)), reader.tabs)


def continued(page: Path) -> Path | None:
    """Return the page that says what to do before this one, if this one does not.

    That is the README of the application that it copies, or the first page of a tutorial.
    """
    if name := CONTINUED.get(name_of(page)):
        return ROOT / name
    readers = readers_of(page)
    commands = readers[0].commands if readers else []
    if not commands or readers[0].is_installed:
        return None
    copied = re.match(r"cp -r (examples/\S+) ", commands[0])
    other = ROOT / copied[1] / "README.md" if copied else page.parent / "index.md"
    return other if other.exists() and other not in (page, ROOT / "docs" / "index.md") else None


def with_what_comes_first(reader: Reader) -> Reader:
    """Return the reader, having done what another page says, if this one builds on it."""
    if (other := continued(reader.page)) is None:
        return reader
    first = readers_of(other)[0].steps
    ends = [number for number, step in enumerate(first) if END in step.text]
    first = first[: ends[0]] if ends else first
    return Reader(reader.page, first + [step for step in reader.steps if step not in first])


ALL = [without_exceptions(with_what_comes_first(r)) for page in PAGES for r in readers_of(page)]
WORK = [[(step.text, step.file) for step in reader.steps] for reader in ALL]


def is_done_by_another(number: int) -> bool:
    """Return whether another reader begins with all that this one does."""
    mine = WORK[number]
    return any(
        work[: len(mine)] == mine and (len(work), other) > (len(mine), number)
        for other, work in enumerate(WORK)
    )


READERS = [r for n, r in enumerate(ALL) if r.commands and not is_done_by_another(n)]
IDS = [f"{name_of(reader.page)}-{number}" for number, reader in enumerate(READERS)]
QUICKSTART = 'pip install ".[fastapi,sqlite]" uvicorn\nuvicorn examples.quickstart:app'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Generator[Place]:
    """Return a place to read in, with a copy of the repository and the wheel of the project."""
    assert UV is not None, "uv is not installed: it is in the dependency group `test`"
    directory = tmp_path_factory.mktemp("readers")
    repository = directory / "repository"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, repository / name)
    build = [UV, "build", "--quiet", "--wheel", "--out-dir", str(directory / "published")]
    subprocess.run(build, cwd=repository, check=True)
    (wheel,) = (directory / "published").glob("*.whl")
    yield Place(directory, repository, wheel, UV)
    shutil.rmtree(directory)


@pytest.fixture
def empty_database() -> Generator[URL]:
    """Return the URL of a database without tables."""
    with new_database("reader") as url:
        yield url


def check(reader: Reader, printed: str) -> None:
    """Check that each request was answered, and not with an error that its page does not name."""
    pages = [reader.page, continued(reader.page) or reader.page]
    said = "".join(page.read_text() for page in pages)
    answers = re.findall(r"^answered (\d+)$", printed, re.MULTILINE)
    failed = [status for status in answers if not "200" <= status < "400"]
    unsaid = [status for status in failed if not re.search(rf"\b{status}\b", said)]
    assert unsaid == [], printed


@runs_commands
@pytest.mark.parametrize("reader", READERS, ids=IDS)
def test_a_reader_can_do_what_a_page_says(
    reader: Reader, place: Place, request: pytest.FixtureRequest
) -> None:
    needed = needs_postgresql(reader)
    database = request.getfixturevalue("empty_database") if needed else None
    check(reader, place.read(reader, database))


@runs_commands
def test_the_first_reader_needs_only_python_and_pip(place: Place) -> None:
    readers = readers_of(ROOT / "README.md")
    check(readers[0], place.read(without_exceptions(readers[0]), None, with_pip=True))


def test_every_exception_is_still_on_a_page() -> None:
    commands = [step.text for page in PAGES for step in steps_of(page.read_text()) if not step.file]
    for pattern in [*EXCEPTIONS, *map(re.escape, [*WORKERS, *FILES])]:
        assert any(re.search(pattern, command) for command in commands), pattern
    for page, other in CONTINUED.items():
        assert readers_of(ROOT / page)
        assert any(END in command for command in readers_of(ROOT / other)[0].commands)


def test_every_command_is_done_by_a_reader() -> None:
    for page in PAGES:
        steps = set(steps_of(page.read_text()))
        assert {step for reader in readers_of(page) for step in reader.steps} == steps
    assert len(READERS) > 30


def readers_in(page: str, tmp_path: Path) -> list[list[str]]:
    """Return what each reader of a page does."""
    file = tmp_path / "page.md"
    file.write_text(page)
    return [[step.file or step.text for step in reader.steps] for reader in readers_of(file)]


TABS = """
Before all, `make a`.

Save this as `a.py`, and run `uvicorn a:app`:

=== "One"

    Code of the first tab:

    ```python
    app = 1
    ```

    ```sh
    pip install ".[one]"
    ```

=== "Two"

    ```python
    app = 2
    ```

    ```sh
    pip install ".[two]"
    ```

    Save this as `b.py`, and run `uvicorn b:app`:

    ```python
    app = 1
    ```

Then `pip` knows it, and `uvicorn --port` does not run.

```sh
curl localhost:8000
```

=== "One"

    Run `python -m one`.

=== "Two"

    Run `python -m two`, or `python -m …`.

```sh
pip install three
```
"""


def test_what_stands_in_a_tab_is_for_its_reader_and_the_rest_for_all(tmp_path: Path) -> None:
    one, two = readers_in(TABS, tmp_path)
    first = ["make a", "a.py", "uvicorn a:app"]
    rest = ["curl localhost:8000", "python -m one", "pip install three"]
    assert one == ['pip install ".[one]"', *first, *rest]
    rest[1] = "python -m two"
    assert two == ['pip install ".[two]"', *first, "b.py", "uvicorn b:app", *rest]


@runs_commands
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("uvicorn examples.quickstart:app", "uvicorn: command not found"),
        ("python -m examples.no_such_module", "No module named examples.no_such_module"),
        ('pip install ".[sqlite]" uvicorn\nuvicorn examples.quickstart:app', "'fastapi'"),
        (f"{QUICKSTART}\nuvicorn examples.quickstart:wrong", 'Attribute "wrong" not found'),
        (f"{QUICKSTART}\ncurl -s localhost:8000/wrong", "answered 404"),
        ("curl -s localhost:8000", "answered 000"),
        ("export a=$(curl -s localhost:8000 | tr -d x)", "answered 000"),
    ],
)
def test_a_command_that_is_wrong_is_told(
    command: str, message: str, place: Place, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{command}\n```\n")
    (reader,) = readers_of(page)
    with pytest.raises(AssertionError, match=message):
        check(reader, place.read(reader, None))
