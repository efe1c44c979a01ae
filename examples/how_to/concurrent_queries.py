"""A page whose queries run at the same time, each on a connection of its own."""

import asyncio
import os
from typing import Annotated

from fastapi import FastAPI, Query
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///visits.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "page_visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str]


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


async def count_visits() -> int:
    session = await db_session(connect)
    return await session.scalar(select(func.count(Visit.id))) or 0


async def list_pages(limit: int) -> list[str]:
    session = await db_session(connect)
    pages = (
        select(Visit.page)
        .group_by(Visit.page)
        .order_by(func.count().desc(), Visit.page)
    )
    return list(await session.scalars(pages.limit(limit)))


@app.get("/dashboard")
async def dashboard() -> tuple[int, list[str]]:
    return await asyncio.gather(
        run_in_new_ctx(count_visits),
        run_in_new_ctx(list_pages, limit=3),
    )


@app.post("/visits/{page}")
async def visit(page: str) -> tuple[int, list[str]]:
    session = await db_session(connect)
    session.add(Visit(page=page))
    await commit_db_session(
        connect
    )  # the queries see the visit, and no connection is held
    return await dashboard()


async def count_of(page: str) -> int:
    async with new_non_ctx_session(connect) as session:
        query = select(func.count(Visit.id)).where(Visit.page == page)
        return await session.scalar(query) or 0


at_once = asyncio.Semaphore(3)


async def count_in_turn(page: str) -> int:
    async with at_once:
        return await count_of(page)


Pages = Annotated[str, Query(pattern="^[^,]+(,[^,]+){0,19}$")]  # at most 20


@app.get("/counts")
async def counts(pages: Pages) -> list[int]:
    return await asyncio.gather(
        *(count_in_turn(page) for page in pages.split(","))
    )
