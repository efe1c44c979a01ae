"""The fixtures for users' tests, imported, and under each plugin that runs async tests."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.testclient import TestClient

from context_async_sqlalchemy import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    pytest_plugin,
    run_in_new_ctx,
)
from context_async_sqlalchemy.pytest_plugin import (
    _open_context,
    client,
    db_context,
    shared_client,
    shared_session,
)
from tests.helpers.models import Base, Item
from tests.helpers.programs import ROOT, Outside
from tests.helpers.shared import Served, names_in

# Fixtures.
__all__ = ["_open_context", "client", "db_context", "shared_client", "shared_session"]

PROGRAM = ROOT / "examples" / "testing.py"
PAGE = ROOT / "docs" / "testing.md"

RUNS = {
    "as on the page": ("", []),
    "anyio alone": ("anyio", ["-c", os.devnull, "-p", "no:asyncio"]),
    "anyio beside pytest-asyncio": ("anyio", ["-c", os.devnull]),
    "pytest-asyncio alone": ("asyncio", ["-c", os.devnull, "-p", "no:anyio"]),
}
ANYIO = """
@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
"""


@pytest.fixture
def db_connect(tmp_path: Path) -> Generator[DBConnect]:
    """Return a connect to a database in which a test leaves nothing."""
    connect = DBConnect.from_url(f"sqlite:///{tmp_path / 'items.db'}")

    async def create() -> None:
        async with connect, new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Base.metadata.tables["item"].create)

    async def count() -> int | None:
        async with connect, new_non_ctx_atomic_session(connect) as session:
            return await session.scalar(select(func.count()).select_from(Item))

    asyncio.run(create())
    yield connect
    assert asyncio.run(count()) == 0


@pytest.fixture
def app(db_connect: DBConnect) -> Starlette:
    return Served(db_connect).app


async def test_the_session_sees_what_the_application_commits(
    shared_session: AsyncSession, db_connect: DBConnect
) -> None:
    await run_in_new_ctx(Served(db_connect).insert, "a")
    assert await names_in(shared_session) == ["a"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_each_test_of_a_sync_client_begins_anew(shared_client: TestClient, name: str) -> None:
    assert shared_client.get(f"/add/{name}").status_code == 200
    assert shared_client.get("/names/of").json() == [name]


async def test_a_client_is_ready(client: httpx.AsyncClient, shared_session: AsyncSession) -> None:
    assert (await client.get("/add/a")).status_code == 200
    assert await names_in(shared_session) == ["a"]


async def test_a_function_without_a_request_has_a_context(
    db_context: AsyncSession, db_connect: DBConnect
) -> None:
    await Served(db_connect).insert("a")
    assert await db_session(db_connect) is db_context
    assert await names_in(db_context) == ["a"]


async def test_tasks_of_a_function_share_the_session_of_its_context(
    db_context: AsyncSession, db_connect: DBConnect
) -> None:
    await asyncio.gather(*map(Served(db_connect).insert, "ab"))
    assert await names_in(db_context) == ["a", "b"]


@pytest.mark.parametrize("name", ["a", "b"])
async def test_what_the_context_of_a_test_has_committed_is_rolled_back(
    db_context: AsyncSession, shared_session: AsyncSession, db_connect: DBConnect, name: str
) -> None:
    await Served(db_connect).insert(name)
    await commit_db_session(db_connect)
    assert await names_in(shared_session) == [name]


async def test_the_context_of_a_test_ends_well_after_a_commit_that_failed(
    db_context: AsyncSession, db_connect: DBConnect
) -> None:
    await Served(db_connect).insert("a")
    await commit_db_session(db_connect)
    with pytest.raises(IntegrityError):
        await Served(db_connect).insert("a")


async def test_a_request_has_a_context_of_its_own(
    db_context: AsyncSession, client: httpx.AsyncClient, db_connect: DBConnect
) -> None:
    assert (await client.get("/add/a")).status_code == 200
    await db_context.rollback()
    assert await names_in(db_context) == ["a"]


async def test_where_a_test_lacks_a_context_the_error_names_the_fixture(
    db_connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContextNotInitiatedError, match="requests the fixture 'db_context'"):
        await db_session(db_connect)
    assert "db_context" not in str(ContextClosedError())
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(ContextNotInitiatedError) as error:
        await db_session(db_connect)
    assert "db_context" not in str(error.value)


def run_pytest(tests: Path, *options: str, url: str = "sqlite://", passes: bool = True) -> str:
    """Run the tests of a file in a process; return what pytest says."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(tests)]
    result = subprocess.run(
        command,
        cwd=tests if tests.is_dir() else tests.parent,
        env=os.environ | {"DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=140,
        check=False,
    )
    assert (result.returncode == 0) is passes, result.stdout
    return result.stdout


def configure(directory: Path) -> str:
    """Write the configuration that the page shows; return it."""
    (found,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    configuration: str = found
    (directory / "pyproject.toml").write_text(configuration)
    return configuration


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest.mark.parametrize(
    ("url", "run"),
    # Each plugin, and each kind of marker with a server.
    [*(("sqlite", run) for run in RUNS), *(("postgresql", run) for run in [*RUNS][::2])],
    indirect=["url"],
)
async def test_the_program_of_the_page_passes_under_each_plugin(
    url: str, tmp_path: Path, run: str
) -> None:
    configure(tmp_path)
    marker, options = RUNS[run]
    code = PROGRAM.read_text()
    if marker:
        # What the users of the plugin, or of its other mode, write for each test.
        code = re.sub(
            r"^async def test", f"@pytest.mark.{marker}\n\\g<0>", code, flags=re.MULTILINE
        )
    tests = tmp_path / "test_guests.py"
    tests.write_text(code + ANYIO)
    try:
        assert "7 passed" in run_pytest(tests, *options, url=url)
        assert await Outside(url).rows("SELECT name FROM testing_guest") == []
    finally:
        async with Outside(url).connection() as connection:
            await connection.exec_driver_sql("DROP TABLE IF EXISTS testing_guest")


SETTING = 'asyncio_default_fixture_loop_scope = "session"\n'


def test_without_the_setting_for_fixtures_the_loop_is_another_one(tmp_path: Path) -> None:
    configuration = configure(tmp_path)
    assert SETTING in configuration
    (tmp_path / "pyproject.toml").write_text(configuration.replace(SETTING, ""))
    tests = tmp_path / "test_guests.py"
    tests.write_text(PROGRAM.read_text())
    said = run_pytest(
        tests, "-k", "is_stored", url=f"sqlite:///{tmp_path / 'test.db'}", passes=False
    )
    assert "was opened on another event loop" in said
    assert "asyncio_default_fixture_loop_scope" in said


BEGIN = """
import sys
import pytest
from context_async_sqlalchemy import DBConnect, new_non_ctx_session

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]
connect = DBConnect.from_url("sqlite://")
"""
CONNECT = """
@pytest.fixture
def db_connect(): return connect
"""
MISTAKES = {
    "no_database": ("async def test(shared_session): ...", "def db_connect() -> DBConnect:"),
    "no_application": (f"{CONNECT}async def test(client): ...", "def app() -> FastAPI:"),
    "no_httpx": (
        f"""{CONNECT}
@pytest.fixture
def app(monkeypatch): monkeypatch.setitem(sys.modules, "httpx", None)
async def test(client): ...
""",
        "The fixture 'client' needs httpx: pip install httpx",
    ),
    # As with pytest-asyncio 0.24, where the context of an async fixture is its own.
    "no_context_variable": (
        f"""{CONNECT}
@pytest.fixture
def _open_context(): ...
async def test(db_context): ...
""",
        "with pytest-asyncio 0.25 or newer, or anyio 4.0 or newer",
    ),
    "no_transaction": (
        """
async def test():
    async with new_non_ctx_session(connect) as session:
        await session.connection()
""",
        "the fixture 'no_real_database' refuses that",
    ),
}


def test_each_mistake_is_told_and_a_client_of_ones_own_is_none(tmp_path: Path) -> None:
    configure(tmp_path)
    own = """
@pytest.fixture
def client(): return "mine"
async def test(client): assert client == "mine"
"""
    (tmp_path / "test_own.py").write_text(BEGIN + own)
    for mistake, (code, _) in MISTAKES.items():
        (tmp_path / f"test_{mistake}.py").write_text(BEGIN + code)
    said = run_pytest(tmp_path, passes=False)
    assert "1 failed, 1 passed, 4 errors" in said
    assert [mistake for mistake, (_, expected) in MISTAKES.items() if expected not in said] == []


def test_the_loop_of_a_test_that_has_ended_is_not_kept(db_connect: DBConnect) -> None:
    for _ in range(3):
        asyncio.run(pytest_plugin._close_with_loop(db_connect))
    assert not pytest_plugin._closing


def test_pytest_is_not_imported_by_the_package() -> None:
    code = "import sys, context_async_sqlalchemy.test_utils; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
