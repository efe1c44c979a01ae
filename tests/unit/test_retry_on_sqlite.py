"""Commits that are watched, and retries, on SQLite."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    on_commit,
    retry_on_transient_error,
)

TABLES = """
    CREATE TABLE parent (id INTEGER PRIMARY KEY);
    CREATE TABLE child (parent INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return an SQLite file with tables."""
    file = tmp_path / "retry.db"
    connection = sqlite3.connect(file)
    connection.executescript(TABLES)
    connection.close()
    return file


def rows_of(file: Path, table: str) -> list[int]:
    connection = sqlite3.connect(file)
    rows = [row[0] for row in connection.execute(f"SELECT * FROM {table}")]
    connection.close()
    return rows


async def test_a_commit_that_sqlite_refuses_raises_its_error_when_commits_are_watched(
    file: Path,
) -> None:
    called: list[str] = []
    async with DBConnect.from_url(f"sqlite:///{file}") as connect:

        @retry_on_transient_error(attempts=3)
        async def add_an_orphan() -> None:
            called.append("work")
            on_commit(connect, lambda: called.append("callback"))
            await (await db_session(connect)).execute(text("INSERT INTO child VALUES (7)"))

        with pytest.raises(IntegrityError, match="FOREIGN KEY constraint failed"):
            await add_an_orphan()
        with pytest.raises(IntegrityError):
            async with new_db_session_ctx():
                on_commit(connect, lambda: called.append("callback"))
                await (await db_session(connect)).execute(text("INSERT INTO child VALUES (7)"))
        assert connect.pool_status().checked_out == 0
    assert called == ["work"]
    assert rows_of(file, "child") == []


async def test_a_commit_for_which_sqlite_is_busy_is_repeated(file: Path) -> None:
    reader = sqlite3.connect(file, isolation_level=None)
    calls = 0
    options = {"timeout": 0.01}  # seconds to wait for the lock
    async with DBConnect.from_url(f"sqlite:///{file}", connect_args=options) as connect:

        @retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)
        async def add_a_parent() -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                # A reader lets others write, but not commit.
                reader.execute("BEGIN")
                reader.execute("SELECT * FROM parent").fetchall()
            else:
                reader.execute("ROLLBACK")
            await (await db_session(connect)).execute(text("INSERT INTO parent VALUES (1)"))

        await add_a_parent()
        assert connect.pool_status().checked_out == 0
    reader.close()
    assert calls == 2
    assert rows_of(file, "parent") == [1]


async def test_a_commit_for_which_sqlite_stays_busy_fails_in_the_end(file: Path) -> None:
    reader = sqlite3.connect(file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM parent").fetchall()
    calls = 0
    options = {"timeout": 0.01}
    async with DBConnect.from_url(f"sqlite:///{file}", connect_args=options) as connect:

        @retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)
        async def add_a_parent() -> None:
            nonlocal calls
            calls += 1
            await (await db_session(connect)).execute(text("INSERT INTO parent VALUES (1)"))

        with pytest.raises(OperationalError, match="database is locked"):
            await add_a_parent()
        assert connect.pool_status().checked_out == 0
    reader.close()
    assert calls == 3
    assert rows_of(file, "parent") == []
