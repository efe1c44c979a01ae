"""SQLModel's session, as the class of the sessionmaker."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, assert_type

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.orm import selectinload
from sqlmodel import Field, Relationship, SQLModel, func, select
from sqlmodel.ext.asyncio.session import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from tests.helpers.serving import http_client


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


class Team(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    members: list["Member"] = Relationship()


class Member(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    team_id: int | None = Field(default=None, foreign_key="team.id")


async def test_asking_whether_the_database_answers_warns_of_nothing(tmp_path: Path) -> None:
    connect = DBConnect.from_url(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with connect:
        await connect.ping()
        await connect.wait_until_ready()


async def test_the_session_of_a_context_is_that_of_sqlmodel(tmp_path: Path) -> None:
    connect = DBConnect.from_url(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(SQLModel.metadata.create_all)
            session.add(Hero(name="Deadpond"))
        async with new_db_session_ctx():
            session = await db_session(connect)
            hero = (await session.exec(select(Hero))).one()
    assert hero.name == "Deadpond"


async def test_exec_is_typed_and_what_it_replaces_warns(tmp_path: Path) -> None:
    connect = DBConnect.from_url(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with connect, new_db_session_ctx():
        async with atomic_db_session(connect) as session:
            await (await session.connection()).run_sync(SQLModel.metadata.create_all)
            session.add(Hero(name="Deadpond"))
        session = await db_session(connect)
        assert_type((await session.exec(select(Hero))).one(), Hero)
        assert_type((await session.exec(select(Hero.name))).one(), str)
        row = (await session.exec(select(Hero.name, func.count()).group_by(Hero.name))).one()
        assert tuple(row) == ("Deadpond", 1)
        for method in session.execute, session.scalars:
            with pytest.warns(DeprecationWarning, match=r"exec\(\)"):
                await method(select(Hero))


def test_a_table_does_not_validate() -> None:
    assert Hero.model_validate({"name": "Deadpond"}).name == "Deadpond"
    assert Hero(name=None).name is None  # type: ignore[arg-type]


async def test_the_dependency_yields_the_session_of_sqlmodel(tmp_path: Path) -> None:
    dependency = DBSessionDependency[AsyncSession]()
    app = FastAPI()

    @app.get("/")
    async def is_of_sqlmodel(session: Annotated[Any, Depends(dependency)]) -> bool:
        of_context = await db_session(dependency.connect)
        assert_type(of_context, AsyncSession)
        return of_context is session and isinstance(session, AsyncSession)

    await dependency.initialize(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with http_client(app) as client:
        assert (await client.get("/")).json() is True
    await dependency.aclose()


async def test_a_relationship_is_loaded_with_its_query(tmp_path: Path) -> None:
    connect = DBConnect.from_url(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(SQLModel.metadata.create_all)
            session.add(Team(name="Preventers", members=[Member(name="Rusty")]))
        async with new_db_session_ctx():
            loaded = select(Team).options(selectinload(Team.members))  # type: ignore[arg-type]
            team = (await (await db_session(connect)).exec(loaded)).one()
            assert [member.name for member in team.members] == ["Rusty"]


async def test_a_block_around_the_session_of_a_context_leaves_it_open(tmp_path: Path) -> None:
    connect = DBConnect.from_url(
        f"sqlite:///{tmp_path / 'heroes.db'}", session_options={"class_": AsyncSession}
    )
    async with connect:
        async with new_db_session_ctx():
            async with await db_session(connect) as session:
                assert_type(session, AsyncSession)
                await (await session.connection()).run_sync(SQLModel.metadata.create_all)
                session.add(Hero(name="Deadpond"))
            with suppress(KeyError):
                async with atomic_db_session(connect) as session, session:
                    session.add(Hero(name="Rusty-Man"))
                    raise KeyError
        async with new_db_session_ctx(), await db_session(connect) as session:
            assert (await session.exec(select(Hero.name))).all() == ["Deadpond"]
