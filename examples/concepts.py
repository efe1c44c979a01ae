"""The terms of the library in one program: two connects, contexts, sessions, settling.

Runs as `python -m examples.concepts`, on two SQLite files or the databases of two variables.
"""

import asyncio
import os

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    commit_all_sessions,
    db_session,
    new_db_session_ctx,
)

shop = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///shop.db"), pool_size=10
)
journal = DBConnect.from_url(
    os.environ.get("JOURNAL_URL", "sqlite:///journal.db")
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "concepts_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


class Entry(Base):
    __tablename__ = "concepts_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def place_order(article: str) -> None:
    session = await db_session(shop)
    session.add(Order(article=article))
    await write_down(f"{article} was ordered")


async def write_down(text: str) -> None:
    session = await db_session(journal)
    session.add(Entry(text=text))


async def place_both(first: str, second: str) -> None:
    async with new_db_session_ctx():
        await asyncio.gather(place_order(first), place_order(second))


async def place_each(*articles: str) -> None:
    async with new_db_session_ctx():
        for article in articles:
            await place_order(article)
            await (
                commit_all_sessions()
            )  # this order is stored, whatever comes next


async def main() -> None:
    async with shop, journal:
        async with new_db_session_ctx():
            for connect in (shop, journal):
                connection = await (await db_session(connect)).connection()
                await connection.run_sync(Base.metadata.create_all)
        await place_both("tea", "milk")
        await place_each("bread", "butter")


if __name__ == "__main__":
    asyncio.run(main())
