"""Run migrations on the application's database."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.models import Base


def migrate(connection: Connection) -> None:
    context.configure(
        connection,
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite cannot alter a table: a new one
        transactional_ddl=True,  # on SQLite too: the default is False
    )
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    engine = await connect.create_engine()
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    finally:
        await engine.dispose()


asyncio.run(main())
