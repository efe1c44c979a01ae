"""One transaction for the test and the application, as users have it: with a fixture."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL, Connection, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, StatementError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from context_async_sqlalchemy.test_utils import (
    shared_transaction,
)
from tests.conftest import Database
from tests.helpers.connections import connections_out
from tests.helpers.models import Base, Item, Seat
from tests.helpers.serving import http_client


class Served:
    """An application on a connect, called by the clients of the tests.

    Attributes:
        called: What callbacks of on_commit have said.
        may_go_on: What a request to /wait waits for, in its transaction.
        is_waiting: Whether one does.
    """

    def __init__(self, connect: DBConnect) -> None:
        self.connect = connect
        self.called: list[str] = []
        self.may_go_on = asyncio.Event()
        self.is_waiting = asyncio.Event()
        handlers = [self.add, self.refuse, self.wait, self.nested, self.modes, self.swallow]
        handlers += [self.crash, self.stream, self.background, self.outer_fails, self.apart]
        handlers += [self.seat, self.level, self.names]
        routes = [Route(f"/{h.__name__}/{{name}}", h) for h in handlers]
        self.app = Starlette(routes=routes)
        add_starlette_http_db_session_middleware(self.app)

        async def conflict(_: Request, __: Exception) -> JSONResponse:
            return JSONResponse({}, status_code=409)

        self.app.add_exception_handler(IntegrityError, conflict)

    async def insert(self, name: str) -> None:
        session = await db_session(self.connect)
        session.add(Item(name=name))
        await session.flush()

    async def add(self, request: Request) -> Response:
        name = request.path_params["name"]
        session = await db_session(self.connect)
        session.add(Item(name=name))  # flushed by the commit
        on_commit(self.connect, partial(self.called.append, name))
        return JSONResponse({})

    async def names(self, request: Request) -> Response:
        return JSONResponse(await names_in(await db_session(self.connect)))

    async def refuse(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        on_commit(self.connect, partial(self.called.append, "refused"))
        return JSONResponse({}, status_code=422)

    async def crash(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        raise ZeroDivisionError

    async def wait(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        self.is_waiting.set()
        await self.may_go_on.wait()
        return JSONResponse({})

    async def nested(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        async with new_db_session_ctx():
            await self.insert(f"{name} in a context")
        with suppress(ZeroDivisionError):
            async with new_db_session_ctx():
                await self.insert(f"{name} undone")
                raise ZeroDivisionError
        await asyncio.gather(*(run_in_new_ctx(self.insert, f"{name} in {n}") for n in range(3)))
        async with new_non_ctx_session(self.connect) as session:
            session.add(Item(name=f"{name} in no context"))
            await session.commit()
        async with new_non_ctx_atomic_session(self.connect) as session:
            session.add(Item(name=f"{name} atomic"))
        await self.insert(f"{name} at the end")
        return JSONResponse({})

    async def modes(self, request: Request) -> Response:
        name = request.path_params["name"]
        connect = self.connect
        await self.insert(f"{name} 1")
        async with atomic_db_session(connect) as session:  # commits 1 before, 2 after
            session.add(Item(name=f"{name} 2"))
        await self.insert("rolled back")
        async with atomic_db_session(connect, "rollback") as session:
            session.add(Item(name=f"{name} 3"))
        await self.insert(f"{name} 4")
        async with atomic_db_session(connect, "append") as session:
            session.add(Item(name=f"{name} 5"))
        await self.insert(f"{name} 6")
        with pytest.raises(InvalidRequestError):
            async with atomic_db_session(connect, "raise"):
                pytest.fail("the block must not run")
        with suppress(IntegrityError):
            async with atomic_db_session(connect, "savepoint") as session:
                session.add(Item(name=f"{name} 6"))
        async with atomic_db_session(connect, "savepoint") as session:
            session.add(Item(name=f"{name} 7"))
        return JSONResponse({})

    async def swallow(self, request: Request) -> Response:
        with suppress(IntegrityError):
            session = await db_session(self.connect)
            await session.execute(insert(Item).values(name=request.path_params["name"]))
        return JSONResponse({})

    async def stream(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)

        async def body() -> AsyncGenerator[bytes]:
            yield b"a"
            await self.insert(f"{name} in the body")

        return StreamingResponse(body())

    async def background(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        return Response(background=BackgroundTask(self.insert, f"{name} in the background"))

    async def outer_fails(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        async with new_db_session_ctx():
            await self.insert(f"{name} inside")
        return JSONResponse({}, status_code=400)

    async def apart(self, request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.gather(*(run_in_new_ctx(self.insert, f"{name} {n}") for n in range(5)))
        return JSONResponse({})

    async def seat(self, request: Request) -> Response:
        session = await db_session(self.connect)
        session.add(Seat(number=int(request.path_params["name"])))
        return JSONResponse({})

    async def level(self, request: Request) -> Response:
        session = await db_session(self.connect)
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await self.insert(request.path_params["name"])
        return JSONResponse({})


@pytest_asyncio.fixture(params=["asyncpg", "psycopg", "sqlite", "sqlite by hand", "legacy sqlite"])
async def tested(
    request: pytest.FixtureRequest, database: Database, database_url: URL, tmp_path: Path
) -> AsyncGenerator[DBConnect]:
    """Return a connect to each database, by each driver."""
    if request.param in ("asyncpg", "psycopg"):
        async with DBConnect.from_url(
            database_url.set(drivername=f"postgresql+{request.param}")
        ) as connect:
            yield connect
            assert connections_out(connect) == 0
        return
    url = URL.create("sqlite+aiosqlite", database=str(tmp_path / "test.db"))
    connect = DBConnect.from_url(url)
    if request.param != "sqlite":
        is_legacy = request.param == "legacy sqlite"
        connect = DBConnect(
            lambda _: create_async_engine(url) if is_legacy else create_sqlite_engine(url),
            lambda engine: async_sessionmaker(engine, expire_on_commit=False),
            host="file",
        )
    async with connect:
        async with new_non_ctx_atomic_session(connect) as session:
            await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
        yield connect
        assert connections_out(connect) == 0


def create_sqlite_engine(url: URL) -> AsyncEngine:
    """Make an engine as SQLAlchemy's page on SQLite tells to."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def do_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def do_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


@pytest.fixture
def served(tested: DBConnect) -> Served:
    return Served(tested)


@pytest_asyncio.fixture
async def in_process(served: Served) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=served.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest_asyncio.fixture
async def shared(tested: DBConnect) -> AsyncGenerator[AsyncSession]:
    """Return the session of a test's transaction; afterwards the connect is as before."""
    async with shared_transaction(tested) as session:
        yield session
    assert connections_out(tested) == 0
    assert await names_after(tested) == []
    async with new_db_session_ctx():
        (await db_session(tested)).add(Item(name="after"))
    assert await names_after(tested) == ["after"]


async def names_after(connect: DBConnect) -> list[str]:
    """Return the names of the items, seen by another transaction."""
    async with new_non_ctx_session(connect) as session:
        return await names_in(session)


async def names_in(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Item.name).order_by(Item.id)))


async def test_the_test_sees_what_a_request_commits(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/add/a")).status_code == 200
    assert await names_in(shared) == ["a"]
    assert served.called == ["a"]


async def test_a_request_sees_what_the_test_has_flushed_or_committed(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="a"))
    await shared.commit()
    shared.add(Item(name="b"))
    await shared.flush()
    assert (await in_process.get("/add/a")).status_code == 409
    assert (await in_process.get("/add/b")).status_code == 409
    assert (await in_process.get("/add/c")).status_code == 200
    assert await names_in(shared) == ["a", "b", "c"]
    assert served.called == ["c"]


async def test_a_4xx_undoes_what_the_request_wrote(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="a"))
    await shared.flush()
    assert (await in_process.get("/refuse/b")).status_code == 422
    assert (await in_process.get("/crash/c")).status_code == 500
    assert await names_in(shared) == ["a"]
    assert served.called == []


async def test_a_swallowed_error_is_no_success(
    shared: AsyncSession, in_process: httpx.AsyncClient, tested: DBConnect
) -> None:
    assert (await in_process.get("/add/a")).status_code == 200
    is_sqlite = tested.engine is not None and tested.engine.dialect.name == "sqlite"
    assert (await in_process.get("/swallow/a")).status_code == (200 if is_sqlite else 500)
    assert (await in_process.get("/add/b")).status_code == 200
    assert await names_in(shared) == ["a", "b"]


async def test_everything_that_a_request_opens_is_in_the_transaction(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/nested/a")).status_code == 200
    suffixes = ["", " in a context", " in 0", " in 1", " in 2", " in no context", " atomic"]
    assert await names_in(shared) == [f"a{suffix}" for suffix in [*suffixes, " at the end"]]


async def test_atomic_sessions_of_every_mode_work(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/modes/a")).status_code == 200
    assert await names_in(shared) == [f"a {n}" for n in range(1, 8)]


async def test_a_body_and_a_background_task_are_committed(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/stream/a")).text == "a"
    assert (await in_process.get("/background/b")).status_code == 200
    assert await names_in(shared) == ["a", "a in the body", "b", "b in the background"]


async def test_what_was_committed_inside_a_failed_request_is_undone_with_it(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/outer_fails/a")).status_code == 400
    assert await names_in(shared) == []


async def test_concurrent_requests_take_turns(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="test"))
    await shared.flush()
    slow = asyncio.create_task(in_process.get("/wait/slow"))
    await served.is_waiting.wait()
    paths = [f"/{path}/{path}{n}" for n in range(10) for path in ("add", "refuse", "nested")]
    others = [asyncio.create_task(in_process.get(path)) for path in paths]
    served.may_go_on.set()
    statuses = [response.status_code for response in await asyncio.gather(slow, *others)]
    assert statuses == [200] + [200, 422, 200] * 10
    names = await names_in(shared)
    assert names[:2] == ["test", "slow"]
    assert len(names) == 2 + 10 + 10 * 8


async def test_concurrent_contexts_of_a_test_take_turns(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    await asyncio.gather(*(run_in_new_ctx(served.insert, f"{n}") for n in range(10)))
    assert (await in_process.get("/apart/a")).status_code == 200
    assert len(await names_in(shared)) == 15


async def test_a_session_begun_in_a_gather_encloses_a_context_opened_after_it(
    shared: AsyncSession, served: Served
) -> None:
    async with new_db_session_ctx():
        await asyncio.gather(served.insert("a"))
        async with new_db_session_ctx():
            await served.insert("b")
    assert await names_in(shared) == ["a", "b"]


async def test_the_test_waits_for_a_request_that_is_in_its_transaction(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="test"))
    await shared.flush()
    request = asyncio.create_task(in_process.get("/wait/a"))
    await served.is_waiting.wait()
    looking = asyncio.create_task(names_in(shared))
    await asyncio.wait([looking], timeout=0.05)
    assert not looking.done()
    served.may_go_on.set()
    assert await looking == ["test", "a"]
    assert (await request).status_code == 200


async def test_a_cancelled_request_is_undone_and_the_test_goes_on(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="test"))
    await shared.flush()
    request = asyncio.create_task(in_process.get("/wait/a"))
    await served.is_waiting.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (await in_process.get("/add/b")).status_code == 200
    assert await names_in(shared) == ["test", "b"]


async def test_a_cancellation_at_any_moment_of_a_request_undoes_it_or_comes_too_late(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    await in_process.get("/add/first")
    steps = 0
    is_done = False
    while not is_done:
        steps += 1
        before = await names_in(shared)
        request = asyncio.create_task(in_process.get(f"/nested/{steps}"))
        for _ in range(steps * 3):
            await asyncio.sleep(0)
        is_done = request.done()
        request.cancel()
        await asyncio.wait([request])
        new = (await names_in(shared))[len(before) :]
        assert new == [] or f"{steps} at the end" in new
        assert (await in_process.get(f"/add/after {steps}")).status_code == 200
    assert steps > 10


async def test_two_sessions_used_in_turn_by_one_task_are_refused(
    shared: AsyncSession, tested: DBConnect
) -> None:
    await shared.scalar(select(1))
    async with new_non_ctx_session(tested) as inner:
        await inner.scalar(select(1))
        with pytest.raises(StatementError, match="end the inner one"):
            await shared.scalar(select(1))
    assert await names_in(shared) == []


async def test_a_session_whose_outer_one_is_rolled_back_is_told(
    shared: AsyncSession, tested: DBConnect
) -> None:
    shared.add(Item(name="a"))
    await shared.flush()
    async with new_non_ctx_session(tested) as inner:
        inner.add(Item(name="b"))
        await inner.flush()
        await shared.rollback()
        with pytest.raises(InvalidRequestError, match="this one with it"):
            await inner.commit()
    assert await names_in(shared) == []


async def test_two_that_wait_for_each_other_are_told(tested: DBConnect) -> None:
    served = Served(tested)
    async with shared_transaction(tested, timeout=0.05) as session:

        async def hold() -> None:
            await served.insert("a")
            served.is_waiting.set()
            await served.may_go_on.wait()

        holder = asyncio.create_task(run_in_new_ctx(hold))
        await served.is_waiting.wait()
        with pytest.raises(StatementError, match="does the one that holds it"):
            await run_in_new_ctx(served.insert, "b")
        served.may_go_on.set()
        await holder
        assert await names_in(session) == ["a"]


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_everything_is_rolled_back_however_the_test_ends(
    tested: DBConnect, error: type[BaseException]
) -> None:
    served = Served(tested)
    with pytest.raises(error):
        async with shared_transaction(tested) as session:
            await run_in_new_ctx(served.insert, "a")
            session.add(Item(name="b"))
            await session.flush()
            raise error
    assert await names_after(tested) == []
    assert connections_out(tested) == 0


async def test_a_task_that_outlives_the_test_is_refused(tested: DBConnect) -> None:
    served = Served(tested)
    async with shared_transaction(tested):
        context = new_db_session_ctx()
        await context.__aenter__()
        await served.insert("a")
        session = await db_session(tested)
    with pytest.raises(StatementError, match="has ended"):
        await session.scalar(select(1))
    await session.rollback()
    await context.__aexit__(None, None, None)
    assert connections_out(tested) == 0
    assert await names_after(tested) == []


async def test_each_of_two_databases_has_a_transaction_of_its_own(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    async def insert(suffix: str) -> None:
        for number, each in enumerate((connect, second_connect)):
            session = await db_session(each)
            session.add(Item(name=f"{number} {suffix}"))
            await session.flush()

    async def fail() -> None:
        await insert("undone")
        raise ZeroDivisionError

    async with shared_transaction(connect) as one, shared_transaction(second_connect) as two:
        await asyncio.gather(*(run_in_new_ctx(insert, suffix) for suffix in "ab"))
        with pytest.raises(ZeroDivisionError):
            await run_in_new_ctx(fail)
        assert sorted(await names_in(one)) == ["0 a", "0 b"]
        assert sorted(await names_in(two)) == ["1 a", "1 b"]
    assert await database.names() == []


async def test_only_one_transaction_is_open_for_a_connect(tested: DBConnect) -> None:
    async with shared_transaction(tested) as session:
        with pytest.raises(RuntimeError, match="open already"):
            async with shared_transaction(tested):
                pytest.fail("the block must not run")
        assert await names_in(session) == []


async def test_a_connect_that_is_closed_meanwhile_is_still_in_the_transaction(
    tested: DBConnect, in_process: httpx.AsyncClient
) -> None:
    async with shared_transaction(tested) as session:
        assert (await in_process.get("/add/a")).status_code == 200
        await tested.close()
        assert (await in_process.get("/add/b")).status_code == 200
        assert await names_in(session) == ["a", "b"]
    assert tested.engine is None
    async with shared_transaction(tested):
        pass
    assert tested.engine is not None, "it was closed again"


async def test_a_handler_that_changes_the_host_does_not_leave_the_transaction(
    database_url: URL, database: Database
) -> None:
    hosts = itertools.cycle(["127.0.0.1", "localhost"])

    async def change_host(connect: DBConnect) -> None:
        await connect.change_host(next(hosts))

    connect = DBConnect.from_url(database_url, before_create_session_handler=change_host)
    served = Served(connect)
    async with connect:
        async with shared_transaction(connect) as session:
            for name in "abc":
                await run_in_new_ctx(served.insert, name)
            assert await names_in(session) == ["a", "b", "c"]
            assert await database.names() == []
        assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_deferred_constraint_is_checked_when_a_request_commits(connect: DBConnect) -> None:
    served = Served(connect)
    transport = httpx.ASGITransport(app=served.app)
    async with (
        shared_transaction(connect) as session,
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for number, status in (1, 200), (2, 200), (1, 409), (3, 200):
            assert (await client.get(f"/seat/{number}")).status_code == status
        numbers = await session.scalars(select(Seat.number).order_by(Seat.number))
        assert list(numbers) == [1, 2, 3]
        # Still deferred: two that change places do so one after the other.
        session.add(Seat(number=1))
        await session.flush()
        await session.rollback()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "sqlite"])
async def test_in_autocommit_each_statement_is_a_transaction(
    driver: str, database_url: URL, database: Database, tmp_path: Path
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    if driver == "sqlite":
        url = URL.create("sqlite", database=str(tmp_path / "test.db"))
    async with DBConnect.from_url(url, isolation_level="AUTOCOMMIT") as connect:
        if driver == "sqlite":
            async with new_non_ctx_session(connect) as session:
                await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
        served = Served(connect)
        transport = httpx.ASGITransport(app=served.app)
        async with (
            shared_transaction(connect) as session,
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            assert (await client.get("/refuse/a")).status_code == 422
            assert (await client.get("/swallow/b")).status_code == 200
            async with new_db_session_ctx():
                with pytest.raises(DBAPIError):
                    await (await db_session(connect)).execute(text("SELECT * FROM nothing"))
                await served.insert("c")
            assert await names_in(session) == ["a", "b", "c"]
        assert connections_out(connect) == 0
        assert await names_after(connect) == []
        async with new_db_session_ctx():
            await served.insert("d")
            assert await names_after(connect) == ["d"]


@pytest.mark.parametrize("tested", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_a_transaction_with_autocommit_of_its_own_is_not_undone(
    shared: AsyncSession, tested: DBConnect
) -> None:
    async with new_non_ctx_session(tested) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(insert(Item).values(name="a"))
        await session.rollback()
    async with new_non_ctx_session(tested) as session:
        await session.execute(insert(Item).values(name="b"))
    assert await names_in(shared) == ["a"]


async def test_an_isolation_level_asked_for_by_a_request_is_left_alone(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="test"))
    await shared.commit()
    assert (await in_process.get("/level/a")).status_code == 200
    assert await names_in(shared) == ["test", "a"]


async def test_a_lost_connection_is_told_and_the_next_test_works(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(connect)
    async with shared_transaction(connect) as session:
        await run_in_new_ctx(served.insert, "a")
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await database.terminate(pid)
        with pytest.raises(DBAPIError):
            await run_in_new_ctx(served.insert, "b")
        with pytest.raises(StatementError, match="was lost"):
            await run_in_new_ctx(served.insert, "c")
    assert connections_out(connect) == 0
    async with shared_transaction(connect) as session:
        await run_in_new_ctx(served.insert, "d")
        assert await names_in(session) == ["d"]


async def test_another_event_loop_is_refused(tested: DBConnect) -> None:
    has_engine, is_shared = threading.Event(), threading.Event()

    async def insert_meanwhile() -> None:
        async with new_non_ctx_session(tested) as session:
            await session.scalar(select(1))
        has_engine.set()
        await asyncio.to_thread(is_shared.wait)
        try:
            with pytest.raises(RuntimeError, match="another event loop"):
                await run_in_new_ctx(Served(tested).insert, "a")
        finally:
            assert tested.engine is not None
            await tested.engine.dispose()

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, insert_meanwhile()))
    await asyncio.to_thread(has_engine.wait)
    async with shared_transaction(tested):
        is_shared.set()
        await other


async def test_a_context_is_inside_a_session_of_no_context(
    shared: AsyncSession, served: Served
) -> None:
    async with new_non_ctx_session(served.connect) as session:
        await session.execute(insert(Item).values(name="a"))
        await run_in_new_ctx(served.insert, "b")
        await session.commit()
    assert await names_in(shared) == ["a", "b"]


async def test_a_real_server_is_in_the_transaction(shared: AsyncSession, served: Served) -> None:
    async with http_client(served.app) as client:
        # The task of this connection is older than the transaction that the test begins now.
        assert (await client.get("/refuse/b")).status_code == 422
        await shared.scalar(select(1))
        responses = await asyncio.gather(*(client.get(f"/nested/{n}") for n in range(5)))
        assert {response.status_code for response in responses} == {200}
        assert (await client.get("/refuse/a")).status_code == 422
    assert len(await names_in(shared)) == 5 * 8


async def test_a_failure_while_the_transaction_is_opened_leaves_nothing(
    connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken = AsyncMock(side_effect=ZeroDivisionError)
        patch.setattr(AsyncConnection, "get_raw_connection", broken)
        with pytest.raises(ZeroDivisionError):
            async with shared_transaction(connect):
                pytest.fail("the block must not run")
    assert connections_out(connect) == 0
    async with shared_transaction(connect) as session:
        assert await names_in(session) == []
