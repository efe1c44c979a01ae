"""Tests of an application, each in a transaction that is rolled back at the end."""

import asyncio
import os
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///test_guests.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "how_to_guest"

    name: Mapped[str] = mapped_column(primary_key=True)


guests = FastAPI()
add_fastapi_http_db_session_middleware(guests)


@guests.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "there already"}, status_code=409)


@guests.post("/guests/{name}", status_code=201)
async def invite(name: str) -> None:
    session = await db_session(connect)
    session.add(Guest(name=name))


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    async def create() -> None:
        async with connect, new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(Base.metadata.create_all)

    asyncio.run(create())


# The rest of conftest.py

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


@pytest.fixture
def db_connect() -> DBConnect:
    return connect


@pytest.fixture
def app() -> FastAPI:
    return guests


# With httpx


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(name="client")
async def make_client(
    app: FastAPI, shared_session: AsyncSession
) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.anyio
async def test_a_guest_is_stored(client: httpx.AsyncClient, shared_session: AsyncSession) -> None:
    assert (await client.post("/guests/ann")).status_code == 201
    assert list(await shared_session.scalars(select(Guest.name))) == ["ann"]


@pytest.mark.anyio
async def test_a_guest_is_invited_once(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    shared_session.add(Guest(name="ann"))
    await shared_session.commit()
    assert (await client.post("/guests/ann")).status_code == 409
    assert (await client.post("/guests/bob")).status_code == 201
    names = await shared_session.scalars(select(Guest.name).order_by(Guest.name))
    assert list(names) == ["ann", "bob"]


# With Starlette's TestClient


def test_a_guest_is_invited_once_by_a_sync_client(shared_client: TestClient) -> None:
    assert shared_client.post("/guests/ann").status_code == 201
    assert shared_client.post("/guests/ann").status_code == 409
