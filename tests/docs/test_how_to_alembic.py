"""What the page on Alembic says of the migrations of `examples/sqlmodel_tasks`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from alembic import command
from alembic.config import Config
from alembic.script import Script
from alembic.util.exc import CommandError
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from tests.helpers.programs import ROOT, Outside
from tests.helpers.tasks_example import ALEMBIC, load_anew

MIGRATIONS = (ROOT / "examples/sqlmodel_tasks/migrations/env.py").parent
HEAD = '''"""{name}."""

from alembic import op

revision = "{name}"
down_revision = "first_tables"


'''


@pytest_asyncio.fixture
async def outside(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Outside]:
    load_anew(monkeypatch, DATABASE_URL=url, DATABASE_ECHO="false")
    yield Outside(url)
    await asyncio.to_thread(command.downgrade, ALEMBIC, "base")
    async with Outside(url).connection() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS alembic_version"))


@pytest.fixture
def revise(tmp_path: Path) -> Callable[[str, str], Config]:
    """Return a way to add a migration to a copy of those of the example."""
    directory = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, directory, ignore=shutil.ignore_patterns("__pycache__"))

    def revise(name: str, code: str) -> Config:
        (directory / "versions" / f"{name}.py").write_text(HEAD.format(name=name) + code)
        config = Config()
        config.set_main_option("script_location", str(directory))
        return config

    return revise


async def tables(outside: Outside) -> set[str]:
    async with outside.connection() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    return set(names) & {"user_account", "category", "task", "extra"}


async def test_migrations_of_which_one_fails_leave_nothing(
    outside: Outside, revise: Callable[[str, str], Config]
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
    outside: Outside, revise: Callable[[str, str], Config]
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
async def test_a_revision_is_generated_from_the_models(
    outside: Outside, revise: Callable[[str, str], Config]
) -> None:
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
