"""What programs written for 2.1.9 share."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import (
    AsyncSession,
)

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
)
from tests.helpers.models import Item

MakeConnect = Callable[..., DBConnect]


async def add(connection: DBConnect, name: str) -> AsyncSession:
    session = await db_session(connection)
    await session.execute(insert(Item).values(name=name))
    return session
