"""Requests that read are one round trip for each SELECT."""

import os
from collections.abc import Sequence

from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///visits.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "read_visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str]


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app, read_only_methods={"GET", "HEAD"})


@app.post("/visits/{page}", status_code=201)
async def visit(page: str) -> None:
    session = await db_session(connect)
    session.add(Visit(page=page))


@app.get("/visits")
async def visits() -> Sequence[str]:
    session = await db_session(connect)
    return (await session.scalars(select(Visit.page).limit(20))).all()
