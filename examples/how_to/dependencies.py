"""A FastAPI application whose session is a dependency."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency

database = DBSessionDependency()
reports = DBSessionDependency()
Session = Annotated[AsyncSession, Depends(database)]
ReportSession = Annotated[AsyncSession, Depends(reports)]


class Base(DeclarativeBase):
    pass


class Member(Base):
    __tablename__ = "member"

    token: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    visits: Mapped[int] = mapped_column(default=0)


class Chore(Base):
    __tablename__ = "chore"

    title: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    url = os.environ.get("DATABASE_URL", "sqlite:///chores.db")
    password = os.environ.get("DATABASE_PASSWORD")
    await database.initialize(url, password, pool_size=5)
    await reports.initialize(
        url,
        password,
        isolation_level="SERIALIZABLE",
        manage_transactions=False,
        pool_size=2,
    )
    async with new_db_session_ctx():
        session = await db_session(database.connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yield
    await database.aclose()
    await reports.aclose()


app = FastAPI(lifespan=lifespan)


async def get_current_member(
    token: Annotated[str, Header()], session: Session
) -> Member:
    member = await session.get(Member, token)
    if member is None:
        raise HTTPException(401)
    member.visits += 1
    return member


CurrentMember = Annotated[Member, Depends(get_current_member)]


async def assign(title: str, owner: str) -> None:
    session = await db_session(database.connect)
    session.add(Chore(title=title, owner=owner))
    await session.flush()


@app.put("/members/{name}")
async def join(
    name: str, token: Annotated[str, Header()], session: Session
) -> None:
    session.add(Member(token=token, name=name))


@app.post("/chores/{title}", status_code=201)
async def add_chore(title: str, member: CurrentMember, session: Session) -> int:
    await assign(title, member.name)
    return len(
        (
            await session.scalars(select(Chore).filter_by(owner=member.name))
        ).all()
    )


@app.post("/reports/{owner}")
async def take_over(owner: str, session: ReportSession) -> int:
    async with session.begin():
        chores = (await session.scalars(select(Chore))).all()
        for chore in chores:
            chore.owner = owner
    return len(chores)
