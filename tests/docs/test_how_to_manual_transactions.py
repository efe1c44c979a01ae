"""The program of the how-to page on manual transactions, run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import inspect, select
from sqlalchemy.exc import (
    IntegrityError,
    InvalidRequestError,
    MissingGreenlet,
    PendingRollbackError,
)
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    rollback_db_session,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item, Seat
from tests.helpers.programs import Outside
from tests.helpers.serving import http_client


class Service:
    """A service that answers when it is told to."""

    def __init__(self) -> None:
        self.is_called = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, _: object) -> str:
        self.is_called.set()
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return "done"


@pytest_asyncio.fixture
async def orders(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the orders, served, with a client in it."""
    orders = load("manual_transactions", url)
    async with http_client(orders.app) as orders.client:
        yield orders
        assert connections_out(orders.connect) == 0


async def test_an_order_is_durable_and_no_connection_is_held_while_it_is_charged(
    orders: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setattr(orders, "charge", service)
    async with asyncio.timeout(10):
        request = asyncio.create_task(orders.client.post("/orders/tea"))
        await service.is_called.wait()
        assert connections_out(orders.connect) == 0
        assert await Outside(url).rows("SELECT state FROM charged_order") == ["new"]
        service.may_answer.set()
        response = await request
    assert (response.status_code, response.json()) == (201, "done")
    assert await Outside(url).rows("SELECT state FROM charged_order") == ["done"]


async def test_an_order_whose_charge_fails_stays_new(
    orders: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    service.may_answer.set()
    service.error = ConnectionRefusedError()
    monkeypatch.setattr(orders, "charge", service)
    assert (await orders.client.post("/orders/tea")).status_code == 500
    assert await Outside(url).rows("SELECT state FROM charged_order") == ["new"]
    assert await Outside(url).rows("SELECT article FROM order_attempt") == ["tea"]


async def test_an_attempt_is_on_record_though_its_order_is_not(
    orders: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "commit_db_session", rollback_db_session)
    service = Service()
    service.may_answer.set()
    service.error = ConnectionRefusedError()
    monkeypatch.setattr(orders, "charge", service)
    assert (await orders.client.post("/orders/tea")).status_code == 500
    assert await Outside(url).rows("SELECT state FROM charged_order") == []
    assert await Outside(url).rows("SELECT article FROM order_attempt") == ["tea"]


async def test_a_query_holds_a_connection_until_its_session_is_closed(
    orders: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await orders.client.post("/orders/tea")).status_code == 201
    [order] = await Outside(url).rows("SELECT id FROM charged_order")
    service = Service()
    monkeypatch.setattr(orders, "locate", service)
    async with asyncio.timeout(10):
        request = asyncio.create_task(orders.client.get(f"/orders/{order}"))
        await service.is_called.wait()
        assert connections_out(orders.connect) == 0
        service.may_answer.set()
        assert (await request).json() == "tea: paid, done"


async def test_orders_that_were_placed_stay_though_the_request_fails(orders: Any, url: str) -> None:
    response = await orders.client.post("/orders", json=["tea", "milk", "the moon", "bread"])
    assert (response.status_code, response.json()["detail"]) == (422, "the moon is not for sale")
    placed = await Outside(url).rows("SELECT article FROM charged_order ORDER BY id")
    assert placed == ["tea", "milk"]


async def test_the_request_goes_on_after_a_rollback_and_is_committed(orders: Any, url: str) -> None:
    assert (await orders.client.post("/orders/tea/check")).status_code == 204
    assert await Outside(url).rows("SELECT article FROM charged_order") == []
    assert await Outside(url).rows("SELECT article FROM order_attempt") == ["tea"]


async def test_what_becomes_of_objects_when_a_transaction_is_ended_by_hand(
    connect: DBConnect, database: Database
) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a')")
    async with new_db_session_ctx():
        session = await db_session(connect)
        item = (await session.scalars(select(Item))).one()
        assert connections_out(connect) == 1
        await commit_db_session(connect)
        assert connections_out(connect) == 0
        assert item.name == "a"
        assert connections_out(connect) == 0
        assert await db_session(connect) is session

        await session.connection()
        await rollback_db_session(connect)
        assert connections_out(connect) == 0
        with pytest.raises(MissingGreenlet):
            assert item.name
        await session.refresh(item)
        assert item.name == "a"

        await close_db_session(connect)
        assert connections_out(connect) == 0
        assert item.name == "a"
        assert inspect(item).detached
        item.name = "b"
        assert await db_session(connect) is not session
    assert await database.names() == ["a"]


@pytest.mark.parametrize("fails", ["in the flush", "in the COMMIT"])
@pytest.mark.parametrize("commit", ["function", "session"])
async def test_a_session_goes_on_once_a_commit_by_hand_that_failed_is_rolled_back(
    connect: DBConnect, database: Database, commit: str, fails: str
) -> None:
    async def fail_to_commit() -> AsyncSession:
        session = await db_session(connect)
        if fails == "in the flush":
            session.add_all([Item(name="a"), Item(name="a")])
        else:
            session.add_all([Seat(number=1), Seat(number=1)])
        with pytest.raises(IntegrityError):
            await (commit_db_session(connect) if commit == "function" else session.commit())
        return session

    async with new_db_session_ctx():
        session = await fail_to_commit()
        with pytest.raises(InvalidRequestError):
            await session.scalars(select(Item))
        await rollback_db_session(connect)
        session.add(Item(name="b"))
    assert await database.names() == ["b"]
    with pytest.raises(PendingRollbackError):
        async with new_db_session_ctx():
            await fail_to_commit()
