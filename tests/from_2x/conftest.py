"""What a user of 2.1.9 has in database.py."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import (
    DBConnect,
)
from tests.helpers.database import Database

MakeConnect = Callable[..., DBConnect]


@pytest_asyncio.fixture
async def make(database_url: URL, database: Database) -> AsyncGenerator[MakeConnect]:
    """Return what a user's database.py does; each connect is closed at the end."""
    made: list[DBConnect] = []

    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(database_url.set(host=host), future=True, pool_pre_ping=True)

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)

    def make(**options: Any) -> DBConnect:
        made.append(
            DBConnect(
                engine_creator=create_engine,
                session_maker_creator=create_session_maker,
                **{"host": database_url.host} | options,
            )
        )
        return made[-1]

    yield make
    for connection in made:
        await connection.close()


@pytest.fixture
def connection(make: MakeConnect) -> DBConnect:
    return make()
