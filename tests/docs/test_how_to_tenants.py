"""The programs of the page on tenants, run for two tenants at once."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI, HTTPException, Request
from sqlalchemy import URL, NullPool, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    run_in_new_ctx,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, server_url
from tests.helpers.names import unique_name
from tests.helpers.programs import load_program, until
from tests.helpers.serving import http_client

TENANTS = ("acme", "globex")
ACME, GLOBEX = {"X-Tenant": "acme"}, {"X-Tenant": "globex"}


@pytest_asyncio.fixture(
    params=["databases_per_tenant", "schema_per_tenant", "transaction_settings"]
)
async def program(
    request: pytest.FixtureRequest, role_url: URL, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Any]:
    """Return a program, served, with two connections at most for each of its connects.

    It has a client, and `session_here`, which returns the session of the tenant.
    """
    connects: list[DBConnect] = []
    from_url = DBConnect.from_url

    def with_two_connections(url: Any, **options: Any) -> DBConnect:
        connects.append(from_url(url, **options | {"pool_size": 2, "max_overflow": 0}))
        return connects[-1]

    monkeypatch.setattr(DBConnect, "from_url", with_two_connections)
    has_databases = request.param == "databases_per_tenant"
    async with databases(role_url) if has_databases else nullcontext(role_url) as url:
        at = url.render_as_string(hide_password=False)
        program = load_program(monkeypatch, request.param, DATABASE_URL=at)
        if has_databases:
            program.TENANTS, program.session_here = TENANTS, program.tenant_session
        else:
            program.session_here = partial(db_session, program.connect)
        async with http_client(program.app, log_level="critical") as program.client:
            assert (await program.client.get("/")).status_code == 404
            yield program
            await until(lambda: not any(map(connections_out, connects)))
        assert all(connect.engine is None for connect in connects)


@asynccontextmanager
async def databases(url: URL) -> AsyncGenerator[URL]:
    """Make a database for each tenant; yield a URL to whose database their names are appended."""
    url = url.set(database=unique_name("context_async_sqlalchemy_tenants"))
    engine = create_async_engine(server_url(), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for name in TENANTS:
            await connection.execute(
                text(f"CREATE DATABASE {url.database}_{name} OWNER {url.username}")
            )
        yield url
        for name in TENANTS:  # which fails if a connection is left
            await connection.execute(text(f"DROP DATABASE {url.database}_{name}"))


a_schema_for_each = pytest.mark.parametrize("program", ["schema_per_tenant"], indirect=True)
a_row_for_each = pytest.mark.parametrize("program", ["transaction_settings"], indirect=True)


async def notes_of(program: Any, tenant: dict[str, str]) -> list[str]:
    response = await program.client.get("/notes", headers=tenant)
    assert response.status_code == 200
    notes: list[str] = response.json()
    return notes


# How a request may end, once it has written.


async def succeed(_: AsyncSession) -> None:
    pass


async def commit_and_fail(session: AsyncSession) -> None:
    await session.commit()
    await session.execute(text("SELECT 1"))
    raise ZeroDivisionError


async def roll_back_and_go_on(session: AsyncSession) -> None:
    await session.rollback()


async def refuse(_: AsyncSession) -> None:
    raise HTTPException(409)


async def fail_in_a_statement(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1 / 0"))


async def be_cancelled_in_a_statement(session: AsyncSession) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await session.execute(text("SELECT pg_sleep(10)"))


ENDS: dict[str, Callable[[AsyncSession], Awaitable[None]]] = {
    end.__name__: end
    for end in (
        *(succeed, commit_and_fail, roll_back_and_go_on),
        *(refuse, fail_in_a_statement, be_cancelled_in_a_statement),
    )
}
KEPT = {"succeed", "commit_and_fail"}


async def test_two_tenants_at_once_find_their_own_however_either_ends(program: Any) -> None:
    both_have_written = asyncio.Barrier(2)
    seen: dict[str, set[str]] = defaultdict(set)
    backends: dict[str, set[int]] = defaultdict(set)

    app: FastAPI = program.app

    @app.post("/write/{body}/{end}")
    async def write(body: str, end: str, http_request: Request) -> None:
        tenant = http_request.headers["x-tenant"]
        session = await program.session_here()

        async def look() -> None:
            seen[tenant].update(await session.scalars(select(program.Note.body)))
            backends[tenant].add(await session.scalar(text("SELECT pg_backend_pid()")))

        session.add(program.Note(body=body))
        await session.flush()
        async with asyncio.timeout(10):
            await both_have_written.wait()
        await look()
        await ENDS[end](session)
        await look()  # in the transaction that is still open, or in another one

    kept: dict[str, list[str]] = defaultdict(list)
    for number, ends in enumerate(itertools.combinations_with_replacement(ENDS, 2)):
        requests = []
        for tenant, end in zip((ACME, GLOBEX), ends, strict=True):
            name = tenant["X-Tenant"]
            body = f"{name}-{number}"
            kept[name] += [body] if end in KEPT else []
            requests.append(program.client.post(f"/write/{body}/{end}", headers=tenant))
        await asyncio.gather(*requests)
        found = await asyncio.gather(notes_of(program, ACME), notes_of(program, GLOBEX))
        assert tuple(found) == (kept["acme"], kept["globex"])
    for name in "acme", "globex":
        assert len(seen[name]) == 21
        assert {body.partition("-")[0] for body in seen[name]} == {name}
    # With a database for each there is nothing else to share.
    assert bool(backends["acme"] & backends["globex"]) is hasattr(program, "connect")


async def test_who_is_no_tenant_gets_no_session(program: Any) -> None:
    app: FastAPI = program.app

    @app.post("/session")
    async def ask() -> None:
        await program.session_here()

    for headers in {}, {"X-Tenant": "public"}, {"X-Tenant": ""}:
        assert (await program.client.post("/session", headers=headers)).status_code == 404
    with pytest.raises(LookupError):
        async with new_db_session_ctx():
            await (await program.session_here()).execute(text("SELECT 1"))


# A schema for each


def begin_as(program: Any, tenant: str) -> Any:
    """Return the context of a block for a tenant, in this task."""
    program.tenant.set(tenant)
    return new_db_session_ctx()


@a_schema_for_each
async def test_concurrent_requests_and_background_tasks_are_in_their_own_schema(
    program: Any, database: Database
) -> None:
    async def add(tenant: dict[str, str], number: int) -> None:
        path = f"/notes/{tenant['X-Tenant']}-{number}"
        assert (await program.client.post(path, headers=tenant)).status_code == 201

    async def is_stored(name: str) -> bool:
        found = await database.fetch(f"SELECT body FROM {name}.note")
        expected = [f"{name}-{n}{also}" for n in range(20) for also in ("", " is indexed")]
        return sorted(body for (body,) in found) == sorted(expected)

    await asyncio.gather(*(add(tenant, n) for n in range(20) for tenant in (ACME, GLOBEX)))
    for name in program.TENANTS:
        await until(partial(is_stored, name))


@a_schema_for_each
async def test_a_session_stays_in_the_schema_for_which_it_was_made(program: Any) -> None:
    async def bodies(read_only: Any = None) -> list[str]:
        session = await db_session(program.connect, read_only=read_only)
        return list(await session.scalars(select(program.Note.body)))

    for name in program.TENANTS:
        async with begin_as(program, name):
            (await db_session(program.connect)).add(program.Note(body=name))
            await commit_db_session(program.connect)
            assert await bodies() == [name]
    async with begin_as(program, "acme"):
        assert await bodies() == ["acme"]
        program.tenant.set("globex")
        await commit_db_session(program.connect)
        assert await bodies() == ["acme"]
        assert await run_in_new_ctx(bodies) == ["globex"]
        assert await bodies(read_only=True) == ["globex"]  # which is another session
    for name in program.TENANTS * 2:
        async with begin_as(program, name):
            assert await bodies(read_only=True) == [name]
            assert await bodies(read_only="snapshot") == [name]


@a_schema_for_each
async def test_the_schema_does_not_hold_for_text_and_not_for_the_engine(program: Any) -> None:
    with pytest.raises(DBAPIError, match='relation "note" does not exist'):
        async with begin_as(program, "globex"):
            await (await db_session(program.connect)).execute(text("SELECT body FROM note"))
    async with program.connect.engine.connect() as connection:
        with pytest.raises(DBAPIError, match='relation "note" does not exist'):
            await connection.execute(select(program.Note))


@a_schema_for_each
async def test_a_search_path_that_begins_with_each_transaction_holds_for_text(
    program: Any, role_url: URL
) -> None:
    for name in program.TENANTS:
        async with begin_as(program, name):
            (await db_session(program.connect)).add(program.Note(body=name))
    connect: DBConnect = DBConnect.from_url(
        role_url, transaction_settings=lambda: {"search_path": program.tenant.get()}
    )

    async def write_and_look(name: str, both: asyncio.Barrier) -> list[list[str]]:
        found = []
        for _ in range(4):  # asyncpg keeps the statements that a connection has prepared
            async with begin_as(program, name):
                session = await db_session(connect)
                found.append(list(await session.scalars(text("SELECT body FROM note"))))
                await both.wait()
                found.append(list(await session.scalars(select(program.Note.body))))
        return found

    async with connect, asyncio.timeout(10):
        both = asyncio.Barrier(2)
        found = await asyncio.gather(*(write_and_look(n, both) for n in program.TENANTS))
    assert found == [[["acme"]] * 8, [["globex"]] * 8]


# A row for each


@a_row_for_each
async def test_a_context_of_two_tenants_has_the_objects_of_both(program: Any) -> None:
    async with begin_as(program, "acme"):
        session = await db_session(program.connect)
        note = program.Note(body="of acme")
        session.add(note)
        await commit_db_session(program.connect)
        program.tenant.set("globex")
        # No query is sent for what the session has, and so no policy holds.
        assert await session.get(program.Note, note.id) is note
        assert (await session.scalars(select(program.Note))).all() == []


@a_row_for_each
async def test_a_unique_constraint_sees_the_rows_of_all(program: Any) -> None:
    async with new_db_session_ctx():
        session = await db_session(program.owner)
        await session.execute(text("CREATE UNIQUE INDEX ON tenant_note (body)"))
    async with begin_as(program, "acme"):
        (await db_session(program.connect)).add(program.Note(body="a"))
    with pytest.raises(IntegrityError):
        async with begin_as(program, "globex"):
            (await db_session(program.connect)).add(program.Note(body="a"))
