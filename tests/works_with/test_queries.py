"""Packages that are given the session of the request, or of a test: pages, filters, factories."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from fastapi_filter import FilterDepends
from fastapi_filter.contrib.sqlalchemy import Filter
from fastapi_pagination import Page, add_pagination
from fastapi_pagination.ext.sqlalchemy import apaginate
from polyfactory.factories.sqlalchemy_factory import SQLAlchemyFactory
from pydantic import BaseModel, ConfigDict
from sqlalchemy import insert, select

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.serving import http_client


class ItemRead(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str


class ItemFilter(Filter):
    name__like: str | None = None
    order_by: list[str] | None = None

    class Constants(Filter.Constants):
        model = Item


async def test_a_page_is_read_with_the_session_of_the_request(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/items/{name}")
    async def post_item(name: str) -> Page[ItemRead]:
        session = await db_session(connect)
        await session.execute(insert(Item).values(name=name))
        page: Page[ItemRead] = await apaginate(session, select(Item).order_by(Item.id))
        if name == "bad":
            raise RuntimeError
        return page

    add_pagination(app)
    async with http_client(app, log_level="critical") as client:
        for name in "one", "two":
            assert (await client.post(f"/items/{name}")).status_code == 200
        assert (await client.post("/items/bad")).status_code == 500
        page = (await client.post("/items/three?size=2&page=2")).json()
    assert (page["items"], page["total"]) == ([{"name": "three"}], 3)
    assert await database.names() == ["one", "two", "three"]


async def test_a_filter_is_applied_by_the_session_of_the_request(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/items")
    async def post_items(wanted: Annotated[ItemFilter, FilterDepends(ItemFilter)]) -> list[str]:
        session = await db_session(connect)
        session.add_all(Item(name=name) for name in ("pea", "pear", "plum"))
        items = await session.scalars(wanted.sort(wanted.filter(select(Item))))
        return [item.name for item in items]

    async with http_client(app) as client:
        answer = await client.post("/items?name__like=pea%25&order_by=-name")
        assert (answer.status_code, answer.json()) == (200, ["pear", "pea"])
        assert (await client.post("/items?order_by=nothing")).status_code == 422
    assert await database.names() == ["pea", "pear", "plum"]


async def test_a_factory_stores_what_the_requests_of_a_test_find(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.get("/items")
    async def get_items() -> list[str]:
        session = await db_session(connect)
        return list(await session.scalars(select(Item.name).order_by(Item.id)))

    async with shared_transaction(connect) as session:

        class ItemFactory(SQLAlchemyFactory[Item]):
            __async_session__ = session

        item = await ItemFactory.create_async(name="one")
        await ItemFactory.create_batch_async(2)
        async with http_client(app) as client:
            names: list[Any] = (await client.get("/items")).json()
        assert item.name == "one"
        assert "one" in names
        assert len(names) == 3
    assert await database.names() == []
