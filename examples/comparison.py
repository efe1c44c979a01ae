"""The same endpoint three times: by hand, with `Depends`, and with this library.

Run it with `uvicorn examples.comparison:app`; they are under /by-hand, /depends and /library.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///users.db")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user_account"

    name: Mapped[str] = mapped_column(primary_key=True)


engine = create_async_engine(DATABASE_URL)
session_maker = async_sessionmaker(engine)
connect = DBConnect.from_url(DATABASE_URL)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with database_lifespan(connect, create_tables=Base.metadata)(app):
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


by_hand = FastAPI()


@by_hand.post("/users/{name}", status_code=201)
async def sign_up_by_hand(name: str) -> None:
    async with session_maker() as session, session.begin():
        await register_with(session, name)


async def register_with(session: AsyncSession, name: str) -> None:
    session.add(User(name=name))


depends = FastAPI()


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with session_maker() as session, session.begin():
        yield session


@depends.post("/users/{name}", status_code=201)
async def sign_up_with_depends(
    name: str,
    session: Annotated[AsyncSession, Depends(get_session)],
) -> None:
    session.add(User(name=name))


library = FastAPI()
add_fastapi_http_db_session_middleware(library)


@library.post("/users/{name}", status_code=201)
async def sign_up(name: str) -> None:
    session = await db_session(connect)
    session.add(User(name=name))


app.mount("/by-hand", by_hand)
app.mount("/depends", depends)
app.mount("/library", library)
