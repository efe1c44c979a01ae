"""`begin_with_first_statement` of from_url: with asyncpg, BEGIN and a statement in one flight."""

from __future__ import annotations

import asyncio
import io
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx, new_non_ctx_session
from context_async_sqlalchemy._engine import begin_in_flight
from tests.helpers.database import Database
from tests.helpers.flight import (
    ADD,
    ADD_NUMBER,
    ONE,
    TRANSACTION,
    Flown,
    driver_of,
    is_one_transaction,
    is_plain,
    opened,
    opened_directly,
)

pytestmark = pytest.mark.usefixtures("database")

# The wire


async def test_a_select_and_its_commit_are_two_round_trips(flown: Flown) -> None:
    connect, wire = flown
    async with new_db_session_ctx():
        assert await (await db_session(connect)).scalar(ONE) == 1
    assert wire.trips == [("BEGIN;", "SELECT 1"), ("", "COMMIT;")]


async def test_without_the_option_they_are_three(database_url: URL) -> None:
    async with opened(database_url, begin_with_first_statement=False) as (connect, wire):
        async with new_db_session_ctx():
            assert await (await db_session(connect)).scalar(ONE) == 1
        assert wire.trips == [("", "BEGIN;"), ("", "SELECT 1"), ("", "COMMIT;")]
        async with new_non_ctx_session(connect) as session:
            assert await is_plain(session)


async def test_the_settings_of_a_transaction_ride_too(database_url: URL) -> None:
    given = {"app.tenant": "a'; b\\", "statement_timeout": "2s"}
    seen = text("SELECT current_setting('app.tenant'), current_setting('statement_timeout')")
    async with opened(database_url, transaction_settings=lambda: given) as (connect, wire):
        for _ in range(2):
            wire.start()
            async with new_non_ctx_session(connect) as session:
                assert (await session.execute(seen)).all() == [("a'; b\\", "2s")]
                await session.commit()
        (begin, statement), end = wire.trips
        assert begin.startswith("BEGIN;SELECT pg_catalog.set_config('app.tenant', E'a''; b")
        assert (statement, end) == (seen.text, ("", "COMMIT;"))


async def test_a_setting_that_the_server_refuses_fails_the_transaction(database_url: URL) -> None:
    given: dict[str, str | int] = {"statement_timeout": "1s"}
    async with opened(database_url, transaction_settings=lambda: given) as (connect, wire):
        given["statement_timeout"] = "soon"
        async with new_non_ctx_session(connect) as session:
            with pytest.raises(DBAPIError, match="invalid value for parameter"):
                await session.execute(ADD, {"name": "a"})
            with pytest.raises(DBAPIError, match="current transaction is aborted"):
                await session.execute(ADD, {"name": "a"})
        assert [begin != "" for begin, _ in wire.trips] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"isolation_level": "REPEATABLE READ"}, ("repeatable read", "off", "off")),
        ({"isolation_level": "SERIALIZABLE"}, ("serializable", "off", "off")),
        ({"postgresql_readonly": True}, ("read committed", "on", "off")),
        (
            {
                "isolation_level": "SERIALIZABLE",
                "postgresql_readonly": True,
                "postgresql_deferrable": True,
            },
            ("serializable", "on", "on"),
        ),
    ],
)
async def test_a_transaction_begins_as_it_was_told(
    options: dict[str, Any], expected: tuple[str, ...], flown: Flown
) -> None:
    connect, wire = flown
    names = "transaction_isolation", "transaction_read_only", "transaction_deferrable"
    seen = text(f"SELECT {', '.join(f'current_setting({name!r})' for name in names)}")
    for _ in range(2):
        wire.start()
        async with new_non_ctx_session(connect) as session:
            await session.connection(execution_options=options)
            assert (await session.execute(seen)).one() == expected
            await session.commit()
    assert [statement for _, statement in wire.trips] == [seen.text, "COMMIT;"]
    assert wire.trips[0][0].startswith("BEGIN ")


async def test_autocommit_has_no_begin(flown: Flown) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        assert not await is_one_transaction(session)
    assert {begin for begin, _ in wire.trips} == {""}
    async with new_non_ctx_session(connect) as session:
        assert await is_one_transaction(session)


# What comes first


async def test_before_a_statement_that_is_not_prepared_begin_is_sent_by_itself(
    flown: Flown,
) -> None:
    connect, wire = flown
    statement = "SELECT pg_current_xact_id()::text, 'new'"
    async with new_non_ctx_session(connect) as session:
        (first, _) = (await session.execute(text(statement))).one()
        assert first == await session.scalar(TRANSACTION)
        await session.commit()
    assert wire.trips == [
        *(("", "BEGIN;"), ("", statement), ("", statement)),
        *(("", TRANSACTION.text), ("", "COMMIT;")),
    ]


async def test_a_statement_that_cannot_be_prepared_fails_its_transaction(
    flown: Flown, database: Database
) -> None:
    connect, _ = flown
    async with new_non_ctx_session(connect) as session:
        with pytest.raises(DBAPIError, match="syntax error"):
            await session.execute(text("SELEC"))
        with pytest.raises(DBAPIError, match="current transaction is aborted"):
            await session.execute(ADD, {"name": "a"})
        with pytest.raises(PendingRollbackError):
            await session.commit()
    assert await database.names() == []


async def test_a_value_that_cannot_be_encoded_leaves_begin_waiting(
    flown: Flown, database: Database
) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        for _ in range(2):
            with pytest.raises(DBAPIError, match="invalid input for query argument"):
                await session.execute(ADD_NUMBER, {"number": "one"})
        assert wire.trips == []
        assert (await driver_of(session)).is_in_transaction()
        await session.execute(ADD_NUMBER, {"number": 1})
        await session.rollback()
        assert wire.trips == [
            ("BEGIN;", ADD_NUMBER.text.replace(":number", "$1")),
            ("", "ROLLBACK;"),
        ]
        wire.start()
        with pytest.raises(DBAPIError, match="invalid input for query argument"):
            await session.execute(ADD_NUMBER, {"number": "one"})
        await session.commit()
        assert wire.trips == []  # of nothing
        assert not (await driver_of(session)).is_in_transaction()
        assert await is_one_transaction(session)
    assert await database.names() == []


async def test_the_rows_of_a_stream_all_arrive(flown: Flown) -> None:
    connect, wire = flown
    numbers = text("SELECT generate_series(1, 3000)")
    for _ in range(2):
        wire.start()
        async with new_non_ctx_session(connect) as session:
            rows = await session.stream_scalars(numbers, execution_options={"yield_per": 100})
            assert [number async for number in rows] == list(range(1, 3001))
            await session.commit()
    assert wire.trips[0] == ("", "BEGIN;")


async def test_an_iterator_of_the_driver_does_not_end_with_begin(
    flown: Flown,
) -> None:
    connect, _ = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("SELECT generate_series(1, 300)")
        async with driver.transaction():
            rows = [row async for row in statement.cursor(prefetch=10)]
        async with driver.transaction():
            assert await statement.fetchval() == 1
            assert statement.get_statusmsg() is None  # there are more
    assert len(rows) == 300


async def test_many_rows_at_once_are_in_one_transaction(flown: Flown, database: Database) -> None:
    connect, wire = flown
    for _ in range(2):
        wire.start()
        async with new_non_ctx_session(connect) as session:
            await session.execute(ADD, [{"name": f"{number}"} for number in range(1000)])
            assert await session.scalar(text("SELECT count(*) FROM item")) == 1000
            await session.rollback()
        assert wire.trips[0] == ("", "BEGIN;")
    # The value of the second row cannot be encoded: asyncpg would roll back what it thinks has not
    # begun, and what follows would be stored at once.
    async with new_non_ctx_session(connect) as session:
        with pytest.raises(DBAPIError, match="invalid input for query argument"):
            await session.execute(ADD_NUMBER, [{"number": 1}, {"number": "two"}])
        await session.execute(ADD, {"name": "a"})
        await session.rollback()
    assert await database.names() == []


async def test_copy_is_in_the_transaction_that_the_driver_begins(
    database_url: URL, database: Database
) -> None:
    out = io.BytesIO()
    async with opened_directly(database_url) as connect, new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        with suppress(ZeroDivisionError):
            async with driver.transaction():
                await driver.copy_records_to_table("item", records=[("a",)], columns=["name"])
                await driver.copy_from_table("item", output=out, columns=["name"])
                raise ZeroDivisionError
        async with driver.transaction():
            await driver.copy_from_query("SELECT 'b'", output=out)
            assert driver.is_in_transaction()
    assert out.getvalue() == b"a\nb\n"
    assert await database.names() == []


async def test_savepoints_are_in_the_transaction(flown: Flown, database: Database) -> None:
    connect, wire = flown
    for _ in range(2):
        await database.empty()
        wire.start()
        async with new_non_ctx_session(connect) as session:
            for name in "ab":
                with suppress(ZeroDivisionError):
                    async with session.begin_nested():
                        await session.execute(ADD, {"name": name})
                        if name == "a":
                            raise ZeroDivisionError
            await session.commit()
        assert await database.names() == ["b"]
    assert wire.trips[0] == ("BEGIN;", "SAVEPOINT sa_savepoint_1")


# The driver by itself


async def test_a_transaction_of_the_driver_without_a_statement_sends_nothing(
    flown: Flown,
) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        async with driver.transaction():
            assert driver.is_in_transaction()
        assert not driver.is_in_transaction()
        transaction = driver.transaction()
        await transaction.start()
        await transaction.rollback()
        assert not driver.is_in_transaction()
    assert wire.trips == []


async def test_what_the_driver_is_asked_for_is_in_its_transaction(
    flown: Flown, database: Database
) -> None:
    connect, wire = flown
    query = "SELECT name FROM item"
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        for begin in ("", "BEGIN;"):
            wire.start()
            transaction = driver.transaction()
            await transaction.start()
            assert await driver.fetch(query) == []
            await driver.execute("INSERT INTO item (name) VALUES ('a')")
            await driver.execute("INSERT INTO item (name) VALUES ($1)", "b")
            assert len(await driver.fetch(query)) == 2
            async with driver.transaction():
                assert await driver.fetchval("SELECT count(*) FROM item") == 2
            await transaction.rollback()
            assert wire.trips[0] == (begin, query if begin else "BEGIN;")
        with suppress(ZeroDivisionError):
            async with driver.transaction():
                await driver.execute("INSERT INTO item (name) VALUES ('d')")  # the first thing
                raise ZeroDivisionError
        # Nobody knows what else a query says that begins so.
        wire.start()
        await driver.execute("BEGIN; INSERT INTO item (name) VALUES ('c'); COMMIT")
        assert len(wire.trips) == 1
    assert await database.names() == ["c"]


async def test_begin_is_not_taken_for_a_statement_without_a_name(flown: Flown) -> None:
    connect, _ = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("SELECT 1", name="")
        with pytest.raises(asyncpg.InvalidSQLStatementNameError):  # as without the option
            async with driver.transaction():
                await statement.fetch()


async def test_a_logger_of_queries_hears_of_each(flown: Flown) -> None:
    connect, _ = flown
    heard: list[str] = []
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        with driver.query_logger(lambda record: heard.append(record.query)):
            async with driver.transaction():
                await driver.fetch("SELECT 1")
    assert heard == ["BEGIN;", "SELECT 1", "COMMIT;"]


async def test_beside_another_operation_a_statement_is_refused_and_nothing_is_sent(
    flown: Flown, database: Database
) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("SELECT 1")
        wire.start()
        sleeping = asyncio.create_task(driver.execute("SELECT pg_sleep(10)"))
        async with asyncio.timeout(30):
            while (pid := await database.pid_of("%pg_sleep(10)%")) is None:
                await asyncio.sleep(0.001)
        transaction = driver.transaction()
        await transaction.start()
        with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
            await statement.fetch()
        await database.execute(f"SELECT pg_cancel_backend({pid})")
        with pytest.raises(asyncpg.QueryCanceledError):
            await sleeping
        assert len(wire.trips) == 1
        assert len(await statement.fetch()) == 1
        await transaction.rollback()
        assert wire.trips[1:] == [("BEGIN;", "SELECT 1"), ("", "ROLLBACK;")]


# Other drivers


@pytest.mark.parametrize("url", ["postgresql+psycopg://app@db/shop", "sqlite://"])
def test_another_driver_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"begin_with_first_statement needs asyncpg, and this URL"):
        DBConnect.from_url(url, begin_with_first_statement=True)


async def test_an_asyncpg_that_works_otherwise_has_a_begin_of_its_own(
    database_url: URL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached = begin_in_flight._class_for
    monkeypatch.setattr(begin_in_flight, "_class_for", cached.__wrapped__)
    monkeypatch.setattr(begin_in_flight, "can_fly", lambda _: False)
    async with opened(database_url) as (connect, wire):
        async with new_db_session_ctx():
            assert await (await db_session(connect)).scalar(ONE) == 1
        assert wire.trips == [("", "BEGIN;"), ("", "SELECT 1"), ("", "COMMIT;")]
    assert "does not work with this version of asyncpg: BEGIN is sent by itself" in caplog.text


class WritesEarly(asyncpg.protocol.Protocol):  # type: ignore[misc]  # asyncpg has no types
    """One that has sent a statement when it looks for a waiter."""

    async def bind_execute(self, *args: Any) -> Any:
        executing = super().bind_execute(*args)
        self.begin, begin = "", self.begin
        return await executing if begin is None else await self.end(executing, begin)

    async def end(self, executing: Any, begin: str) -> Any:
        answer = await executing
        self.wire.write(begin.encode())
        return answer


class EncodesLate(asyncpg.protocol.Protocol):  # type: ignore[misc]
    """One that looks for a waiter first."""

    async def bind_execute(self, *args: Any) -> Any:
        self._on_waiter_completed  # noqa: B018
        return await super().bind_execute(*args)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (asyncpg.protocol.Protocol, True),
        (WritesEarly, False),
        (EncodesLate, False),
        (object, False),
    ],
)
async def test_the_rehearsal_sees_what_asyncpg_does(base: type, expected: bool) -> None:
    assert (begin_in_flight._class_for.__wrapped__(base) is not None) is expected
