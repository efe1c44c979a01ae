"""Metrics of prometheus-fastapi-instrumentator, which see a commit that fails."""

import os

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///seats.db")
)


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "works_with_seat"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
# Before: what uses the session, such as a middleware that looks up the user.
add_fastapi_http_db_session_middleware(app)
# After: what observes the outcome.
Instrumentator(registry=CollectorRegistry()).instrument(app).expose(app)


@app.post("/seats/{number}", status_code=201)
async def book(number: int) -> None:
    session = await db_session(connect)
    session.add(
        Seat(number=number)
    )  # a seat that is taken is found by the commit
