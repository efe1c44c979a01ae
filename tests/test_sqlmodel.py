"""SQLModel's session, as the class of the sessionmaker."""

from __future__ import annotations

from pathlib import Path

from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


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
