"""The same endpoint three times: by hand, with `Depends`, and with this library.

Run it with `uvicorn examples.comparison:app`; they are under /by-hand, /depends and /library.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user_account"

    name: Mapped[str] = mapped_column(primary_key=True)


connect = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite:///users.db"))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


app = FastAPI(lifespan=lifespan)


by_hand = FastAPI()


@by_hand.post("/users/{name}", status_code=201)
async def sign_up_by_hand(name: str) -> None:
    maker = await connect.session_maker()
    async with maker() as session, session.begin():
        await register_with(session, name)


async def register_with(session: AsyncSession, name: str) -> None:
    session.add(User(name=name))


depends = FastAPI()


async def get_session() -> AsyncGenerator[AsyncSession]:
    maker = await connect.session_maker()
    async with maker() as session, session.begin():
        yield session


@depends.post("/users/{name}", status_code=201)
async def sign_up_with_depends(
    name: str, session: Annotated[AsyncSession, Depends(get_session)]
) -> None:
    await register_with(session, name)


library = FastAPI()
add_fastapi_http_db_session_middleware(library)


@library.post("/users/{name}", status_code=201)
async def sign_up(name: str) -> None:
    await register(name)


async def register(name: str) -> None:
    session = await db_session(connect)
    session.add(User(name=name))


app.mount("/by-hand", by_hand)
app.mount("/depends", depends)
app.mount("/library", library)
