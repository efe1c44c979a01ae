"""Connect to a hosted PostgreSQL database: its URL, TLS, and its pooler."""

import asyncio
import os
from typing import Any

from sqlalchemy import text

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)

# Each server connection of PgBouncer has its own prepared statements, under
# names that its clients share.
WITHOUT_PREPARED_STATEMENTS: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}

connect = DBConnect.from_url(
    DATABASE_URL,
    os.environ.get("DATABASE_PASSWORD"),
    connect_args=WITHOUT_PREPARED_STATEMENTS
    if "BEHIND_PGBOUNCER" in os.environ
    else {},
    idle_timeout=60,
)


async def main() -> None:
    async with connect:
        await connect.wait_until_ready()
        async with new_db_session_ctx():
            session = await db_session(connect)
            print(await session.scalar(text("SELECT version()")))


if __name__ == "__main__":
    asyncio.run(main())
