"""The health of a database, and the lifespan that closes it, over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import URL, Column, Integer, MetaData, NullPool, Table, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, PoolStatus, new_non_ctx_session
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from context_async_sqlalchemy.starlette_utils import database_health, database_lifespan
from tests.helpers.database import Database, make_connect
from tests.helpers.postgres import free_port
from tests.helpers.programs import until
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client


def make_starlette(connect: DBConnect, **options: Any) -> Starlette:
    return Starlette(routes=[Route("/health", database_health(connect, **options))])


def make_added(connect: DBConnect, **options: Any) -> Starlette:
    app = Starlette()
    app.add_route("/health", database_health(connect, **options))
    return app


def make_fastapi(connect: DBConnect, **options: Any) -> Starlette:
    app = FastAPI()
    app.add_api_route("/health", database_health(connect, **options))
    return app


async def health_of(app: Starlette) -> tuple[int, Any]:
    async with http_client(app) as client:
        response = await client.get("/health")
    assert response.headers["cache-control"] == "no-store"
    return response.status_code, response.json()


EMPTY = {"size": 5, "checked_in": 0, "checked_out": 0, "overflow": 0, "capacity": 15, "waiting": 0}


@pytest.mark.parametrize("make_app", [make_starlette, make_added, make_fastapi])
async def test_a_database_that_answers_is_healthy(
    connect: DBConnect, database: Database, make_app: Any
) -> None:
    assert await health_of(make_app(connect)) == (200, {"healthy": True, "pool": EMPTY})
    await database.is_left_by_all()


async def test_a_full_pool_is_shown_and_not_waited_for(
    database_url: URL, database: Database
) -> None:
    async with (
        make_connect(database_url, pool_size=1, max_overflow=1) as connect,
        AsyncExitStack() as stack,
    ):
        for _ in range(2):
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.execute(text("SELECT 1"))
        pool = {
            "size": 1,
            "checked_in": 0,
            "checked_out": 2,
            "overflow": 1,
            "capacity": 2,
            "waiting": 0,
        }
        assert await health_of(make_starlette(connect)) == (200, {"healthy": True, "pool": pool})
        assert await database.connections() == 2


async def test_a_database_that_is_away_is_not_healthy_and_its_password_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"postgresql://app:hunter2@127.0.0.1:{free_port()}/shop"
    async with DBConnect.from_url(url) as connect:
        with caplog.at_level(logging.WARNING, "context_async_sqlalchemy"):
            status, body = await health_of(make_starlette(connect))
    assert (status, body) == (503, {"healthy": False, "pool": EMPTY})
    [record] = [r for r in caplog.records if r.name == "context_async_sqlalchemy"]
    assert "ConnectionRefusedError" in record.getMessage()
    assert "hunter2" not in record.getMessage()


async def test_a_password_in_the_message_of_an_error_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse() -> Any:
        raise OSError("no route for hunter2, postgresql://app:hunter2@db/shop")

    url = "postgresql://app:hunter2@db.example.com/shop"
    async with DBConnect.from_url(url, async_creator=refuse) as connect:
        with caplog.at_level(logging.WARNING, "context_async_sqlalchemy"):
            assert (await health_of(make_starlette(connect)))[0] == 503
    [record] = [r for r in caplog.records if r.name == "context_async_sqlalchemy"]
    assert "no route for ***, postgresql://app:***@db/shop" in record.getMessage()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_database_that_says_nothing_is_not_healthy_after_the_timeout(
    database_url: URL, database: Database, caplog: pytest.LogCaptureFixture, driver: str
) -> None:
    tasks = asyncio.all_tasks()
    silent = asyncio.Event()

    async def hang(call: Call) -> Fault | None:
        if call.statement != "connect":
            silent.set()
            await asyncio.Event().wait()
        return None

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, hang) as port:
        url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        async with (
            make_connect(url) as connect,
            http_client(make_starlette(connect, timeout=0.5)) as client,
        ):
            # asyncpg closes such a connection in 2 seconds, psycopg in 5.
            async with asyncio.timeout(2):
                assert (await client.get("/health")).status_code == 503
    assert silent.is_set()
    assert "no answer within 0.5 seconds" in caplog.text
    await until(lambda: asyncio.all_tasks() <= tasks)
    await database.is_left_by_all()


async def test_sixty_probes_at_once_open_one_connection(
    database_url: URL, database: Database
) -> None:
    connections, probes = 0, 0
    everybody_asks = asyncio.Event()

    async def count(call: Call) -> Fault | None:
        nonlocal connections
        connections += call.statement == "connect"
        await everybody_asks.wait()
        return None

    assert database_url.host is not None
    assert database_url.port is not None
    async with (
        proxy(database_url.host, database_url.port, count) as port,
        make_connect(database_url.set(host="127.0.0.1", port=port)) as connect,
    ):
        health = make_starlette(connect, timeout=30)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal probes
            probes += 1
            if probes == 60:
                everybody_asks.set()
            await health(scope, receive, send)

        async with http_client(app, lifespan="off") as client:
            responses = await asyncio.gather(*(client.get("/health") for _ in range(60)))
    assert {response.status_code for response in responses} == {200}
    assert connections == 1


async def test_an_answer_is_shared_for_about_a_second_and_then_the_database_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async def refuse() -> Any:
        nonlocal asked
        asked += 1
        raise ConnectionRefusedError

    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("context_async_sqlalchemy._http.health.time", clock)
    async with DBConnect.from_url("postgresql://db/shop", async_creator=refuse) as connect:
        health: Any = database_health(connect)
        for moment, expected in (100.0, 1), (100.9, 1), (101.1, 2), (102.0, 2), (102.2, 3):
            now = moment
            assert (await health(None)).status_code == 503
            assert asked == expected
        await connect.change_host("another")
        assert (await health(None)).status_code == 503
        assert asked == 4


async def test_a_client_that_hangs_up_leaves_the_others_their_answer() -> None:
    opened, may_open = asyncio.Event(), asyncio.Event()

    async def create_engine(_: str) -> AsyncEngine:
        opened.set()
        await may_open.wait()
        return create_async_engine("sqlite+aiosqlite://")

    async with DBConnect(create_engine, async_sessionmaker, host="slow") as connect:
        health: Any = database_health(connect, timeout=30)
        first = asyncio.create_task(health(None))
        await opened.wait()
        second = asyncio.create_task(health(None))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        may_open.set()
        assert (await second).status_code == 200


def test_each_event_loop_asks_for_itself() -> None:
    is_silent = True

    async def create_engine(_: str) -> AsyncEngine:
        if is_silent:
            await asyncio.Event().wait()
        return create_async_engine("sqlite+aiosqlite://")

    async def hang_up() -> None:
        task = asyncio.create_task(health(None))
        await asyncio.sleep(0)
        task.cancel()

    async def ask() -> int:
        async with connect:
            status: int = (await health(None)).status_code
            return status

    connect = DBConnect(create_engine, async_sessionmaker, host="slow")
    health: Any = database_health(connect)
    with asyncio.Runner() as one, asyncio.Runner() as two:
        one.run(hang_up())
        is_silent = False
        assert two.run(ask()) == 200


async def test_what_has_not_ended_in_time_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def create_engine(_: str) -> AsyncEngine:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    connect = DBConnect(create_engine, async_sessionmaker, host="silent")
    assert (await health_of(make_starlette(connect, timeout=0.1)))[0] == 503
    async with asyncio.timeout(30):
        await cancelled.wait()


@pytest.mark.parametrize("name", ["file", "memory"])
async def test_a_database_without_a_host_is_healthy(tmp_path: Path, name: str) -> None:
    url = "sqlite://" if name == "memory" else f"sqlite:///{tmp_path / 'health.db'}"
    async with DBConnect.from_url(url) as connect:
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("CREATE TABLE kept (id INTEGER)"))
            await session.commit()
        assert (await health_of(make_starlette(connect)))[0] == 200
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("SELECT * FROM kept"))


async def test_the_route_of_a_dependency_is_added_when_it_is_initialized(tmp_path: Path) -> None:
    dependency = DBSessionDependency()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await dependency.initialize(f"sqlite:///{tmp_path / 'health.db'}")
        app.add_api_route("/health", database_health(dependency.connect))
        yield
        await dependency.aclose()

    with pytest.raises(RuntimeError, match="not initialized"):
        database_health(dependency.connect)
    assert (await health_of(FastAPI(lifespan=lifespan)))[0] == 200


async def test_the_handler_of_the_connect_chooses_the_host(database_url: URL) -> None:
    hosts: list[str] = []

    def create_engine(host: str) -> AsyncEngine:
        hosts.append(host)
        return engines.pop()

    async def choose(connect: DBConnect) -> None:
        await connect.change_host("127.0.0.1")

    engines = [create_async_engine(database_url.set(host="127.0.0.1")) for _ in range(2)]
    connect = DBConnect(create_engine, async_sessionmaker, before_create_session_handler=choose)
    async with connect:
        assert (await health_of(make_starlette(connect)))[0] == 200
    assert hosts == ["127.0.0.1", "127.0.0.1"]


async def test_an_engine_that_the_creator_keeps_is_not_closed(database_url: URL) -> None:
    engine = create_async_engine(database_url)
    async with DBConnect(lambda _: engine, async_sessionmaker, host="kept") as connect:
        await connect.ping()
        assert (await health_of(make_starlette(connect)))[0] == 200
        assert connect.pool_status().checked_in == 1


async def test_a_connect_that_has_no_host_is_not_healthy(caplog: pytest.LogCaptureFixture) -> None:
    def create_engine(_: str) -> AsyncEngine:
        raise AssertionError

    connect = DBConnect(create_engine, async_sessionmaker)
    assert (await health_of(make_starlette(connect)))[0] == 503
    assert "host is not set" in caplog.text
    with pytest.raises(ValueError, match="host is not set"):
        await connect.create_engine()


def test_a_timeout_is_a_time(connect: DBConnect) -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        database_health(connect, timeout=0)


# The lifespan


@pytest.mark.parametrize("cls", [Starlette, FastAPI])
@pytest.mark.parametrize("wait", [False, True])
async def test_the_lifespan_closes_every_connect(
    connect: DBConnect, second_connect: DBConnect, cls: type[Starlette], wait: bool
) -> None:
    connects = connect, second_connect
    app = cls(lifespan=database_lifespan(*connects, wait=wait))
    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 404  # it has started
        assert [c.pool_status().checked_in for c in connects] == [int(wait)] * 2
        for c in connects:
            await c.ping()
    assert [c.engine for c in connects] == [None, None]


async def test_an_application_does_not_start_without_its_database(
    monkeypatch: pytest.MonkeyPatch, connect: DBConnect
) -> None:
    async def give_up(_: DBConnect) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(DBConnect, "wait_until_ready", give_up)
    await connect.ping()
    with pytest.raises(ConnectionRefusedError):
        async with database_lifespan(connect, wait=True)(None):
            pytest.fail("it has started")
    assert connect.engine is None


async def test_tables_that_are_missing_are_created_and_the_others_kept(
    connect: DBConnect, database: Database
) -> None:
    tables = MetaData()
    new = Table("made_by_lifespan", tables, Column("id", Integer, primary_key=True))
    for _ in range(2):
        async with (
            database_lifespan(connect, create_tables=tables)(None),
            new_non_ctx_session(connect) as session,
        ):
            await session.execute(new.insert())
            await session.commit()
    assert await database.fetch("SELECT count(*) FROM made_by_lifespan") == [(2,)]
    await database.execute("DROP TABLE made_by_lifespan")


@pytest.mark.parametrize("number", [0, 2])
def test_tables_are_created_in_one_database(connect: DBConnect, number: int) -> None:
    with pytest.raises(ValueError, match=f"needs one connect, not {number}"):
        database_lifespan(*[connect] * number, create_tables=MetaData())


@pytest.mark.parametrize(("options", "opened"), [({}, 3), ({"pool_size": 2}, 2)])
async def test_connections_are_open_before_the_first_request(
    database_url: URL, options: Any, opened: int
) -> None:
    connect = DBConnect.from_url(database_url, **options)
    async with database_lifespan(connect, warm=3)(None):
        assert connect.pool_status().checked_in == opened
        assert connect.pool_status().checked_out == 0
    assert connect.engine is None


async def test_a_pool_that_keeps_no_connections_is_not_warmed(database_url: URL) -> None:
    connect = DBConnect.from_url(database_url, poolclass=NullPool)
    async with database_lifespan(connect, warm=3)(None):
        assert connect.pool_status() == PoolStatus()


async def test_an_application_does_not_start_if_its_connections_cannot_be_opened() -> None:
    connect = DBConnect.from_url("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(ConnectionRefusedError):
        async with database_lifespan(connect, warm=1)(None):
            pytest.fail("it has started")
    assert connect.engine is None
    with pytest.raises(ValueError, match="warm must be at least 0 connections, not -1"):
        database_lifespan(connect, warm=-1)
