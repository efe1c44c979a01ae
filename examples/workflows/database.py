"""The database, and the application's lifespan that creates and closes it."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from examples.workflows.models import Base

connect = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite:///workflows.db"))


@asynccontextmanager
async def lifespan(_: object) -> AsyncGenerator[None]:
    """Create the tables at startup; close the connections at shutdown.

    Args:
        _: The application, as frameworks pass it.
    """
    async with connect:
        await create_tables()
        yield


async def create_tables() -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)
