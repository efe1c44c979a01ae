"""The work of a request: the same statements for every contender."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

if TYPE_CHECKING:
    import asyncpg

Step: TypeAlias = Callable[[Any], Awaitable[int]]
"""A child coroutine of a request, which gets the session (of raw asyncpg: the connection)."""

BACKGROUND_SECONDS = 5.0
BODY_PARTS, BODY_PART = 64, b"x" * 65_536  # 4 MiB
CREATE = """
    DROP TABLE IF EXISTS bench_entry, bench_counter;
    CREATE TABLE bench_entry (id serial PRIMARY KEY, name text NOT NULL);
    CREATE TABLE bench_counter (id integer PRIMARY KEY, value integer NOT NULL);
    INSERT INTO bench_entry (name) VALUES ('first');
    INSERT INTO bench_counter VALUES (1, 0);
"""
DROP = "DROP TABLE bench_entry, bench_counter"


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """A row for each INSERT."""

    __tablename__ = "bench_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Counter(Base):
    """A row to load and change."""

    __tablename__ = "bench_counter"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


class Gate:
    """Holds requests, so that they can be measured in flight."""

    def __init__(self) -> None:
        self.waiting = 0
        self.is_open = asyncio.Event()


gate = Gate()  # made anew for each use


async def read(session: AsyncSession) -> int:
    return len((await session.execute(select(Entry.name).where(Entry.id == 1))).scalar_one())


async def write(session: AsyncSession) -> int:
    await session.execute(insert(Entry).values(name="another"))
    return 1


async def read_and_write(session: AsyncSession) -> int:
    return await read(session) + await write(session)


async def change(session: AsyncSession) -> int:
    counter = await session.get_one(Counter, 1)
    counter.value += 1
    await session.flush()
    return counter.value


async def wait(_: object) -> int:
    gate.waiting += 1
    await gate.is_open.wait()
    return 0


STEPS: dict[str, tuple[Step, ...]] = {
    "select": (read,),
    "insert": (write,),
    "five": (read_and_write, read_and_write, read),
    "change": (change,),
    "wait": (wait,),
}
"""What each route does with its session: one after the other, in coroutines of their own."""

ROUTES = ("nothing", "select", "insert", "five", "change")
"""The routes that are measured: all but the one that only waits."""


# The statements that SQLAlchemy sends for them.
SELECT = "SELECT bench_entry.name \nFROM bench_entry \nWHERE bench_entry.id = $1::INTEGER"
INSERT = "INSERT INTO bench_entry (name) VALUES ($1::VARCHAR) RETURNING bench_entry.id"
LOAD = (
    "SELECT bench_counter.id, bench_counter.value \nFROM bench_counter \n"
    "WHERE bench_counter.id = $1::INTEGER"
)
UPDATE = "UPDATE bench_counter SET value=$1::INTEGER WHERE bench_counter.id = $2::INTEGER"


async def raw_read(connection: asyncpg.Connection) -> int:
    return len(await connection.fetchval(SELECT, 1))


async def raw_write(connection: asyncpg.Connection) -> int:
    await connection.fetchval(INSERT, "another")
    return 1


async def raw_read_and_write(connection: asyncpg.Connection) -> int:
    return await raw_read(connection) + await raw_write(connection)


async def raw_change(connection: asyncpg.Connection) -> int:
    row = await connection.fetchrow(LOAD, 1)
    value: int = row["value"] + 1
    await connection.execute(UPDATE, value, 1)
    return value


RAW_STEPS: dict[Step, Step] = {
    read: raw_read,
    write: raw_write,
    read_and_write: raw_read_and_write,
    change: raw_change,
    wait: wait,
}
"""What raw asyncpg does for each step of the others."""


async def body() -> AsyncGenerator[bytes]:
    for _ in range(BODY_PARTS):
        yield BODY_PART


async def sleep() -> None:
    await asyncio.sleep(BACKGROUND_SECONDS)
