"""Tests of an application, each in a transaction that is rolled back at the end."""

import os

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect, commit_db_session, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.observability import assert_queries

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///test_guests.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "testing_guest"

    name: Mapped[str] = mapped_column(primary_key=True)
    seat: Mapped[int] = mapped_column(default=0)


async def invite(name: str) -> Guest:
    guest = Guest(name=name)
    (await db_session(connect)).add(guest)
    return guest


async def seat(name: str, number: int) -> None:
    session = await db_session(connect)
    (await session.get_one(Guest, name)).seat = number


guests = FastAPI(
    lifespan=database_lifespan(connect, create_tables=Base.metadata)
)
add_fastapi_http_db_session_middleware(guests)


@guests.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "there already"}, status_code=409)


@guests.post("/guests/{name}", status_code=201)
async def post_guest(name: str) -> None:
    await invite(name)


@guests.put("/guests/{name}/seat/{number}", status_code=204)
async def put_seat(name: str, number: int) -> None:
    await seat(name, number)


# conftest.py

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


@pytest.fixture
def db_connect() -> DBConnect:
    return connect


@pytest.fixture
def app() -> FastAPI:
    return guests


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    with TestClient(guests):  # its lifespan creates them
        pass


# test_guests.py


async def test_a_guest_is_stored(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    assert (await client.post("/guests/ann")).status_code == 201
    assert list(await shared_session.scalars(select(Guest.name))) == ["ann"]


async def test_a_guest_is_invited_once(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    shared_session.add(Guest(name="ann"))
    await shared_session.commit()
    assert (await client.post("/guests/ann")).status_code == 409


async def test_a_guest_has_a_seat(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    guest = Guest(name="ann")
    shared_session.add(guest)
    await shared_session.commit()
    await client.put("/guests/ann/seat/7")
    await shared_session.refresh(guest)
    assert guest.seat == 7


async def test_the_service_seats_a_guest(db_context: AsyncSession) -> None:
    guest = await invite("ann")
    await db_context.flush()
    await seat("ann", 7)
    assert guest.seat == 7


@pytest.mark.usefixtures("db_context")
async def test_the_service_invites_a_guest_once() -> None:
    await invite("ann")
    await commit_db_session(connect)
    await invite("ann")
    with pytest.raises(IntegrityError):
        await commit_db_session(connect)


async def test_a_guest_is_one_statement(client: httpx.AsyncClient) -> None:
    with assert_queries(1):
        await client.post("/guests/ann")


def test_a_sync_test_has_another_client(shared_client: TestClient) -> None:
    assert shared_client.post("/guests/ann").status_code == 201
    assert shared_client.post("/guests/ann").status_code == 409
