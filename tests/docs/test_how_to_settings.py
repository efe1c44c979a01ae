"""The program of the how-to page on the settings of a transaction, run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import Depends, FastAPI, Request, Response
from sqlalchemy import URL, select, text
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import RequestResponseEndpoint

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client

ACME, GLOBEX = {"X-Tenant": "acme"}, {"X-Tenant": "globex"}


@pytest_asyncio.fixture
async def program(role_url: URL, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the tenants, served, with a client in it."""
    program = load("transaction_settings", role_url.render_as_string(hide_password=False))
    async with http_client(program.app) as program.client:
        # Answered when the application has started, and so made its tables.
        assert (await program.client.get("/")).status_code == 404
        yield program


async def rows(database: Database) -> list[tuple[str, str]]:
    """Return the tenant and the body of each note, which a superuser sees."""
    return await database.fetch("SELECT tenant, body FROM tenant_note ORDER BY id")


async def notes_of(program: Any, tenant: dict[str, str]) -> list[str]:
    response: httpx.Response = await program.client.get("/notes", headers=tenant)
    assert response.status_code == 200
    found: list[str] = response.json()
    return found


def begin_as(program: Any, tenant: str) -> Any:
    """Return the context of a block for a tenant, in this task."""
    program.tenant.set(tenant)
    return new_db_session_ctx()


# Tenants


async def test_two_tenants_on_one_connection_find_their_own_and_so_does_the_background_task(
    program: Any, database: Database
) -> None:
    for number in range(3):
        for tenant in ACME, GLOBEX:
            path = f"/notes/{tenant['X-Tenant']}-{number}"
            assert (await program.client.post(path, headers=tenant)).status_code == 201
            # The background task goes on after the answer.
            count = 2 * (2 * number + 1 + (tenant is GLOBEX))
            await until(partial(has_rows_and_rests, program, database, count))
    assert program.connect.pool_status().checked_in == 1
    assert await notes_of(program, ACME) == [
        *("acme-0", "there are 1 notes"),
        *("acme-1", "there are 3 notes"),
        *("acme-2", "there are 5 notes"),
    ]
    assert [body for body in await notes_of(program, GLOBEX) if body.startswith("acme")] == []
    assert len(await notes_of(program, GLOBEX)) == 6


async def has_rows_and_rests(program: Any, database: Database, count: int) -> bool:
    return len(await rows(database)) == count and connections_out(program.connect) == 0


async def test_concurrent_requests_of_two_tenants_find_their_own(
    program: Any, database: Database
) -> None:
    async def add_and_look(tenant: dict[str, str], number: int) -> None:
        name = tenant["X-Tenant"]
        response = await program.client.post(f"/notes/{name}-{number}", headers=tenant)
        assert response.status_code == 201
        found = [body for body in await notes_of(program, tenant) if not body.startswith("there")]
        assert f"{name}-{number}" in found
        assert [body for body in found if not body.startswith(name)] == []

    await asyncio.gather(*(add_and_look(t, n) for n in range(20) for t in (ACME, GLOBEX)))

    await until(partial(has_rows_and_rests, program, database, 80))
    for tenant in ACME, GLOBEX:
        counts = [int(b.split()[2]) for b in await notes_of(program, tenant) if "there are" in b]
        assert len(counts) == 20
        assert max(counts) < 40


async def test_a_request_of_nobody_is_refused(program: Any, database: Database) -> None:
    assert (await program.client.get("/notes")).status_code == 404
    assert (await program.client.post("/notes/x", headers={"X-Tenant": "x"})).status_code == 404
    assert await rows(database) == []


async def test_a_row_of_another_tenant_is_refused_and_none_is_changed(
    program: Any, database: Database
) -> None:
    assert (await program.client.post("/notes/a", headers=ACME)).status_code == 201
    await until(partial(has_rows_and_rests, program, database, 2))
    with pytest.raises(DBAPIError, match="row-level security"):
        async with begin_as(program, "globex"):
            (await db_session(program.connect)).add(program.Note(tenant="acme", body="b"))
    async with begin_as(program, "globex"):
        session = await db_session(program.connect)
        await session.execute(text("UPDATE tenant_note SET body = 'stolen'"))
        await session.execute(text("DELETE FROM tenant_note"))
    assert await rows(database) == [("acme", "a"), ("acme", "there are 1 notes")]


async def test_a_superuser_finds_the_rows_of_all(program: Any, database_url: URL) -> None:
    assert (await program.client.post("/notes/a", headers=ACME)).status_code == 201
    connect: DBConnect = DBConnect.from_url(
        database_url, transaction_settings=program.settings_of_tenant
    )
    async with connect, begin_as(program, "globex"):
        session = await db_session(connect)
        assert "a" in (await session.scalars(select(program.Note.body))).all()


async def test_a_transaction_after_an_early_commit_and_in_a_new_context_is_the_tenants(
    program: Any,
) -> None:
    async def tenant_here() -> str:
        session = await db_session(program.connect)
        return str(await session.scalar(text("SELECT current_setting('app.tenant')")))

    async with begin_as(program, "acme"):
        assert await tenant_here() == "acme"
        await commit_db_session(program.connect)
        assert await tenant_here() == "acme"
        assert await run_in_new_ctx(tenant_here) == "acme"
        session = await db_session(program.connect)
        async with session.begin_nested():
            assert await tenant_here() == "acme"
        assert await asyncio.create_task(tenant_here()) == "acme"


async def test_a_transaction_of_nobody_fails_and_one_without_settings_finds_nothing(
    program: Any, database: Database
) -> None:
    assert (await program.client.post("/notes/a", headers=ACME)).status_code == 201
    await until(partial(has_rows_and_rests, program, database, 2))
    with pytest.raises(LookupError):
        async with new_db_session_ctx():
            await (await db_session(program.connect)).execute(text("SELECT 1"))
    await program.owner.close()  # the next connection is a new one
    query = text("SELECT count(*) FROM tenant_note")
    setting = text("SELECT current_setting('app.tenant', true)")
    async with new_non_ctx_session(program.owner) as session:
        assert await session.scalar(setting) is None
        assert await session.scalar(query) == 0
        await session.commit()
        await session.execute(text("SELECT set_config('app.tenant', 'acme', true)"))
        assert await session.scalar(query) == 2
        await session.rollback()
        assert await session.scalar(setting) == ""
        assert await session.scalar(query) == 0


async def test_a_handler_of_the_connect_is_called_for_the_session_not_for_each_transaction(
    postgresql: str,
) -> None:
    calls: list[DBConnect] = []

    async def handler(connect: DBConnect) -> None:
        calls.append(connect)

    connect: DBConnect = DBConnect.from_url(postgresql, before_create_session_handler=handler)
    async with connect, new_db_session_ctx():
        for _ in range(2):
            await (await db_session(connect)).execute(text("SELECT 1"))
            await commit_db_session(connect)
    assert len(calls) == 1


async def test_at_autocommit_a_local_setting_is_gone_with_its_own_statement(
    program: Any, role_url: URL
) -> None:
    with pytest.raises(ValueError, match="AUTOCOMMIT"):
        DBConnect.from_url(
            role_url,
            isolation_level="AUTOCOMMIT",
            transaction_settings=program.settings_of_tenant,
        )
    connect = DBConnect.from_url(role_url, isolation_level="AUTOCOMMIT")
    async with connect, new_db_session_ctx():
        session: AsyncSession = await db_session(connect)
        await session.execute(text("SELECT set_config('app.tenant', 'acme', true)"))
        assert await session.scalar(text("SELECT current_setting('app.tenant')")) == ""


async def test_a_setting_that_is_not_local_stays_on_the_connection(connect: DBConnect) -> None:
    look = text("SELECT current_setting('statement_timeout')")
    for setting, after in (("SET LOCAL", "0"), ("SET", "7s")):
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(text(f"{setting} statement_timeout = '7s'"))
        async with new_db_session_ctx():
            assert await (await db_session(connect)).scalar(look) == after


async def test_a_session_in_no_context_begins_for_the_tenant(program: Any) -> None:
    program.tenant.set("acme")
    async with new_non_ctx_session(program.connect) as session:
        assert await session.scalar(text("SELECT current_setting('app.tenant')")) == "acme"


@pytest.mark.parametrize("place", ["around", "inside", "dependency"])
async def test_the_tenant_is_set_around_a_middleware_that_runs_the_application_in_a_task(
    program: Any, database: Database, place: str
) -> None:
    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    async def set_tenant() -> None:
        program.tenant.set("acme")

    app = FastAPI(dependencies=[Depends(set_tenant)] if place == "dependency" else [])
    if place == "inside":
        app.add_middleware(program.TenantMiddleware)
    app.middleware("http")(pass_on)
    add_fastapi_http_db_session_middleware(app)
    if place == "around":
        app.add_middleware(program.TenantMiddleware)

    @app.post("/notes/{body}")
    async def add_note(body: str) -> None:
        (await db_session(program.connect)).add(program.Note(body=body))

    async with http_client(app) as client:
        status = (await client.post("/notes/a", headers=ACME)).status_code
    assert status == (200 if place == "around" else 500)
    assert await rows(database) == ([("acme", "a")] if place == "around" else [])


# One request


async def test_of_two_first_notes_at_once_one_is_stored(
    program: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, count = asyncio.Barrier(2), program.count_notes

    async def count_together() -> int:
        found: int = await count()
        async with asyncio.timeout(10):
            await barrier.wait()
        return found

    monkeypatch.setattr(program, "count_notes", count_together)
    program.tenant.set("acme")
    outcomes = await asyncio.gather(
        *(run_in_new_ctx(program.add_first_note, name) for name in "ab"), return_exceptions=True
    )
    [error] = [outcome for outcome in outcomes if outcome is not None]
    assert is_transient_error(error)
    assert len(await rows(database)) == 1
    monkeypatch.undo()
    assert (await program.client.post("/first/c", headers=ACME)).status_code == 409
    assert (await program.client.post("/first/c", headers=GLOBEX)).status_code == 201


LEVEL = text(
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
    " current_setting('statement_timeout')"
)


async def test_the_settings_of_a_request_are_gone_with_its_transaction(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    async def look() -> int:
        session = await db_session(program.connect)
        found.append(tuple((await session.execute(LEVEL)).one()))
        await commit_db_session(program.connect)
        found.append(tuple((await session.execute(LEVEL)).one()))
        return 0

    monkeypatch.setattr(program, "count_notes", look)
    assert (await program.client.get("/report", headers=ACME)).json() == "0 notes"
    assert found == [("repeatable read", "on", "1min"), ("read committed", "off", "5s")]
    assert program.connect.pool_status().checked_in == 1


async def test_a_report_cannot_write(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    async def write() -> int:
        session = await db_session(program.connect)
        session.add(program.Note(body="a"))
        with pytest.raises(DBAPIError, match="read-only transaction") as raised:
            await session.flush()
        refused.append(raised.value)
        raise raised.value

    monkeypatch.setattr(program, "count_notes", write)
    assert (await program.client.get("/report", headers=ACME)).status_code == 500
    assert len(refused) == 1


async def test_a_level_that_comes_after_the_first_statement_is_ignored_with_a_warning(
    connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(LEVEL)
        with pytest.warns(SAWarning, match="execution_options ignored"):
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert (await session.execute(LEVEL)).one()[0] == "read committed"


async def test_a_level_that_is_set_in_sql_comes_too_late(program: Any) -> None:
    with pytest.raises(DBAPIError, match="must be called before any query"):
        async with begin_as(program, "acme"):
            session = await db_session(program.connect)
            await session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))


async def test_a_statement_that_takes_too_long_is_ended_and_that_of_a_report_is_not(
    program: Any, role_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "STATEMENT_TIMEOUT", "100ms")
    outside = Outside(role_url.render_as_string(hide_password=False))
    async with outside.connection() as connection:
        await connection.execute(text("LOCK TABLE tenant_note"))
        report = asyncio.create_task(program.client.get("/report", headers=ACME))
        await until(lambda: database.pid_of("%count(tenant_note%"))
        assert (await program.client.get("/notes", headers=ACME)).status_code == 500
        with pytest.raises(DBAPIError, match="canceling statement due to statement timeout"):
            async with begin_as(program, "acme"):
                await program.get_notes()
        assert not report.done()
    assert (await report).json() == "0 notes"
