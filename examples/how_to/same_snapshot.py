"""A report whose queries run at the same time, and agree with each other."""

import asyncio
import os

from fastapi import FastAPI
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    same_snapshot,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres")
)


class Base(DeclarativeBase):
    pass


class Sale(Base):
    __tablename__ = "sale"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]
    cents: Mapped[int]


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.post("/sales/{article}", status_code=201)
async def sell(article: str, cents: int) -> None:
    session = await db_session(connect)
    session.add(Sale(article=article, cents=cents))


async def total(session: AsyncSession) -> int:
    return (
        await session.scalar(select(func.coalesce(func.sum(Sale.cents), 0)))
        or 0
    )


async def by_article(session: AsyncSession) -> dict[str, int]:
    query = select(Sale.article, func.sum(Sale.cents)).group_by(Sale.article)
    return {row.article: row[1] for row in await session.execute(query)}


@app.get("/report")
async def report() -> tuple[int, dict[str, int]]:
    async with same_snapshot(connect, 2) as (first, second):
        return await asyncio.gather(total(first), by_article(second))
