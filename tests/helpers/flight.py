"""Connects whose BEGIN rides with the first statement, and what they send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from tests.helpers.proxy import Call, Fault, proxy

ONE = text("SELECT 1")
ADD = text("INSERT INTO item (name) VALUES (:name)")
ADD_NUMBER = text("INSERT INTO item (name) SELECT CAST(:number AS int)::text")
TRANSACTION = text("SELECT pg_current_xact_id()::text")

Trip = tuple[str, str]


class Wire:
    """What went over the wire: of each round trip, what rode with it as BEGIN, and its statement.

    Attributes:
        trips: The round trips since the last call of `start`.
        decide: Called at each; how it fails, or None.
    """

    def __init__(self) -> None:
        self.trips: list[Trip] = []
        self.decide: Callable[[Call], Any] = lambda _: None

    async def note(self, call: Call) -> Fault | None:
        self.trips.append((call.begin, call.statement))
        decided = self.decide(call)
        fault: Fault | None = await decided if asyncio.iscoroutine(decided) else decided
        return fault

    def start(self) -> None:
        self.trips.clear()


Flown = tuple[DBConnect, Wire]


@asynccontextmanager
async def opened(url: URL, **options: Any) -> AsyncGenerator[Flown]:
    """Open a connect with one connection, on which `warm` has prepared the statements."""
    wire = Wire()
    assert url.host is not None
    async with proxy(url.host, url.port or 5432, wire.note) as port:
        target = url.set(drivername="postgresql+asyncpg", host="127.0.0.1", port=port)
        given = {"pool_size": 1, "max_overflow": 0, "begin_with_first_statement": True}
        async with DBConnect.from_url(target, **(given | options)) as connect:
            await warm(connect)
            wire.start()
            yield connect, wire


async def warm(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        for statement, parameters in (
            (ONE, {}),
            (TRANSACTION, {}),
            (ADD, {"name": "a"}),
            (ADD_NUMBER, {"number": 1}),
        ):
            await session.execute(statement, parameters)
        await session.rollback()


async def driver_of(session: AsyncSession) -> Any:
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def is_one_transaction(session: AsyncSession) -> bool:
    first, second = [await session.scalar(TRANSACTION) for _ in range(2)]
    return bool(first == second)


async def is_plain(session: AsyncSession) -> bool:
    return type((await driver_of(session))._protocol) is asyncpg.protocol.Protocol


@asynccontextmanager
async def opened_directly(url: URL) -> AsyncGenerator[DBConnect]:
    async with DBConnect.from_url(url, pool_size=1, begin_with_first_statement=True) as connect:
        await warm(connect)
        yield connect
