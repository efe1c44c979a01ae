"""The steps of the tutorial, served, and their own tests, in copies that see nothing else."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import NullPool, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.helpers.database import server_url
from tests.helpers.names import unique_name
from tests.helpers.programs import ROOT, Outside, until
from tests.helpers.serving import http_client

TUTORIAL = ROOT / "examples" / "tutorial"
COMPLETE = TUTORIAL / "complete"
STARTED = (ROOT / "docs" / "getting-started.md").read_text()
TESTING = (ROOT / "docs" / "testing.md").read_text()
STEPS = sorted(path.name for path in TUTORIAL.glob("step*"))

FIRST = "examples.tutorial.step1_model.app"
SERVICES = "examples.tutorial.step2_services.app"
ERRORS = "examples.tutorial.step3_errors.app"
AFTER = "examples.tutorial.step4_after.app"
TESTS = "examples.tutorial.step5_tests.app"  # the same application: see below
COPIED = "examples.tutorial.complete.library.app"

WITH_LOANS = [SERVICES, ERRORS, AFTER, COPIED]
WITH_ERRORS = WITH_LOANS[1:]
WITH_MAIL = WITH_LOANS[2:]

# What the tests of the application to copy import, and what Alembic runs.
RUN_IN_THE_COPY = {
    "examples/tutorial/complete/migrations/env.py",
    "examples/tutorial/complete/migrations/versions/first_tables.py",
    "examples/tutorial/complete/tests/conftest.py",
}

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"]

DUNE = {"isbn": "9780441013593", "title": "Dune"}
LOAN = "/books/9780441013593/loan"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[str]:
    """Return the URL of a database without any table."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
        return
    name = unique_name("context_async_sqlalchemy_tutorial")

    async def run(statement: str) -> None:
        engine = create_async_engine(server_url(), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text(statement))

    asyncio.run(run(f"CREATE DATABASE {name}"))
    yield server_url().set(database=name).render_as_string(hide_password=False)
    asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


class Copy:
    """A copy of the directory of the tutorial, outside the repository."""

    def __init__(self, path: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "*.db")
        shutil.copytree(TUTORIAL, path, ignore=ignored)
        self.path = path

    async def run(self, directory: str, *arguments: str, **environment: str) -> str:
        """Run Python in a directory of the copy; return what it prints."""
        inherited = {name: os.environ[name] for name in os.environ if "DATABASE_URL" not in name}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            cwd=self.path / directory,
            env=inherited
            # Of pytest's plugins, the reader has no other than that of PYTEST.
            | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, output.decode()
        return output.decode()


async def tables(url: str) -> list[str]:
    async with Outside(url).connection() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    return sorted(names)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "tutorial")


@pytest_asyncio.fixture
async def client(
    request: pytest.FixtureRequest, url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the application of a step, which has the book Dune."""
    monkeypatch.setenv("DATABASE_URL", url)
    package = request.param.removesuffix(".app")
    for name in list(sys.modules):
        if name.startswith(package):
            monkeypatch.delitem(sys.modules, name)
    app: Any = importlib.import_module(request.param)
    if request.param == COPIED:  # its migrations make the same tables: see below
        models: Any = importlib.import_module(f"{package}.models")
        async with Outside(url).connection() as connection:
            await connection.run_sync(models.Base.metadata.create_all)
    async with http_client(app.app, log_level="critical") as client:
        assert (await client.post("/books", json=DUNE)).status_code == 201
        yield client
        assert app.connect.pool_status().checked_out == 0
    assert app.connect.engine is None, "the application has not closed its connect"


@pytest.mark.parametrize("client", [FIRST, TESTS, *WITH_LOANS], indirect=True)
async def test_a_book_is_stored_and_listed(client: httpx.AsyncClient, url: str) -> None:
    assert await Outside(url).rows("SELECT isbn, title FROM book") == [tuple(DUNE.values())]
    [book] = (await client.get("/books")).json()
    assert DUNE.items() <= book.items()


@pytest.mark.parametrize("client", [FIRST, SERVICES], indirect=True)
async def test_a_duplicate_is_a_server_error_before_the_page_on_errors(
    client: httpx.AsyncClient, url: str
) -> None:
    assert (await client.post("/books", json=DUNE)).status_code == 500
    assert await Outside(url).rows("SELECT title FROM book") == ["Dune"]


@pytest.mark.parametrize("client", WITH_ERRORS, indirect=True)
async def test_a_duplicate_is_a_conflict_after_it(client: httpx.AsyncClient, url: str) -> None:
    response = await client.post("/books", json={**DUNE, "title": "Another"})
    assert response.status_code == 409
    assert response.json() == {"detail": "book 9780441013593 is there already"}
    assert await Outside(url).rows("SELECT title FROM book") == ["Dune"]


@pytest.mark.parametrize("client", WITH_LOANS, indirect=True)
async def test_a_loan_and_its_count_are_stored_together_or_not_at_all(
    client: httpx.AsyncClient, url: str
) -> None:
    assert (await client.post(LOAN, params={"reader": "ann"})).status_code == 201
    refused = await client.post(LOAN, params={"reader": "bob"})
    assert refused.status_code in (409, 500)
    assert await Outside(url).rows("SELECT reader FROM loan") == ["ann"]
    assert await Outside(url).rows("SELECT times_lent FROM book") == [1]
    assert (await client.delete(LOAN)).status_code == 204
    assert (await client.delete(LOAN)).status_code == 404
    assert await Outside(url).rows("SELECT reader FROM loan") == []


@pytest.mark.parametrize("client", WITH_MAIL, indirect=True)
async def test_readers_are_told_of_what_is_committed(
    client: httpx.AsyncClient, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def mails() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.module == "mail"]

    assert (await client.post(LOAN, params={"reader": "ann"})).status_code == 201
    assert (await client.post(LOAN, params={"reader": "bob"})).status_code == 409
    assert mails() == ["'ann': Enjoy Dune"]
    assert (await client.post("/reminders")).status_code == 202
    await until(lambda: mails()[1:] == ["'ann': Please return 9780441013593"])
    assert await Outside(url).rows("SELECT reminded FROM loan") == [True]


async def test_the_tests_of_every_step_pass_in_a_copy_each_in_a_file_of_its_own(
    copy: Copy,
) -> None:
    output = await copy.run(".", *PYTEST, *STEPS)
    assert "31 passed" in output
    files = sorted(path.name for path in copy.path.glob("*.db"))
    assert files == [f"test_{step.partition('_')[0]}.db" for step in STEPS]


@pytest.mark.parametrize(
    ("directory", "passed", "url"),
    # The plugin that rolls back is the same: one of them on each database.
    [("step5_tests", 11, "sqlite"), ("complete", 14, "postgresql")],
    indirect=["url"],
)
async def test_the_tests_of_the_last_step_and_of_the_application_leave_no_row(
    directory: str, passed: int, copy: Copy, url: str
) -> None:
    output = await copy.run(directory, *PYTEST, TEST_DATABASE_URL=url)
    assert f"{passed} passed" in output
    for table in "book", "loan":
        assert await Outside(url).rows(f"SELECT * FROM {table}") == []


SETTINGS = [
    *re.findall(r"```toml\n(\[tool.pytest.*?)```", f"{STARTED}{TESTING}", re.DOTALL),
    (TUTORIAL / "pyproject.toml").read_text(),
    (COMPLETE / "pyproject.toml").read_text(),
]
CONFTESTS = [
    "quickstart_conftest.py",
    "testing.py",
    *(f"tutorial/{step}/conftest.py" for step in STEPS),
    "tutorial/complete/tests/conftest.py",
]


def test_tests_are_set_up_alike_wherever_a_reader_goes() -> None:
    first, *others = (tomllib.loads(text)["tool"]["pytest"]["ini_options"] for text in SETTINGS)
    assert len(others) == 3
    assert all(first.items() <= settings.items() for settings in others)
    for name in CONFTESTS:
        code = (ROOT / "examples" / name).read_text()
        fixtures = re.findall(r"^@pytest.fixture.*\n(?:async )?def (\w+)", code, re.MULTILINE)
        assert fixtures[:3] == ["db_connect", "app", "tables"]
        assert set(fixtures[3:]) <= {"book"}
        assert '\npytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]\n' in code


MIGRATE = """
from alembic import command
from alembic.config import Config
config = Config("alembic.ini")
command.upgrade(config, "head")
command.check(config)
"""
CHANGE = """
import pytest
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
config = Config("alembic.ini")
with pytest.raises(CommandError, match="New upgrade operations detected"):
    command.check(config)
command.revision(config, "shelves", autogenerate=True)
command.upgrade(config, "head")
command.check(config)
command.downgrade(config, "base")
"""


async def test_the_migrations_make_the_tables_of_the_models_and_unmake_them(
    copy: Copy, url: str
) -> None:
    await copy.run("complete", "-c", MIGRATE, DATABASE_URL=url)
    assert await tables(url) == ["alembic_version", "book", "loan"]
    title = "    title: Mapped[str]\n"
    models = copy.path / "complete" / "library" / "models.py"
    code = models.read_text()
    models.write_text(code.replace(title, f"{title}    shelf: Mapped[str | None]\n"))
    await copy.run("complete", "-c", CHANGE, DATABASE_URL=url)
    assert await tables(url) == ["alembic_version"]


def test_the_application_to_copy_is_the_last_step() -> None:
    last = TUTORIAL / "step5_tests"
    assert {path.name for path in (COMPLETE / "library").glob("*.py")} == {
        path.name for path in last.glob("*.py") if not path.name.startswith(("test_", "conftest"))
    }
    for name in "services.py", "mail.py":
        assert (COMPLETE / "library" / name).read_text() == (last / name).read_text()
    for name in "app.py", "database.py", "mail.py", "models.py", "services.py":
        assert (last / name).read_text() == (TUTORIAL / "step4_after" / name).read_text()


def test_the_readme_of_the_application_names_what_is_there() -> None:
    readme = (COMPLETE / "README.md").read_text()
    for path in (COMPLETE / "library").glob("[!_]*.py"):
        assert f"`library/{path.name}`" in readme
    for name in RUN_IN_THE_COPY:
        assert (ROOT / name).exists()
