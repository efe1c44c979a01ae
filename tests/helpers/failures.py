"""Errors of PostgreSQL, each caused for real, and one that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect, db_session, new_non_ctx_session
from tests.helpers.database import Database, make_connect
from tests.helpers.models import Item
from tests.helpers.names import unique_name
from tests.helpers.postgres import free_port


async def error_of(work: Awaitable[Any]) -> BaseException:
    """Return what `work` raises."""
    try:
        await work
    except BaseException as error:
        return error
    pytest.fail("no error was raised")


async def fail_to_serialize(connect: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        for session in (one, two):
            await session.execute(text("SELECT count(*) FROM item"))
        for session in (one, two):
            await session.execute(text("INSERT INTO item (name) SELECT pg_backend_pid()::text"))
            await session.commit()


async def deadlock(connect: DBConnect, database: Database) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a'), ('b')")

    async def lock(session: AsyncSession, name: str) -> None:
        # Not a row: a SERIALIZABLE transaction fails to lock one that another has updated.
        await session.execute(text(f"SELECT pg_advisory_xact_lock({ord(name)})"))

    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await lock(one, "a")
        await lock(two, "b")
        results = await asyncio.gather(lock(one, "b"), lock(two, "a"), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result


async def fail_to_lock(connect: DBConnect, database: Database) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a')")
    lock = text("SELECT * FROM item FOR UPDATE NOWAIT")
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await one.execute(lock)
        await two.execute(lock)


async def be_terminated_between_statements(connect: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await database.terminate(await backend_of(session))
        await session.execute(text("SELECT 1"))


async def be_terminated_inside_a_statement(connect: DBConnect, database: Database) -> None:
    async def terminate() -> None:
        async with asyncio.timeout(30):
            while (pid := await database.pid_of("%pg_sleep%")) is None:
                await asyncio.sleep(0.001)
        await database.terminate(pid)

    async with new_non_ctx_session(connect) as session:
        terminating = asyncio.create_task(terminate())
        try:
            await session.execute(text("SELECT pg_sleep(20)"))
        finally:
            await terminating


async def be_refused(connect: DBConnect, _: Database) -> None:
    await connect_with(connect, port=free_port())


async def be_one_too_many(connect: DBConnect, database: Database) -> None:
    role = unique_name("context_async_sqlalchemy_limited")
    await database.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        await connect_with(connect, username=role)
    finally:
        await database.execute(f"DROP ROLE {role}")


async def connect_with(connect: DBConnect, **changes: Any) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    other = make_connect(connect.engine.url.set(**changes))
    try:
        async with new_non_ctx_session(other) as session:
            await session.connection()
    finally:
        await other.close()


async def backend_of(session: AsyncSession) -> int:
    pid = await session.scalar(text("SELECT pg_backend_pid()"))
    assert isinstance(pid, int)
    return pid


async def violate_a_constraint(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.execute(insert(Item), [{"name": "a"}, {"name": "a"}])


async def divide_by_zero(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1/0"))


async def commit_session_itself(connect: DBConnect) -> None:
    await (await db_session(connect)).commit()


class ConflictError(OperationalError):
    """A serialization failure, as SQLAlchemy wraps it."""

    def __init__(self, text: str = "") -> None:
        original = Exception(text)
        original.sqlstate = "40001"  # type: ignore[attr-defined]
        super().__init__("SELECT 1", {}, original)


class Failing:
    """Fails as often as it is told to, and counts."""

    def __init__(self, times: int, error: Callable[[], Exception] = ConflictError) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error()
