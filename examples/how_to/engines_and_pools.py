"""From a URL to a pool: the password, the limits, startup and health."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    PoolStatus,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)
connect = DBConnect.from_url(
    DATABASE_URL,
    os.environ.get("DATABASE_PASSWORD"),
    pool_size=5,
    max_overflow=5,
    pool_timeout=3,
    session_options={"autoflush": False},
)


async def fetch_token() -> str:
    return os.environ["DATABASE_TOKEN"]  # ask your identity service here


with_token = DBConnect.from_url(
    DATABASE_URL, connect_args={"password": fetch_token}
)


async def fetch_secret() -> str:
    return os.environ["DATABASE_SECRET"]  # ask your vault here


async def create_engine(host: str) -> AsyncEngine:
    url = make_url(DATABASE_URL).set(drivername="postgresql+asyncpg", host=host)
    return create_async_engine(
        url.set(password=await fetch_secret()), pool_size=2
    )


with_secret = DBConnect(create_engine, async_sessionmaker, host="127.0.0.1")


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with connect, with_token, with_secret:
        await connect.wait_until_ready(attempts=30, delay=1)
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(
                Base.metadata.create_all
            )
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.get("/ready")
async def ready(response: Response) -> PoolStatus:
    try:
        await connect.ping(timeout=2)
    except Exception:
        response.status_code = 503
    return connect.pool_status()


@app.post("/visits/{page}", status_code=201)
async def visit(page: str) -> None:
    session = await db_session(connect)
    session.add(Visit(page=page))
