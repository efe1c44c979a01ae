"""A batch job: import price lists, each in a transaction of its own."""

import asyncio
import logging
import os
import sys
from pathlib import Path

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///prices.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Price(Base):
    __tablename__ = "price"

    article: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]


async def import_prices(lines: list[str]) -> None:
    session = await db_session(connect)
    for line in lines:
        article, cents = line.split(",")
        await session.merge(Price(article=article, cents=int(cents)))


async def main(files: list[str]) -> int:
    failed = 0
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(
                Base.metadata.create_all
            )
        for file in files:
            try:
                lines = await asyncio.to_thread(read_lines, file)
                async with new_db_session_ctx():
                    await import_prices(lines)
            except Exception:
                logging.exception("Nothing was imported from %s", file)
                failed += 1
    return failed


def read_lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main(sys.argv[1:])) else 0)
