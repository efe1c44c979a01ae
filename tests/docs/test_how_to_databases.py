"""The programs of the how-to pages on databases, run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import URL, text
from starlette.responses import PlainTextResponse, Response

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
)
from tests.helpers.cluster import primary_and_standby
from tests.helpers.database import Database
from tests.helpers.names import unique_name
from tests.helpers.pgbouncer import pgbouncer, pgbouncer_binary
from tests.helpers.postgres import PASSWORD_ROLE, frozen
from tests.helpers.programs import Outside, is_all_closed, load_program, until
from tests.helpers.serving import http_client

PID = text("SELECT pg_backend_pid()")


async def pid(connect: DBConnect) -> int:
    """Return the server process of a new session."""
    async with new_db_session_ctx():
        session = await db_session(connect)
        found: int = (await session.execute(PID)).scalar_one()
        return found


# Engines and pools


@pytest_asyncio.fixture
async def visits(postgresql: str, load: Callable[[str, str], Any]) -> Any:
    return load("engines_and_pools", postgresql)


async def test_the_health_tells_of_the_pool(visits: Any, postgresql: str) -> None:
    async with http_client(visits.app) as client:
        assert (await client.post("/visits/home")).status_code == 201
        response = await client.get("/ready")
        assert response.status_code == 200
        assert response.json() == {
            "size": 5,
            "checked_in": 1,
            "checked_out": 0,
            "overflow": 0,
            "capacity": 10,
            "waiting": 0,
        }
        assert await Outside(postgresql).rows("SELECT page FROM visit") == ["home"]
    assert is_all_closed(visits)


async def test_a_full_pool_is_not_ready(visits: Any) -> None:
    async with http_client(visits.app) as client:
        sessions = [await visits.connect.create_session() for _ in range(10)]
        for session in sessions:
            await session.execute(PID)
        response = await client.get("/ready")
        assert response.status_code == 503
        assert response.json()["checked_out"] == response.json()["capacity"] == 10
        # The ping waits for 2 seconds, a request for 3, its pool_timeout.
        assert (await client.post("/visits/home")).status_code == 500
        for session in sessions:
            await session.close()
        assert (await client.get("/ready")).status_code == 200


async def test_the_options_of_the_session_are_those_of_the_page(visits: Any) -> None:
    session = await visits.connect.create_session()
    assert session.sync_session.autoflush is False
    assert session.sync_session.expire_on_commit is False
    await visits.connect.close()


@pytest_asyncio.fixture
async def role(database: Database) -> AsyncGenerator[str]:
    """Return a role that needs a password, "old" at first."""
    name = unique_name(PASSWORD_ROLE)
    await database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'old'")
    yield name
    await database.execute(f"DROP ROLE {name}")


async def test_a_token_is_fetched_for_each_connection_and_a_secret_for_the_engine(
    database_url: URL, database: Database, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = database_url.set(username=role).render_as_string(hide_password=False)
    program = load_program(
        monkeypatch,
        "engines_and_pools",
        DATABASE_URL=url,
        DATABASE_TOKEN="old",
        DATABASE_SECRET="old",
    )
    async with program.with_token, program.with_secret, AsyncExitStack() as stack:
        for connect in program.with_token, program.with_secret:
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.execute(PID)
        await database.execute(f"ALTER ROLE {role} PASSWORD 'new'")
        monkeypatch.setenv("DATABASE_TOKEN", "new")
        monkeypatch.setenv("DATABASE_SECRET", "new")
        # The connection in the pool is in use: another one is opened.
        assert await pid(program.with_token)
        with pytest.raises(Exception, match="password authentication failed"):
            await pid(program.with_secret)
        await program.with_secret.connect("127.0.0.1")  # makes the engine anew
        assert await pid(program.with_secret)


# Hosted PostgreSQL


async def test_a_hosted_database_is_looked_at(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The binaries of the tests have no TLS: tests/engine/test_libpq.py tries each sslmode.
    url = postgresql.replace("+asyncpg", "") + "?sslmode=prefer&channel_binding=require"
    program = load_program(monkeypatch, "hosted_postgresql", DATABASE_URL=url)
    await program.main()
    assert capsys.readouterr().out.startswith("PostgreSQL ")
    assert is_all_closed(program)


@pytest.mark.parametrize("query", ["sslmode=require", "sslmode=verify-full&sslrootcert=system"])
async def test_a_server_without_tls_is_refused(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    url = f"{postgresql}?{query}"
    program = load_program(monkeypatch, "hosted_postgresql", DATABASE_URL=url)
    async with program.connect:
        with pytest.raises(ConnectionError, match="rejected SSL upgrade"):
            await program.connect.ping()


@pytest.mark.skipif(
    pgbouncer_binary() is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)
async def test_a_pooler_works_without_prepared_statements(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pgbouncer(database_url, default_pool_size=2) as url:
        # Made anew, as another process would: the names of statements begin at 1 again.
        for _ in range(3):
            program = load_program(
                monkeypatch,
                "hosted_postgresql",
                DATABASE_URL=url.render_as_string(hide_password=False),
                BEHIND_PGBOUNCER="1",
            )
            async with program.connect:
                pids = await asyncio.gather(*(pid(program.connect) for _ in range(10)))
                assert len(set(pids)) <= 2


@pytest.mark.skipif(
    pgbouncer_binary() is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)
async def test_a_pooler_refuses_a_setting_and_gives_that_of_a_session_to_others(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pgbouncer(database_url, default_pool_size=1) as url:
        shown = url.render_as_string(hide_password=False)
        program = load_program(
            monkeypatch, "hosted_postgresql", DATABASE_URL=shown, BEHIND_PGBOUNCER="1"
        )
        arguments = program.WITHOUT_PREPARED_STATEMENTS
        settings = {"server_settings": {"jit": "off"}}
        with_jit = DBConnect.from_url(shown, connect_args=arguments | settings)
        another = DBConnect.from_url(shown, connect_args=arguments)

        async def timeouts_elsewhere() -> tuple[str, str]:
            async with new_db_session_ctx():
                session = await db_session(another)
                names = "statement_timeout", "lock_timeout"
                statement, lock = [await session.scalar(text(f"SHOW {n}")) for n in names]
                return statement, lock

        async with program.connect, with_jit, another:
            with pytest.raises(Exception, match="unsupported startup parameter: jit"):
                await with_jit.ping()
            async with new_db_session_ctx():
                session = await db_session(program.connect)
                await session.execute(text("SET statement_timeout = '1234ms'"))
                await session.execute(text("SET LOCAL lock_timeout = '77ms'"))
            assert await timeouts_elsewhere() == ("1234ms", "0")


# Idle connections


async def test_a_pooled_connection_costs_less_than_a_new_one(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program(monkeypatch, "idle_connections", DATABASE_URL=postgresql)
    await program.main()
    output = capsys.readouterr().out
    match = re.fullmatch(r"a pooled connection: (.*) ms\na new connection: (.*) ms\n", output)
    assert match is not None
    pooled, new = map(float, match.groups())
    assert pooled < new
    assert is_all_closed(program)


async def test_the_pool_shrinks_to_the_connection_that_stays(
    postgresql: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program(
        monkeypatch, "idle_connections", DATABASE_URL=postgresql, IDLE_TIMEOUT="0.1"
    )
    connect = program.connect
    async with connect:
        await asyncio.gather(*(wait_and_ping(connect) for _ in range(4)))
        assert await database.connections() > 1
        await until(lambda: connect.pool_status().checked_in == 1)

        async def is_one() -> bool:
            return await database.connections() == 1

        await until(is_one)


async def wait_and_ping(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(text("SELECT pg_sleep(0.05)"))


async def test_work_that_takes_long_is_not_idle(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program(
        monkeypatch, "idle_connections", DATABASE_URL=postgresql, IDLE_TIMEOUT="0.05"
    )
    async with program.connect, new_db_session_ctx():
        session = await db_session(program.connect)
        first = await session.scalar(PID)
        await session.execute(text("SELECT pg_sleep(0.3)"))
        assert await session.scalar(PID) == first


# Failover


async def test_every_order_is_taken_while_the_primary_dies_and_the_standby_is_promoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with primary_and_standby("on") as (primary, standby):
        program = load_program(
            monkeypatch,
            "failover",
            DATABASE_URL=primary.url,
            DATABASE_HOSTS=f"{primary.host},{standby.host}",
        )
        acknowledged, answers, errors = 0, set[int](), list[Exception]()

        # uvicorn closes the connection of a client after an error that gets that far, and the
        # client may have sent its next request on it by then.
        async def note(_: Any, error: Exception) -> Response:
            errors.append(error)
            return PlainTextResponse("look first", 500)

        program.app.add_exception_handler(CommitOutcomeUnknownError, note)
        async with http_client(program.app) as client:
            is_over = False

            async def place_orders() -> None:
                nonlocal acknowledged
                while not is_over:
                    response = await client.post("/orders/tea")
                    answers.add(response.status_code)
                    acknowledged += response.status_code == 201

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(place_orders())
                await until(lambda: acknowledged > 50)
                await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(standby.promote)
                before = acknowledged
                await until(lambda: acknowledged > before + 50)
                is_over = True
            assert program.connect.host == standby.host

            # A commit that nobody can know the outcome of is the only one that may fail.
            assert answers == ({201, 500} if errors else {201})
            query = "SELECT count(*) FROM failover_order"
            [stored] = await Outside(standby.url).rows(query)
            assert acknowledged <= stored <= acknowledged + len(errors)

            async with program.reports:
                assert program.reports.host == primary.host
                await program.switch_over(standby.host)
                await program.reports.ping()
        assert is_all_closed(program)


@pytest.mark.skipif(
    version("asyncpg").split(".") < ["0", "32"], reason="asyncpg waits for a silent server here"
)
async def test_a_silent_host_is_given_up_after_the_command_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with primary_and_standby() as (primary, standby):
        program = load_program(
            monkeypatch,
            "failover",
            DATABASE_URL=f"{primary.url}?command_timeout=0.5",
            DATABASE_HOSTS=f"{primary.host},{standby.host}",
        )
        async with program.connect:
            await pid(program.connect)
            with frozen(primary):
                with pytest.raises(TimeoutError):
                    await pid(program.connect)
                await asyncio.to_thread(standby.promote)

                async def is_found() -> bool:
                    try:
                        return bool(await pid(program.connect))
                    except TimeoutError:
                        return False

                await until(is_found)
                assert program.connect.host == standby.host
