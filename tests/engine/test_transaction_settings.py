"""`transaction_settings` of from_url: each transaction begins with them, and ends with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextvars import ContextVar
from enum import StrEnum
from functools import partial
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import example, given, settings as hypothesis_settings, strategies as st
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from starlette.applications import Starlette
from starlette.routing import Route

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.postgres import keep_on_primary
from context_async_sqlalchemy.starlette_utils import database_health
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.asgi import app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean, server_url
from tests.helpers.pgbouncer import CONNECT_ARGS, pgbouncer, pgbouncer_binary
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client

tenant: ContextVar[str] = ContextVar("tenant")

DRIVERS = ["asyncpg", "psycopg"]
TENANT = text("SELECT current_setting('app.tenant', true)")
TIMEOUT = text("SELECT current_setting('statement_timeout')")
BODIES = text("SELECT body FROM settings_note ORDER BY body")
ADD = text("INSERT INTO settings_note (body) VALUES (:body)")
POLICY = "tenant = NULLIF(current_setting('app.tenant', true), '')"


def of_tenant() -> Mapping[str, str | int]:
    return {"app.tenant": tenant.get(), "statement_timeout": "2s"}


def make(url: URL, driver: str = "asyncpg", **options: Any) -> DBConnect:
    given: dict[str, Any] = {"transaction_settings": of_tenant, "pool_size": 1, "max_overflow": 0}
    return DBConnect.from_url(url.set(drivername=f"postgresql+{driver}"), **given | options)


@pytest_asyncio.fixture
async def notes(role_url: URL) -> AsyncGenerator[URL]:
    """Return the URL of a role whose table is under FORCE ROW LEVEL SECURITY."""
    async with DBConnect.from_url(role_url) as owner:
        async with new_non_ctx_session(owner) as session:
            for statement in (
                "CREATE TABLE settings_note (tenant text NOT NULL"
                " DEFAULT current_setting('app.tenant'), body text)",
                "ALTER TABLE settings_note ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
                f"CREATE POLICY own ON settings_note USING ({POLICY})",
            ):
                await session.execute(text(statement))
            await session.commit()
        yield role_url


async def add(connect: DBConnect, name: str, body: str) -> None:
    tenant.set(name)
    async with new_db_session_ctx():
        await (await db_session(connect)).execute(ADD, {"body": body})


async def bodies(connect: DBConnect, name: str) -> list[str]:
    tenant.set(name)
    async with new_db_session_ctx():
        return list((await (await db_session(connect)).scalars(BODIES)).all())


async def are_apart(connect: DBConnect) -> None:
    """Let two tenants take turns, and run at once, on one connection."""
    for number in range(2):
        for name in "acme", "globex":
            await add(connect, name, f"{name}-{number}")
    tasks = (
        add(connect, name, f"{name}-{number}") for number in (2, 3) for name in ("acme", "globex")
    )
    await asyncio.gather(*tasks)
    for name in "acme", "globex":
        assert await bodies(connect, name) == [f"{name}-{number}" for number in range(4)]
        with pytest.raises(DBAPIError, match="row-level security"):
            async with new_db_session_ctx():
                await (await db_session(connect)).execute(
                    text("INSERT INTO settings_note VALUES ('another', 'x')")
                )
    assert await bodies(connect, "nobody") == []


# Two tenants


@pytest.mark.parametrize("driver", DRIVERS)
async def test_two_tenants_on_one_connection_find_their_own(
    driver: str, notes: URL, database: Database
) -> None:
    async with make(notes, driver) as connect:
        await are_apart(connect)
        assert connect.pool_status().checked_in == 1
        await assert_clean(connect, database)


@pytest.mark.skipif(pgbouncer_binary() is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("driver", DRIVERS)
async def test_two_tenants_find_their_own_through_pgbouncer(driver: str, notes: URL) -> None:
    arguments = CONNECT_ARGS if driver == "asyncpg" else {"prepare_threshold": None}
    with pgbouncer(notes, default_pool_size=1) as through:
        async with make(through, driver, pool_size=3, connect_args=arguments) as connect:
            await are_apart(connect)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_each_transaction_of_a_session_begins_with_what_holds_then(
    driver: str, role_url: URL
) -> None:
    async with make(role_url, driver) as connect, new_db_session_ctx():
        session = await db_session(connect)
        for name in "acme", "globex":
            tenant.set(name)
            assert await session.scalar(TENANT) == name
            tenant.set("another")  # too late for this transaction, and for its savepoints
            async with session.begin_nested():
                assert await session.scalar(TENANT) == name
            assert await asyncio.create_task(session.scalar(TENANT)) == name
            assert await session.scalar(TIMEOUT) == "2s"
            await commit_db_session(connect)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_nothing_is_left_on_the_connection(driver: str, end: str, role_url: URL) -> None:
    tenant.set("acme")
    chosen = iter([of_tenant(), {}])
    async with (
        make(role_url, driver, transaction_settings=lambda: next(chosen)) as connect,
        new_non_ctx_session(connect) as session,
    ):
        assert await session.scalar(TENANT) == "acme"
        await getattr(session, end)()
        # Not NULL, as on a connection that has never had it.
        assert await session.scalar(TENANT) == ""
        assert await session.scalar(TIMEOUT) == "0"


# The wire


async def calls_of(url: URL, connect_options: dict[str, Any], sessions: list[str]) -> list[str]:
    """Return the round trips of an INSERT for each tenant, on a connection that was used before."""
    calls: list[str] = []

    async def note(call: Call) -> Fault | None:
        calls.append(call.statement)
        return None

    assert url.host is not None
    async with proxy(url.host, url.port or 5432, note) as port:
        target = url.set(host="127.0.0.1", port=port)
        async with make(target, **connect_options) as connect:
            await add(connect, "first", "a")
            calls.clear()
            for name in sessions:
                await add(connect, name, "a")
            return calls


async def test_with_asyncpg_the_settings_are_in_the_round_trip_of_begin(notes: URL) -> None:
    assert await calls_of(notes, {}, ["acme", "globex"]) == [
        "BEGIN; SELECT pg_catalog.set_config('app.tenant', 'acme', true),"
        " pg_catalog.set_config('statement_timeout', '2s', true);",
        "INSERT INTO settings_note (body) VALUES ($1)",
        "COMMIT;",
        "BEGIN; SELECT pg_catalog.set_config('app.tenant', 'globex', true),"
        " pg_catalog.set_config('statement_timeout', '2s', true);",
        "INSERT INTO settings_note (body) VALUES ($1)",
        "COMMIT;",
    ]


async def test_with_a_level_and_a_class_of_ones_own_too(notes: URL) -> None:
    class Own(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
        __slots__ = ()

    options = {"isolation_level": "SERIALIZABLE", "connect_args": {"connection_class": Own}}
    begin, *rest = await calls_of(notes, options, ["acme"])
    assert begin.startswith("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT pg_catalog.set_config(")
    assert len(rest) == 2


@pytest.mark.parametrize("fault", Fault)
async def test_a_begin_that_fails_leaves_nothing_behind(
    fault: Fault, notes: URL, database: Database
) -> None:
    faults: list[Fault | None] = [None, fault]

    async def decide(call: Call) -> Fault | None:
        return faults.pop(0) if "set_config" in call.statement and faults else None

    assert notes.host is not None
    async with (
        proxy(notes.host, notes.port or 5432, decide) as port,
        make(notes.set(host="127.0.0.1", port=port)) as connect,
    ):
        await add(connect, "acme", "a")
        with pytest.raises(DBAPIError):
            await add(connect, "globex", "b")
        await assert_clean(connect, database)
        assert await bodies(connect, "acme") == ["a"]
        assert await bodies(connect, "globex") == []
    assert faults == []


async def test_a_connection_that_somebody_else_opens_has_them_by_a_statement_of_its_own(
    notes: URL,
) -> None:
    assert notes.host is not None
    arguments = {"host": notes.host, "port": notes.port, "database": notes.database}
    secret = {"user": notes.username, "password": notes.password}
    creator = partial(asyncpg.connect, **arguments, **secret)
    async with make(notes, async_creator=creator) as connect:
        await are_apart(connect)


async def test_a_client_encoding_in_which_quoting_is_not_safe_has_bound_parameters(
    role_url: URL,
) -> None:
    value = "\u00a5' || 'b"
    async with (
        make(role_url, transaction_settings=lambda: {"app.tenant": value}) as connect,
        new_non_ctx_session(connect) as session,
    ):
        await session.execute(text("SET client_encoding = 'SJIS'"))
        await session.execute(text("SET standard_conforming_strings = off"))
        await session.commit()
        # Python and PostgreSQL do not agree on that sign: it arrives as a backslash.
        assert await session.scalar(TENANT) == "\\' || 'b"


# What is refused


@pytest.mark.parametrize("driver", DRIVERS)
async def test_without_a_tenant_nothing_begins_and_the_connection_stays_whole(
    driver: str, role_url: URL, database: Database
) -> None:
    async with make(role_url, driver) as connect, new_db_session_ctx():
        session = await db_session(connect)
        token = tenant.set("acme")
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await session.commit()
        tenant.reset(token)
        for _ in range(2):
            with pytest.raises(LookupError):
                await session.scalar(TENANT)
            await session.rollback()
        assert connections_out(connect) == 0
        assert await database.states() == []
        tenant.set("globex")
        row = (
            await session.execute(text("SELECT pg_backend_pid(), current_setting('app.tenant')"))
        ).one()
        assert row == (pid, "globex")


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_value_that_the_server_refuses_fails_the_transaction(
    driver: str, role_url: URL, database: Database
) -> None:
    given = {"app.tenant": "acme", "statement_timeout": "soon"}
    async with make(role_url, driver, transaction_settings=lambda: given) as connect:
        for _ in range(2):
            with pytest.raises(DBAPIError, match="invalid value for parameter"):
                async with new_db_session_ctx():
                    await (await db_session(connect)).scalar(TENANT)
            await assert_clean(connect, database)
        given["statement_timeout"] = "1s"
        async with new_db_session_ctx():
            assert await (await db_session(connect)).scalar(TENANT) == "acme"


class Tenant(StrEnum):
    ACME = "s3cret"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"app.tenant": None}, TypeError, "'app.tenant' must be a str or an int, not NoneType"),
        ({"app.tenant": True}, TypeError, "'app.tenant' must be a str or an int, not bool"),
        ({"app.tenant": 1.5}, TypeError, "'app.tenant' must be a str or an int, not float"),
        ({"app.tenant": b"s3cret"}, TypeError, "must be a str or an int, not bytes"),
        ({"app.tenant": Tenant.ACME}, TypeError, "must be a str or an int, not Tenant"),
        ({"app.tenant": "s3cret\0"}, ValueError, "a character that cannot be sent"),
        ({"app.tenant": "s3cret\ud800"}, ValueError, "a character that cannot be sent"),
        ({"app.tenant', ''": "s3cret"}, ValueError, "is not the name of a setting"),
        ({"": "s3cret"}, ValueError, "'' is not the name of a setting"),
        ({"app.tenant\n": "s3cret"}, ValueError, "is not the name of a setting"),
        ({"äpp.tenant": "s3cret"}, ValueError, "is not the name of a setting"),
        ({1: "s3cret"}, ValueError, "1 is not the name of a setting"),
        ([("app.tenant", "s3cret")], TypeError, "must return a mapping .*, not list"),
        (None, TypeError, "must return a mapping .*, not NoneType"),
    ],
)
@pytest.mark.parametrize("driver", DRIVERS)
async def test_what_is_no_setting_is_refused_before_begin(
    driver: str, given: Any, error: type[Exception], message: str, role_url: URL
) -> None:
    async with make(role_url, driver, transaction_settings=lambda: given) as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            with pytest.raises(error, match=message) as raised:
                await session.scalar(TENANT)
            assert "s3cret" not in str(raised.value)
        assert connections_out(connect) == 0


@pytest.mark.parametrize("url", ["sqlite://", "mysql+asyncmy://app@db/shop"])
def test_a_database_without_such_settings_is_refused(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"transaction_settings need PostgreSQL: (sqlite|mysql) has"
    ):
        DBConnect.from_url(url, transaction_settings=of_tenant)


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "autocommit"},
        {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
    ],
)
def test_autocommit_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="with AUTOCOMMIT there is none"):
        make(server_url(), **options)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_autocommit_is_refused_when_it_is_chosen_later(driver: str, role_url: URL) -> None:
    tenant.set("acme")
    async with make(role_url, driver) as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            with pytest.raises(InvalidRequestError, match="with AUTOCOMMIT there is none"):
                await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            await session.rollback()
            assert await session.scalar(TENANT) == "acme"
        assert connect.engine is not None
        engine = connect.engine.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(InvalidRequestError, match="with AUTOCOMMIT there is none"):
            async with engine.connect() as connection:
                await connection.scalar(TENANT)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_session_that_reads_without_a_transaction_is_refused_before_it_sends_anything(
    driver: str, notes: URL, database: Database
) -> None:
    async with make(notes, driver) as connect:
        await add(connect, "acme", "a")
        async with new_db_session_ctx():
            with pytest.raises(InvalidRequestError, match=r"transaction_settings.*'snapshot'"):
                await db_session(connect, read_only=True)
            assert connections_out(connect) == 0

        async def handle(_: Scope) -> int:
            with pytest.raises(InvalidRequestError, match=r"transaction_settings.*'snapshot'"):
                await db_session(connect)
            session = await db_session(connect, read_only="snapshot")
            assert (await session.scalars(BODIES)).all() == ["a"]
            return 200

        await call(app_of(handle, read_only_methods={"GET"}))
        await assert_clean(connect, database)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_snapshot_begins_with_them_and_leaves_none(
    driver: str, notes: URL, database: Database
) -> None:
    async with make(notes, driver) as connect:
        await add(connect, "acme", "a")
        await add(connect, "globex", "b")
        for name, expected in ("acme", ["a"]), ("globex", ["b"]), ("nobody", []):
            tenant.set(name)
            async with new_db_session_ctx():
                session = await db_session(connect, read_only="snapshot")
                assert (await session.scalars(BODIES)).all() == expected
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"
        await are_apart_after_reading(connect)


async def are_apart_after_reading(connect: DBConnect) -> None:
    await add(connect, "acme", "c")
    assert await bodies(connect, "acme") == ["a", "c"]
    assert await bodies(connect, "globex") == ["b"]


async def test_a_transaction_in_two_phases_is_refused(role_url: URL) -> None:
    tenant.set("acme")
    options: dict[str, Any] = {"session_options": {"twophase": True}}
    async with make(role_url, "psycopg", **options) as connect, new_db_session_ctx():
        session = await db_session(connect)
        with pytest.raises(InvalidRequestError, match="of no use with twophase=True"):
            await session.scalar(TENANT)


def test_what_cannot_be_called_is_refused() -> None:
    settings: Any = {"app.tenant": "acme"}
    with pytest.raises(TypeError, match=r"transaction_settings must be callable, not dict"):
        make(server_url(), transaction_settings=settings)


# What is sent when


async def test_a_ping_of_the_pool_has_no_settings(role_url: URL) -> None:
    tenant.set("acme")
    asked: list[str] = []

    def ask() -> Mapping[str, str | int]:
        asked.append(tenant.get())
        return of_tenant()

    options: dict[str, Any] = {"pool_pre_ping": True, "ping_after_idle": 1e-9}
    async with make(role_url, **options, transaction_settings=ask) as connect:
        for _ in range(2):
            async with new_db_session_ctx():
                assert await (await db_session(connect)).scalar(TENANT) == "acme"
    assert asked == ["acme", "acme"]


@pytest.mark.parametrize("statements", [0, 1])  # without any, BEGIN is not sent
async def test_the_settings_of_a_transaction_are_not_those_of_the_next_one_on_the_driver(
    statements: int, role_url: URL
) -> None:
    tenant.set("acme")
    async with make(role_url) as connect:
        async with new_non_ctx_session(connect) as session:
            driver: Any = (
                await (await session.connection()).get_raw_connection()
            ).driver_connection
            if statements:
                assert await session.scalar(TENANT) == "acme"
                await driver.execute("COMMIT")
                await driver.execute("BEGIN")
                assert await session.scalar(TENANT) == ""
        assert connect.engine is not None
        raw = await connect.engine.raw_connection()
        again: Any = raw.driver_connection
        assert again is driver
        async with again.transaction():
            assert await again.fetchval(TENANT.text) == ("" if statements else None)
        raw.close()


async def test_a_connection_without_a_session_begins_with_them(role_url: URL) -> None:
    tenant.set("acme")
    async with make(role_url) as connect:
        await connect.session_maker()
        assert connect.engine is not None
        async with connect.engine.connect() as connection:
            assert await connection.scalar(TENANT) == "acme"
            await connection.commit()
            tenant.set("globex")
            assert await connection.scalar(TENANT) == "globex"


@pytest.mark.parametrize("driver", DRIVERS)
async def test_an_engine_for_migrations_and_a_probe_are_nobodys(driver: str, role_url: URL) -> None:
    async with make(role_url, driver) as connect:
        engine = await connect.create_engine()
        async with engine.connect() as connection:
            assert await connection.scalar(TENANT) is None
        await engine.dispose()
        async with http_client(Starlette(routes=[Route("/", database_health(connect))])) as client:
            assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_chooser_of_a_host_is_nobodys(driver: str, role_url: URL) -> None:
    handler = keep_on_primary(["127.0.0.1"])
    url = role_url.set(host="localhost")
    async with make(url, driver, before_create_session_handler=handler) as connect:
        # Nobody's tenant is set: settings would raise, and no host would be found.
        await (await connect.create_session()).close()
        assert connect.host == "127.0.0.1"


async def test_two_connections_at_a_time_begin_with_their_own(role_url: URL) -> None:
    async with make(role_url, pool_size=2) as connect:
        sessions = [await connect.create_session() for _ in range(2)]
        for session, name in zip(sessions, ("acme", "globex"), strict=True):
            tenant.set(name)
            assert await session.scalar(TENANT) == name
        for session, name in zip(sessions, ("acme", "globex"), strict=True):
            assert await session.scalar(TENANT) == name
            await session.close()


@pytest.mark.parametrize("driver", DRIVERS)
async def test_in_a_transaction_that_is_shared_with_a_test_each_tenant_finds_its_own(
    driver: str, notes: URL
) -> None:
    async with make(notes, driver) as connect, shared_transaction(connect):
        for name in "acme", "globex", "acme":
            await add(connect, name, name)
        assert await bodies(connect, "acme") == ["acme", "acme"]
        assert await bodies(connect, "globex") == ["globex"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_in_a_transaction_that_is_shared_with_a_test_settings_end_where_they_would(
    driver: str, notes: URL
) -> None:
    given: dict[str, str | int] = {"app.tenant": "it's acme"}

    async def inside() -> None:
        given.update({"app.tenant": "globex", "statement_timeout": "2s"})
        assert await (await db_session(connect)).scalar(TENANT) == "globex"
        given.clear()

    async with (
        make(notes, driver, transaction_settings=lambda: given) as connect,
        shared_transaction(connect) as shared,
    ):
        async with new_db_session_ctx():
            session = await db_session(connect)
            assert await session.scalar(TENANT) == "it's acme"
            await run_in_new_ctx(inside)
            assert await session.scalar(TENANT) == "it's acme"
            assert await session.scalar(TIMEOUT) == "0"
        assert await shared.scalar(TENANT) in (None, "")
        assert await shared.scalar(TIMEOUT) == "0"


async def test_the_function_is_asked_nothing_when_it_is_off(role_url: URL) -> None:
    async with make(role_url, transaction_settings=None) as connect:
        await connect.ping()
        assert connect.engine is not None
        assert not [*connect.engine.sync_engine.dispatch.begin]


# Every value


@pytest.mark.parametrize("is_conforming", ["on", "off"])
def test_every_value_comes_back_as_it_was(is_conforming: str, database_url: URL) -> None:
    given_now: dict[str, str | int] = {}

    with asyncio.Runner() as runner:
        connect = make(database_url, transaction_settings=lambda: given_now)

        async def prepare() -> None:
            given_now.clear()
            async with new_non_ctx_session(connect) as session:
                setting = f"SET standard_conforming_strings = {is_conforming}"
                await session.execute(text(setting))
                await session.execute(text("SET escape_string_warning = off"))
                await session.commit()

        async def look(value: str | int) -> None:
            given_now["app.tenant"] = given_now["app.other.deeper_1"] = value
            async with new_non_ctx_session(connect) as session:
                found = await session.execute(
                    text(
                        "SELECT current_setting('app.tenant'),"
                        " current_setting('app.other.deeper_1'),"
                        " current_setting('standard_conforming_strings')"
                    )
                )
                assert found.one() == (str(value), str(value), is_conforming)

        runner.run(prepare())
        text_of_all = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
        hostile = st.text(st.sampled_from("'\\\"$;-/*\n \r\t%:E{}é\u00a5\u2019\uff07\U0001f600"))

        @hypothesis_settings(max_examples=150, deadline=None, database=None)
        @given(text_of_all | hostile | st.integers(-(2**70), 2**70))
        @example("")
        @example("'")
        @example("\\'; SELECT pg_catalog.set_config('app.other.deeper_1', 'x', true); --")
        @example("\\")
        @example("\\\\'")
        @example("$1 :value_0 %s {}")
        def check(value: str | int) -> None:
            runner.run(look(value))

        try:
            check()
        finally:
            runner.run(connect.close())
