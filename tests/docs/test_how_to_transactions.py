"""The programs of the how-to pages on transactions, run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    MissingGreenlet,
    OperationalError,
    PendingRollbackError,
    SAWarning,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    rollback_db_session,
    run_in_new_ctx,
)
from tests.conftest import Database, make_connect
from tests.helpers.connections import connections_out
from tests.helpers.models import Base, Item, Seat
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client

# Manual transactions


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


# Savepoints


@pytest_asyncio.fixture
async def contacts(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the contacts, served, with a client in it."""
    contacts = load("savepoints", url)
    async with http_client(contacts.app) as contacts.client:
        yield contacts
        assert connections_out(contacts.connect) == 0


ANN = {"email": "ann", "phones": ["1", "2"]}
BOB = {"email": "bob", "phones": ["2", "3"]}


async def test_a_contact_that_is_refused_and_a_phone_that_is_taken_are_lost_alone(
    contacts: Any, url: str
) -> None:
    response = await contacts.client.post("/imports/monday", json=[ANN, ANN, BOB])
    assert (response.status_code, response.json()) == (200, ["ann"])
    outside = Outside(url)
    emails = "SELECT email FROM imported_contact ORDER BY email"
    assert await outside.rows(emails) == ["ann", "bob"]
    phones = await outside.rows("SELECT number, email FROM contact_phone ORDER BY number")
    assert phones == [("1", "ann"), ("2", "ann"), ("3", "bob")]


async def test_an_import_that_fails_as_a_whole_leaves_nothing(contacts: Any, url: str) -> None:
    assert (await contacts.client.post("/imports/monday", json=[ANN])).status_code == 200
    assert (await contacts.client.post("/imports/monday", json=[BOB])).status_code == 500
    assert await Outside(url).rows("SELECT email FROM imported_contact") == ["ann"]


async def test_an_object_that_a_savepoint_has_expired_is_loaded_again(
    contacts: Any, url: str
) -> None:
    await contacts.client.post("/imports/monday", json=[ANN, BOB])
    for email, nickname, answer in ("ann", "a", "a"), ("bob", "a", None), ("bob", "b", "b"):
        response = await contacts.client.put(f"/contacts/{email}/nickname/{nickname}")
        assert (response.status_code, response.json()) == (200, answer)


async def test_what_becomes_of_objects_when_a_savepoint_is_undone(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        kept, changed = Item(name="kept"), Item(name="changed")
        session.add_all([kept, changed])
        added = Item(name="added")
        with suppress(ValueError):
            async with atomic_db_session(connect, "savepoint"):
                session.add(added)
                changed.name = "other"
                await session.flush()
                raise ValueError
        assert added not in session
        assert added.name == "added"
        assert kept.name == "kept"
        with pytest.raises(MissingGreenlet):
            assert changed.name
        await session.refresh(changed)
        assert changed.name == "changed"
    assert await database.names() == ["kept", "changed"]


async def test_a_failed_flush_undoes_the_transaction_on_every_database(
    connect: DBConnect, sqlite_connect: DBConnect
) -> None:
    for each in connect, sqlite_connect:
        async with new_db_session_ctx():
            session = await db_session(each)
            await session.execute(insert(Item).values(name="a"))
            session.add(Item(name="a"))
            with pytest.raises(IntegrityError):
                await session.flush()
            with pytest.raises(PendingRollbackError):
                await session.scalars(select(Item))
            await session.rollback()
            assert (await session.scalars(select(Item))).all() == []


async def test_a_failed_statement_undoes_the_transaction_on_postgresql_and_itself_on_sqlite(
    connect: DBConnect, sqlite_connect: DBConnect, database: Database
) -> None:
    async def write(each: DBConnect) -> AsyncSession:
        session = await db_session(each)
        await session.execute(insert(Item).values(name="a"))
        with pytest.raises(IntegrityError):
            await session.execute(insert(Item).values(name="a"))
        return session

    with pytest.raises(PendingRollbackError):
        async with new_db_session_ctx():
            session = await write(connect)
            with pytest.raises(DBAPIError, match="current transaction is aborted"):
                await session.execute(text("SELECT 1"))
    assert await database.names() == []
    async with new_db_session_ctx():
        session = await write(sqlite_connect)
        assert await session.scalar(select(Item.name)) == "a"


@pytest.mark.parametrize("is_from_url", [True, False])
async def test_a_savepoint_is_a_part_of_its_transaction_on_sqlite_only_if_begin_is_sent(
    tmp_path: Path, is_from_url: bool
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    connect = DBConnect.from_url(url) if is_from_url else make_connect(url)
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
    with suppress(ValueError):
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.scalars(select(Item))
            async with atomic_db_session(connect, "savepoint"):
                session.add(Item(name="a"))
            raise ValueError
    assert await Outside(url).rows("SELECT name FROM item") == ([] if is_from_url else ["a"])
    await connect.close()


# Concurrent queries


@pytest_asyncio.fixture
async def visits(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the visits, served, with a client in it."""
    visits = load("concurrent_queries", url)
    async with http_client(visits.app) as visits.client:
        yield visits
        assert connections_out(visits.connect) == 0


async def test_queries_at_the_same_time_see_what_was_committed(visits: Any) -> None:
    for number, page in enumerate(["home", "news", "home"], start=1):
        response = await visits.client.post(f"/visits/{page}")
        assert (response.status_code, response.json()[0]) == (200, number)
    assert (await visits.client.get("/dashboard")).json() == [3, ["home", "news"]]
    response = await visits.client.get("/counts?pages=home,news,home,about,news")
    assert response.json() == [2, 1, 2, 0, 1]


async def test_each_query_has_a_connection_and_a_semaphore_limits_them(visits: Any) -> None:
    assert (await visits.client.get("/dashboard")).status_code == 200
    assert visits.connect.pool_status().checked_in == 2
    pages = ",".join("abcdefgh")
    assert (await visits.client.get(f"/counts?pages={pages}")).status_code == 200
    assert visits.connect.pool_status().checked_in == 3


async def test_statements_at_once_on_one_session_run_one_after_another(
    connect: DBConnect, database: Database
) -> None:
    async def query() -> None:
        session = await db_session(connect)
        await session.execute(text("SELECT pg_sleep(0.1)"))

    async with new_db_session_ctx():
        await query()
        began = time.monotonic()
        await asyncio.gather(query(), query())
        assert time.monotonic() - began >= 0.2
        assert connections_out(connect) == 1


async def test_two_tasks_that_open_the_connection_of_one_session_are_told_what_to_do(
    connect: DBConnect, database: Database
) -> None:
    async def query() -> None:
        session = await db_session(connect)
        await session.execute(text("SELECT 1"))

    with pytest.raises(InvalidRequestError) as caught:
        async with new_db_session_ctx():
            await asyncio.gather(query(), query())
    assert caught.value.code == "isce"
    assert "run_in_new_ctx" in "".join(caught.value.__notes__)
    await until(lambda: connections_out(connect) == 0)


async def test_a_flush_beside_another_of_the_same_session_is_warned_of(
    connect: DBConnect, database: Database
) -> None:
    async def write(name: str) -> None:
        session = await db_session(connect)
        session.add(Item(name=name))
        await session.flush()

    with pytest.raises(SAWarning, match="not currently supported"):
        async with new_db_session_ctx():
            await (await db_session(connect)).connection()
            await asyncio.gather(write("a"), write("b"))
    assert await database.names() == []


async def add(connect: DBConnect, name: str) -> None:
    session = await db_session(connect)
    session.add(Item(name=name))


async def test_what_runs_in_a_context_of_its_own_is_not_undone_with_the_rest(
    connect: DBConnect, database: Database
) -> None:
    async def fail() -> None:
        await add(connect, "lost")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        async with new_db_session_ctx():
            await add(connect, "of the caller")
            calls = [run_in_new_ctx(fail), run_in_new_ctx(add, connect, "kept")]
            await asyncio.gather(*calls)
    await until(lambda: connections_out(connect) == 0)
    assert await database.names() == ["kept"]


async def test_who_holds_a_connection_and_waits_for_another_may_wait_in_vain(
    postgresql: str, database: Database
) -> None:
    connect = DBConnect.from_url(postgresql, pool_size=2, max_overflow=0, pool_timeout=0.3)
    holding = asyncio.Barrier(2)

    async def request(commits: bool) -> None:
        async with new_db_session_ctx():
            await query()
            if commits:
                await commit_db_session(connect)
            await holding.wait()
            await run_in_new_ctx(query)

    async def query() -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    outcomes = await asyncio.gather(request(False), request(False), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(PoolTimeoutError) >= 1
    await asyncio.gather(request(True), request(True))
    await connect.close()


async def test_a_call_that_writes_the_row_of_its_caller_waits_for_it(
    connect: DBConnect, database: Database
) -> None:
    async def request() -> None:
        async with new_db_session_ctx():
            await add(connect, "a")
            await (await db_session(connect)).flush()
            await run_in_new_ctx(add, connect, "a")

    waiting = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO item%'"
    )
    task = asyncio.create_task(request())
    await until(lambda: database.fetch(waiting))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_none(database)
    assert await database.names() == []


async def until_none(database: Database) -> None:
    async def is_idle() -> bool:
        return await database.states() == []

    await until(is_idle)


async def test_a_call_that_writes_beside_its_caller_fails_on_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    connect = DBConnect.from_url(url, connect_args={"timeout": 0.1})
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
    async with new_db_session_ctx():
        await add(connect, "a")
        await (await db_session(connect)).flush()
        with pytest.raises(OperationalError, match="database is locked"):
            await run_in_new_ctx(add, connect, "b")
        with pytest.raises(OperationalError, match="database is locked"):
            async with new_non_ctx_atomic_session(connect) as session:
                session.add(Item(name="c"))
    assert await Outside(f"sqlite+aiosqlite://{url[9:]}").rows("SELECT name FROM item") == ["a"]
    await connect.close()


async def test_a_caller_that_holds_a_database_in_memory_waits_for_itself() -> None:
    connect = DBConnect.from_url("sqlite://", pool_timeout=0.1)

    async def query() -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    async with new_db_session_ctx():
        await query()
        with pytest.raises(PoolTimeoutError):
            await run_in_new_ctx(query)
        await commit_db_session(connect)
        await run_in_new_ctx(query)
    await connect.close()


# Several databases


@pytest_asyncio.fixture
async def shop(
    url: str,
    load: Callable[[str, str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncGenerator[Any]:
    """Return the program of the shop and its ledger, served, with a client in it."""
    ledger_url = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}"
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    shop = load("several_databases", url)
    shop.outside = Outside(url), Outside(ledger_url)
    async with http_client(shop.app) as shop.client:
        await shop.client.get("/openapi.json")  # once it answers, there are tables
        yield shop
        assert connections_out(shop.shop) == connections_out(shop.ledger) == 0


async def numbers(shop: Any) -> tuple[Any, Any]:
    """Return the numbers of the orders, and of their entries in the ledger."""
    in_shop, in_ledger = shop.outside
    return (
        await in_shop.rows("SELECT number FROM shop_order ORDER BY number"),
        await in_ledger.rows("SELECT number FROM entry ORDER BY number"),
    )


async def test_two_databases_are_committed_in_the_order_in_which_they_were_asked_for(
    shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="root")
    assert (await shop.client.post("/orders/1/sales")).status_code == 201
    assert await numbers(shop) == ([1], [1])
    names = [connect.engine.url.database for connect in (shop.shop, shop.ledger)]
    assert [record.getMessage() for record in caplog.records if record.name == "root"] == [
        *(f"about to commit {name}" for name in names),
        "order 1 is placed",
        "order 1 is booked",
    ]


async def test_what_a_flush_finds_undoes_both(shop: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="root")
    await shop.outside[1].rows("INSERT INTO entry VALUES (1, 'sales') RETURNING number")
    assert (await shop.client.post("/orders/1/sales")).status_code == 500
    assert await numbers(shop) == ([], [1])
    assert "order 1" not in caplog.text


async def test_when_the_second_commit_fails_the_first_stays_and_the_error_says_so(
    shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="root")
    assert (await shop.client.post("/orders/1/nowhere")).status_code == 500
    assert await numbers(shop) == ([1], [])
    assert "order 1 is placed" in caplog.text
    assert "order 1 is booked" not in caplog.text
    note = f"Already committed when this happened: {shop.shop.engine.url.host or ''}/"
    assert f"{note}{shop.shop.engine.url.database}" in caplog.text


async def test_an_order_that_is_booked_later_is_booked_once(shop: Any) -> None:
    for number in 1, 2:
        response = await shop.client.post(f"/later/orders/{number}/sales")
        assert response.status_code == 201
    assert await numbers(shop) == ([1, 2], [])
    # As after a crash between the two commits:
    await shop.outside[1].rows("INSERT INTO entry VALUES (1, 'sales') RETURNING number")
    assert await shop.book() == []
    assert await numbers(shop) == ([1, 2], [1, 2])
    assert await shop.outside[0].rows("SELECT number FROM unbooked_order") == []
    assert await shop.book() == []


async def test_an_order_that_cannot_be_booked_is_not_lost_and_keeps_no_other_back(
    shop: Any,
) -> None:
    assert (await shop.client.post("/later/orders/1/nowhere")).status_code == 201
    assert (await shop.client.post("/later/orders/2/sales")).status_code == 201
    assert await shop.book() == [1]
    assert await numbers(shop) == ([1, 2], [2])
    assert await shop.outside[0].rows("SELECT number FROM unbooked_order") == [1]
