"""The program of the how-to page on databases per tenant, run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import URL, make_url

from context_async_sqlalchemy import DBConnect
from tests.helpers.database import Database
from tests.helpers.names import unique_name
from tests.helpers.programs import Outside, load_program, until
from tests.helpers.proxy import Call, proxy
from tests.helpers.serving import http_client


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def url(
    request: pytest.FixtureRequest, database_url: URL, database: Database, tmp_path: Path
) -> AsyncGenerator[URL]:
    """Return a URL to whose database the names of the tenants are appended."""
    if request.param == "sqlite":
        yield make_url(f"sqlite+aiosqlite:///{tmp_path / 'notes'}")
        return
    url = database_url.set(database=unique_name("context_async_sqlalchemy_notes"))
    names = [f"{url.database}_{tenant}" for tenant in ("acme", "globex", "initech")]
    for name in names:
        await database.execute(f"CREATE DATABASE {name}")
    yield url
    for name in names:
        await database.execute(f"DROP DATABASE {name}")  # which fails if a connection is left


@pytest_asyncio.fixture
async def program(url: URL, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Any]:
    """Return the program, which keeps two connects, served, with a client in it."""
    text = url.render_as_string(hide_password=False)
    program = load_program(monkeypatch, "databases_per_tenant", DATABASE_URL=text)
    program.tenants.limit = 2
    program.made = note_connects(monkeypatch, program)
    async with http_client(program.app) as program.client:
        assert (await program.client.get("/")).status_code == 404
        yield program
    assert program.tenants._opened == {}
    assert all(connect.engine is None for connect in program.made)


def note_connects(monkeypatch: pytest.MonkeyPatch, program: Any) -> list[DBConnect]:
    made: list[DBConnect] = []
    make: Callable[[str], DBConnect] = program.make_connect

    def make_and_note(name: str) -> DBConnect:
        made.append(make(name))
        return made[-1]

    monkeypatch.setattr(program, "make_connect", make_and_note)
    return made


only_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


def header(tenant: str) -> dict[str, str]:
    return {"X-Tenant": tenant}


async def test_each_tenant_has_its_own_notes(program: Any, url: URL) -> None:
    async def add(tenant: str, number: int) -> None:
        path = f"/notes/{tenant}-{number}"
        assert (await program.client.post(path, headers=header(tenant))).status_code == 201

    await asyncio.gather(*(add(tenant, n) for n in range(20) for tenant in program.TENANTS))
    for tenant in program.TENANTS:
        own = url.set(database=f"{url.database}_{tenant}").render_as_string(hide_password=False)
        # The background tasks end after their responses.
        await until(partial(has_notes, Outside(own), 40))
        notes = (await program.client.get("/notes", headers=header(tenant))).json()
        expected = [f"{tenant}-{n}{also}" for n in range(20) for also in ("", " is indexed")]
        assert sorted(notes) == sorted(expected)


async def has_notes(outside: Outside, number: int) -> bool:
    return await outside.rows("SELECT count(*) FROM note") == [number]


async def test_no_more_connects_than_the_limit_stay_open(program: Any) -> None:
    for tenant in program.TENANTS * 3:
        await program.client.get("/notes", headers=header(tenant))
        assert len(program.tenants._opened) <= 2
        assert sum(connect.engine is not None for connect in program.made) <= 2
    # With one too few, each tenant was dropped before its turn came again.
    assert len(program.made) >= 3 * len(program.TENANTS)


async def test_a_connect_in_use_is_not_closed(program: Any) -> None:
    async with program.tenants.use("acme") as connect:
        await (await connect.create_session()).close()
        engine = connect.engine
        for tenant in ("globex", "initech") * 2:
            await program.client.get("/notes", headers=header(tenant))
        assert connect.engine is engine
        async with program.tenants.use("acme") as same:
            assert same is connect


@pytest.mark.parametrize("headers", [{}, header("evil"), header("")])
async def test_who_is_no_tenant_gets_no_connect(program: Any, headers: dict[str, str]) -> None:
    made = len(program.made)
    assert (await program.client.get("/notes", headers=headers)).status_code == 404
    assert len(program.made) == made


@only_postgresql
async def test_a_tenant_whose_database_is_silent_or_down_is_alone_with_it(
    program: Any, url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request after the other drops the connect of the other tenant, too."""
    program.tenants.limit = 1
    await program.tenants.close_unused(0)
    make, answers = program.make_connect, asyncio.Event()

    async def wait(_: Call) -> None:
        await answers.wait()

    async def notes_of(tenant: str) -> int:
        response = await program.client.get("/notes", headers=header(tenant))
        status: int = response.status_code
        return status

    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(proxy(str(url.host), url.port or 0, wait))

        def make_through_proxy(name: str) -> DBConnect:
            if name != "acme":
                return make(name)  # type: ignore[no-any-return]
            monkeypatch.setattr(program, "DATABASE_URL", url.set(host="127.0.0.1", port=port))
            try:
                return make(name)  # type: ignore[no-any-return]
            finally:
                monkeypatch.setattr(program, "DATABASE_URL", url)

        monkeypatch.setattr(program, "make_connect", make_through_proxy)
        waiting = [asyncio.create_task(notes_of("acme")) for _ in range(10)]
        await until(lambda: "acme" in program.tenants._opened)
        async with asyncio.timeout(10):
            assert [await notes_of("globex") for _ in range(10)] == [200] * 10
            assert not any(request.done() for request in waiting)
            answers.set()
            assert await asyncio.gather(*waiting) == [200] * 10
    # The proxy is gone.
    statuses = await asyncio.gather(*(notes_of(tenant) for tenant in ("acme", "globex") * 5))
    assert statuses == [503, 200] * 5
    assert list(program.tenants._opened) in (["acme"], ["globex"])


@only_postgresql
async def test_the_others_start_without_a_tenant_whose_database_is_down(
    url: URL, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await database.execute(f"ALTER DATABASE {url.database}_acme ALLOW_CONNECTIONS false")
    text = url.render_as_string(hide_password=False)
    program = load_program(monkeypatch, "databases_per_tenant", DATABASE_URL=text)
    async with http_client(program.app, log_level="critical") as client:
        assert (await client.get("/notes", headers=header("globex"))).status_code == 200
        assert (await client.get("/notes", headers=header("acme"))).status_code >= 500
    assert "The database of acme is not ready" in caplog.messages
