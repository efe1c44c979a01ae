"""A copy of a connect, as an object for settings makes one, is a connect of its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from tests.helpers.database import Database

Copy = Callable[[DBConnect], DBConnect]


class Settings(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    connect: DBConnect = DBConnect.from_url("sqlite://")


@pytest.fixture(params=[copy.copy, copy.deepcopy])
def duplicate(request: pytest.FixtureRequest) -> Copy:
    function: Copy = request.param
    return function


async def test_what_is_written_to_a_copy_is_not_stored_in_the_original(
    duplicate: Copy, tmp_path: Path
) -> None:
    made: list[str] = []

    async def handler(connect: DBConnect) -> None:
        made.append(connect.context_key)

    def create_engine(host: str) -> Any:
        return create_async_engine(f"sqlite+aiosqlite:///{tmp_path / host}")

    maker = async_sessionmaker[AsyncSession]
    one = DBConnect(create_engine, maker, "a", handler, leak_detection_threshold=20)
    async with one:
        await one.session_maker()
        async with duplicate(one) as other:
            assert (other.host, other.leak_detection_threshold) == ("a", 20)
            assert other.engine is None
            await other.change_host("b")
            assert one.host == "a"
            async with new_db_session_ctx():
                for connect in one, other:
                    session = await db_session(connect)
                    assert connect.host is not None
                    await session.execute(text(f"CREATE TABLE {connect.host} (a INT)"))
            for connect in one, other:
                async with new_db_session_ctx():
                    session = await db_session(connect)
                    names = await session.scalars(text("SELECT name FROM sqlite_master"))
                    assert list(names) == [connect.host]
    assert made[:3] == [one.context_key, one.context_key, other.context_key]
    assert one.context_key != other.context_key


async def test_a_copy_of_a_connect_from_a_url_knows_its_url(
    duplicate: Copy, database_url: URL, database: Database
) -> None:
    async with DBConnect.from_url(database_url) as one:
        await one.ping()
        async with duplicate(duplicate(one)) as other:
            await other.ping()
            assert other.engine is not one.engine
            assert other.pool_status().checked_in == 1
        assert one.engine is not None
    async with DBConnect.from_url("sqlite://") as one, duplicate(one) as other:
        await other.ping()


async def test_settings_may_have_a_connect() -> None:
    first, second = Settings(), Settings()
    assert first.model_copy(deep=True).connect.context_key != first.connect.context_key
    await second.connect.ping()
    await second.connect.close()


def test_a_subclass_is_copied_with_its_attributes(duplicate: Copy) -> None:
    class Named(DBConnect[AsyncSession]):
        name = "none"

    one = Named(lambda _: create_async_engine("sqlite+aiosqlite://"), async_sessionmaker, "h")
    one.name = "orders"
    other = duplicate(one)
    assert isinstance(other, Named)
    assert other.name == "orders"


def test_a_connect_is_copied_once_in_an_object_that_has_it_twice() -> None:
    connect = DBConnect.from_url("sqlite://")
    one, other = copy.deepcopy([connect, connect])
    assert one is other
    assert one is not connect


def test_a_connect_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="a DBConnect cannot be pickled: make one in each process"):
        pickle.dumps(DBConnect.from_url("sqlite://"))
