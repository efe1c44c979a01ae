"""What the page on Alembic says of the migrations of `examples/sqlmodel_tasks`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio
from alembic import command
from alembic.config import Config
from alembic.script import Script
from alembic.util.exc import CommandError
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests.helpers.programs import ROOT, Outside
from tests.helpers.tasks_example import ALEMBIC, load_anew

MIGRATIONS = (ROOT / "examples/sqlmodel_tasks/migrations/env.py").parent
HEAD = '''"""{name}."""

from alembic import op

revision = "{name}"
down_revision = "{after}"


'''


# Tables in which a row refers to another one, and a change of the one that is referred to.
LIBRARY = """
def upgrade():
    op.execute("CREATE TABLE author (id INTEGER PRIMARY KEY, name VARCHAR)")
    op.execute("CREATE TABLE book (id INTEGER PRIMARY KEY, author INT REFERENCES author{ondelete})")
    op.execute("INSERT INTO author VALUES (1, 'ann'), (2, 'bob')")
    op.execute("INSERT INTO book VALUES (1, 1), (2, 1), (3, 2)")


def downgrade():
    op.drop_table("book")
    op.drop_table("author")
"""
CHANGE = """
import sqlalchemy


def alter(nullable):
    with op.batch_alter_table("author") as author:
        author.alter_column("name", existing_type=sqlalchemy.String(), nullable=nullable)


def upgrade():
    alter(False)


def downgrade():
    alter(True)
"""
FORGETS_BOOKS = """
def upgrade():
    op.execute("INSERT INTO author VALUES (3, 'cid')")
    op.execute("DELETE FROM author WHERE id = 1")
"""


class Revise(Protocol):
    def __call__(self, name: str, code: str, after: str = ...) -> Config: ...


@pytest_asyncio.fixture
async def outside(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Outside]:
    load_anew(monkeypatch, DATABASE_URL=url, DATABASE_ECHO="false")
    yield Outside(url)
    await asyncio.to_thread(command.downgrade, ALEMBIC, "base")
    async with Outside(url).connection() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS alembic_version"))


@pytest.fixture
def revise(tmp_path: Path) -> Revise:
    """Return a way to add a migration to a copy of those of the example."""
    directory = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, directory, ignore=shutil.ignore_patterns("__pycache__"))

    def revise(name: str, code: str, after: str = "first_tables") -> Config:
        head = HEAD.format(name=name, after=after)
        (directory / "versions" / f"{name}.py").write_text(head + code)
        config = Config()
        config.set_main_option("script_location", str(directory))
        return config

    return revise


async def tables(outside: Outside) -> set[str]:
    async with outside.connection() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    return set(names) & {"user_account", "category", "task", "extra"}


async def test_migrations_of_which_one_fails_leave_nothing(
    outside: Outside, revise: Revise
) -> None:
    config = revise(
        "fails",
        "def upgrade():\n    op.execute('CREATE TABLE extra (a INT)'); op.execute('oops')\n",
    )
    with pytest.raises(DBAPIError, match="oops"):
        await asyncio.to_thread(command.upgrade, config, "head")
    assert await tables(outside) == set()
    await asyncio.to_thread(command.upgrade, ALEMBIC, "head")
    assert await tables(outside) == {"user_account", "category", "task"}


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_an_index_is_made_concurrently_in_an_autocommit_block(
    outside: Outside, revise: Revise
) -> None:
    config = revise(
        "concurrently",
        "def upgrade():\n"
        "    with op.get_context().autocommit_block():\n"
        "        op.create_index('extra', 'task', ['title'], postgresql_concurrently=True)\n\n\n"
        "def downgrade():\n"
        "    op.drop_index('extra')\n",
    )
    await asyncio.to_thread(command.upgrade, config, "head")
    names = await outside.rows("SELECT indexname FROM pg_indexes WHERE tablename = 'task'")
    assert "extra" in names
    await asyncio.to_thread(command.downgrade, config, "first_tables")


@pytest.mark.parametrize("ondelete", ["", " ON DELETE CASCADE", " ON DELETE SET NULL"])
async def test_a_change_of_a_table_leaves_the_rows_that_refer_to_it(
    outside: Outside, revise: Revise, ondelete: str
) -> None:
    revise("library", LIBRARY.format(ondelete=ondelete))
    config = revise("change", CHANGE, "library")
    await asyncio.to_thread(command.upgrade, config, "library")
    try:
        await asyncio.to_thread(command.upgrade, config, "change")
        assert await outside.rows("SELECT author FROM book ORDER BY id") == [1, 1, 2]
        with pytest.raises(IntegrityError):
            await outside.rows("INSERT INTO author VALUES (4, NULL)")
        await asyncio.to_thread(command.downgrade, config, "library")
        assert await outside.rows("SELECT author FROM book ORDER BY id") == [1, 1, 2]
        assert await outside.rows("SELECT name FROM author ORDER BY id") == ["ann", "bob"]
    finally:
        await asyncio.to_thread(command.downgrade, config, "first_tables")


@pytest.mark.parametrize("ondelete", ["", " ON DELETE NO ACTION"])
async def test_a_migration_that_leaves_rows_without_what_they_refer_to_is_rolled_back(
    outside: Outside, revise: Revise, ondelete: str
) -> None:
    revise("library", LIBRARY.format(ondelete=ondelete))
    config = revise("forgets", FORGETS_BOOKS, "library")
    await asyncio.to_thread(command.upgrade, config, "library")
    try:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key constraint"):
            await asyncio.to_thread(command.upgrade, config, "forgets")
        assert await outside.rows("SELECT name FROM author ORDER BY id") == ["ann", "bob"]
        assert await outside.rows("SELECT version_num FROM alembic_version") == ["library"]
    finally:
        await asyncio.to_thread(command.downgrade, config, "first_tables")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # the other one has other tables, too
async def test_check_fails_unless_the_migrations_make_what_the_models_say(
    outside: Outside,
) -> None:
    await asyncio.to_thread(command.upgrade, ALEMBIC, "head")
    await asyncio.to_thread(command.check, ALEMBIC)
    async with outside.connection() as connection:
        await connection.execute(text("ALTER TABLE task ADD COLUMN extra INT"))
    with pytest.raises(CommandError, match="New upgrade operations detected"):
        await asyncio.to_thread(command.check, ALEMBIC)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it would drop those other tables
async def test_a_revision_is_generated_from_the_models(outside: Outside, revise: Revise) -> None:
    await asyncio.to_thread(command.upgrade, ALEMBIC, "head")
    async with outside.connection() as connection:
        await connection.execute(text("DROP INDEX ix_task_deliveries_left"))
        await connection.execute(text("DROP TABLE task"))
    config = revise("empty", "def upgrade():\n    pass\n")
    (Path(str(config.get_main_option("script_location"))) / "versions/empty.py").unlink()
    script = await asyncio.to_thread(command.revision, config, "the tasks again", autogenerate=True)
    assert isinstance(script, Script)
    code = await asyncio.to_thread(Path(script.path).read_text)
    assert "create_table" in code
    assert "sqlmodel.sql.sqltypes.AutoString(length=200)" in code
    assert "name=op.f('pk_task')" in code
    await asyncio.to_thread(command.upgrade, config, "head")
    assert await tables(outside) == {"user_account", "category", "task"}
    await asyncio.to_thread(command.downgrade, config, "first_tables")
    await asyncio.to_thread(command.stamp, ALEMBIC, "base")
    async with outside.connection() as connection:
        for table in "category", "user_account":
            await connection.execute(text(f"DROP TABLE {table}"))
