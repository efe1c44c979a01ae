"""Orders that are accepted again as soon as the standby is promoted."""

import os

from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.postgres import keep_on_primary

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)
HOSTS = os.environ.get("DATABASE_HOSTS", "127.0.0.1,127.0.0.2").split(",")
connect = DBConnect.from_url(
    DATABASE_URL,
    os.environ.get("DATABASE_PASSWORD"),
    before_create_session_handler=keep_on_primary(
        HOSTS, check_after=1, timeout=2
    ),
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "failover_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app, attempts=8)


@app.post("/orders/{article}", status_code=201)
async def place_order(article: str) -> None:
    session = await db_session(connect)
    session.add(Order(article=article))


# No handler here: the application must say when the host changes.
reports = DBConnect.from_url(DATABASE_URL, os.environ.get("DATABASE_PASSWORD"))


async def switch_over(host: str) -> None:
    await reports.change_host(host)
    await reports.wait_until_ready()
