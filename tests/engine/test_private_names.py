"""Each private name that is used is there, and says what it is used for; no other one is used."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiosqlite
import asyncpg
import greenlet  # type: ignore[import-untyped]
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    MetaData,
    NullPool,
    QueuePool,
    Table,
    create_engine,
    event,
    inspect as inspect_object,
    select,
    text,
)
from sqlalchemy.exc import (
    IllegalStateChangeError,
    InvalidRequestError,
    PendingRollbackError,
    TimeoutError as PoolTimeoutError,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router

import context_async_sqlalchemy
from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from context_async_sqlalchemy._engine import private_names
from context_async_sqlalchemy._engine.begin_in_flight import write_with_next
from context_async_sqlalchemy._engine.session_queue import CALLS
from context_async_sqlalchemy._http.dependency import wrap_routers
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.public import public_names

PACKAGE = Path(context_async_sqlalchemy.__file__).parent
FLUSH = b"H\0\0\0\4"  # which the server takes at any time
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(params=["postgresql", "sqlite"])
def any_connect(request: pytest.FixtureRequest) -> DBConnect:
    """Return a connect whose driver does not queue statements itself."""
    name = {"postgresql": "connect", "sqlite": "sqlite_connect"}[request.param]
    connect: DBConnect = request.getfixturevalue(name)
    return connect


def transaction_of(session: AsyncSession) -> SessionTransaction:
    transaction = session.sync_session.get_transaction()
    assert transaction is not None
    return transaction


async def test_sqlalchemy_waits_in_a_greenlet_of_another_class() -> None:
    class Ours(private_names.Provider, greenlet.greenlet):  # type: ignore[misc]
        pass

    assert not greenlet.greenlet(private_names.in_greenlet).switch()
    assert Ours(private_names.in_greenlet).switch()
    waited_for = Ours(lambda: private_names.await_only(asyncio.sleep(0))).switch()
    await waited_for


def test_the_methods_of_a_session_that_wait_call_one_function() -> None:
    async def spawn(*_: object, **__: object) -> None: ...

    methods = private_names.methods_that_spawn(spawn)
    assert methods.keys() >= {"execute", "scalar", "get", "flush", "refresh", "commit", "rollback"}
    assert all(method.__globals__["greenlet_spawn"] is spawn for method in methods.values())
    assert AsyncSession.execute.__globals__["greenlet_spawn"] is greenlet_spawn


async def test_the_thread_of_an_aiosqlite_connection_calls_a_function() -> None:
    called: asyncio.Queue[tuple[object, int]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(raw: object) -> None:
        loop.call_soon_threadsafe(called.put_nowait, (raw, threading.get_ident()))

    async with aiosqlite.connect(":memory:") as connection:
        private_names.call_in_thread(connection, tell)
        raw, thread = await asyncio.wait_for(called.get(), 20)
    assert isinstance(raw, sqlite3.Connection)
    assert thread != threading.get_ident()


async def test_the_connections_of_a_transaction_are_known(any_connect: DBConnect) -> None:
    async with new_non_ctx_session(any_connect) as session:
        await session.begin()
        transaction = transaction_of(session)
        assert private_names.connections_of(transaction) == []
        assert not private_names.has_connections(transaction)
        connection = (await session.connection()).sync_connection
        assert private_names.connections_of(transaction) == [connection]
        assert private_names.has_connections(transaction)
        await (await session.connection()).invalidate()
        assert private_names.connections_of(transaction) == []
        assert private_names.has_connections(transaction)
        await session.rollback()


async def test_a_transaction_is_connecting_while_it_takes_its_connection(
    any_connect: DBConnect,
) -> None:
    seen: list[bool] = []
    async with new_non_ctx_session(any_connect) as session:
        await session.begin()
        transaction = transaction_of(session)
        assert not private_names.is_connecting(transaction)

        def look(*_: object) -> None:
            seen.append(private_names.is_connecting(transaction))

        event.listen(session.sync_session, "after_begin", look)
        event.listen(session.sync_session, "before_commit", look)
        await session.execute(select(1))
        assert not private_names.is_connecting(transaction)
        await session.commit()
    assert seen == [True, False]


async def test_a_transaction_is_committed_between_its_commit_and_its_end(
    any_connect: DBConnect,
) -> None:
    seen: list[bool] = []
    async with new_non_ctx_session(any_connect) as session:
        transaction = await session.begin()

        def look(_: Session) -> None:
            assert transaction.sync_transaction is not None
            seen.append(private_names.is_committed(transaction.sync_transaction))

        event.listen(session.sync_session, "before_commit", look)
        event.listen(session.sync_session, "after_commit", look)
        await session.execute(select(1))
        await session.commit()
    assert seen == [False, True]


def test_a_session_that_may_take_connections_elsewhere_is_known() -> None:
    class Routing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    engine = create_engine("sqlite://")
    assert private_names.takes_one_engine(Session(engine))
    assert not private_names.takes_one_engine(Session(engine, binds={Item: engine}))
    assert not private_names.takes_one_engine(Routing(engine))


async def test_a_commit_that_was_a_rollback_is_told(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        cls = type(driver)
        assert issubclass(cls, asyncpg.Connection)
        await session.rollback()
        private_names.let_commit_tell(driver)
        private_names.let_commit_tell(driver)
        assert type(driver).__mro__[2] is cls
        assert type(driver).__name__ == cls.__name__
        for statement, is_told in ("SELECT 1", False), ("SELECT 1 / 0", True):
            transaction = driver.transaction()
            await transaction.start()
            with suppress(asyncpg.PostgresError):
                await driver.execute(statement)
            with pytest.raises(private_names.CommitWasRollbackError) if is_told else nullcontext():
                await transaction.commit()
    private_names.let_commit_tell(object())


async def test_every_statement_is_executed_by_one_method(
    any_connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = private_names.EXECUTE
    called: list[object] = []
    execute = getattr(Session, name)

    def count(session: Session, statement: Any, *args: Any, **options: Any) -> Any:
        called.append(statement)
        return execute(session, statement, *args, **options)

    monkeypatch.setattr(Session, name, count)
    statement = select(1)
    async with new_non_ctx_session(any_connect) as session:
        await session.execute(statement)
        await session.scalar(statement)
        await session.scalars(statement)
        await session.run_sync(lambda sync_session: Session.execute(sync_session, statement))
    assert called == [statement] * 4


def test_a_session_has_the_methods_that_wait() -> None:
    new_in_2_1 = {"delete_all", "merge_all"}
    assert {n for n in CALLS if not hasattr(Session, n)} in (set(), new_in_2_1)


async def test_what_is_changed_is_in_a_set_of_the_session(any_connect: DBConnect) -> None:
    async with new_non_ctx_session(any_connect) as session:
        item = Item(id=1, name="a")
        session.add(item)
        await session.flush()
        states = private_names.modified_states(session.sync_session)
        assert states == set()
        item.name = "b"
        assert states == {inspect_object(item)}
        states.clear()
        assert not session.dirty
        await session.rollback()


async def test_a_stream_fetches_from_its_cursor(any_connect: DBConnect) -> None:
    fetched: list[object] = []

    def wrap(cursor: Any, connection: Any) -> Any:
        fetched.append(connection.dialect)
        return Mock(wraps=cursor)

    async with new_non_ctx_session(any_connect) as session:
        item = Item(id=1, name="a")
        session.add(item)
        await session.flush()
        for statement in select(Item.id), select(Item):
            result = await session.stream(statement)
            private_names.wrap_cursor(result, wrap)
            real: Any = result._real_result
            cursor = getattr(real, "raw", real).cursor
            await result.all()
            assert cursor.fetchall.called or cursor.fetchmany.called
        assert fetched == [session.get_bind().dialect] * 2
        await session.rollback()


async def test_a_session_gets_a_subclass_of_its_own() -> None:
    class Own(AsyncSession):
        pass

    session = AsyncSession()
    private_names.replace_class(session, Own)
    assert type(session) is Own
    await session.close()


async def test_the_pool_of_a_connection_is_known(any_connect: DBConnect) -> None:
    pools: list[tuple[Any, Any]] = []
    async with new_non_ctx_session(any_connect) as session:
        engine = session.get_bind()
        assert isinstance(engine, Engine)
        replaced = engine.pool

        @event.listens_for(engine, "checkin")
        def look(_: object, entry: ConnectionPoolEntry) -> None:
            pools.append((private_names.pool_of(entry), engine.pool))

        await session.execute(select(1))
        await session.commit()
        await session.execute(select(1))
        engine.dispose(close=False)
        await session.commit()
        replaced.dispose()
    assert pools == [(replaced, replaced), (replaced, engine.pool)]
    assert engine.pool is not replaced


async def test_a_task_that_takes_a_connection_is_seen(any_connect: DBConnect) -> None:
    async with new_non_ctx_session(any_connect) as session:
        await session.begin()
        transaction = transaction_of(session)
        assert not private_names.is_changing(transaction)
        seen: list[bool] = []

        @event.listens_for(session.sync_session, "after_begin")
        def look(*_: object) -> None:
            seen.append(private_names.is_changing(transaction))
            with pytest.raises((IllegalStateChangeError, InvalidRequestError)):
                session.sync_session.rollback()

        await session.execute(select(1))
        assert seen == [True]
        assert not private_names.is_changing(transaction)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_statement_that_is_executed_is_seen(
    driver: str, database_url: URL, database: Database
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with DBConnect.from_url(url) as connect, new_non_ctx_session(connect) as session:
        (connection,) = private_names.connections_of(await _begun(session))
        assert not private_names.is_executing(connection)
        task = asyncio.create_task(session.execute(text("SELECT pg_sleep(10)")))
        async with asyncio.timeout(30):
            while (pid := await database.pid_of("%pg_sleep(10)%")) is None:
                await asyncio.sleep(0.001)
        assert private_names.is_executing(connection)
        await database.execute(f"SELECT pg_cancel_backend({pid})")
        with suppress(Exception):
            await task
        assert not private_names.is_executing(connection)


async def test_the_adapter_of_asyncpg_has_a_lock(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        (connection,) = private_names.connections_of(await _begun(session))
        lock = private_names.lock_of(connection.connection.dbapi_connection)
        assert isinstance(lock, asyncio.Lock)
    assert private_names.lock_of(object()) is None


async def _begun(session: AsyncSession) -> SessionTransaction:
    await session.execute(select(1))
    return transaction_of(session)


async def test_asyncpg_holds_on_to_a_transaction_that_could_not_begin(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        await session.rollback()
        assert not private_names.has_failed_to_begin(driver)
        transaction = driver.transaction()
        await transaction.start()
        # It is the same while a transaction is open, as none is in a connection that is returned.
        assert private_names.has_failed_to_begin(driver)
        await transaction.rollback()
        assert not private_names.has_failed_to_begin(driver)


async def test_asyncpg_has_tasks_that_ask_the_server_to_cancel(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        assert private_names.take_cancellations(driver) == set()
        with pytest.raises(TimeoutError):
            await driver.execute("SELECT pg_sleep(10)", timeout=0.01)
        (task,) = private_names.take_cancellations(driver)
        assert private_names.take_cancellations(driver) == set()
        await task
        assert await driver.fetchval("SELECT 1") == 1


async def test_asyncpg_encodes_then_calls_then_writes(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        statement = await driver.prepare("SELECT $1::int")
        protocol, transport = private_names.protocol_and_transport(driver)
        base, calls = type(protocol), []

        class Calls(private_names.CallsBeforeWrite, base):  # type: ignore[misc, valid-type]
            def before_write(self) -> None:
                calls.append("before")
                write_with_next(transport, FLUSH)

        private_names.replace_class(protocol, Calls)
        with pytest.raises(asyncpg.DataError):
            await statement.fetch("one")
        assert calls == []
        assert [row[0] for row in await statement.fetch(1)] == [1]
        assert calls == ["before"]
        private_names.replace_class(protocol, base)
    assert private_names.protocol_and_transport(object()) == (None, None)


def test_a_transport_writes_a_piece_together_with_the_next_one() -> None:
    written: list[bytes] = []

    class OfUvloop:
        __slots__ = ()

        def write(self, data: bytes) -> None:
            written.append(bytes(data))

    class OfAsyncio(OfUvloop):
        pass

    for transport, expected in (OfAsyncio(), [b"ab", b"c"]), (OfUvloop(), [b"a", b"b", b"c"]):
        write_with_next(transport, b"a")
        for piece in (b"b", b"c"):
            transport.write(piece)
        assert written == expected
        written.clear()


def test_the_overflow_of_a_pool_is_known() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=2, max_overflow=3)
    assert isinstance(engine.pool, QueuePool)
    assert private_names.max_overflow(engine.pool) == 3


def test_a_listener_that_closing_a_session_calls_is_seen() -> None:
    session = Session()
    assert not private_names.closing_calls_listeners(session)
    event.listen(session, "persistent_to_detached", lambda *_: None)
    assert private_names.closing_calls_listeners(session)


async def test_a_connection_is_pinged(any_connect: DBConnect) -> None:
    await any_connect.session_maker()
    engine = any_connect.engine
    assert engine is not None
    async with engine.connect() as connection:
        fairy = await connection.get_raw_connection()

        def ping(_: object) -> bool:
            assert fairy.dbapi_connection is not None
            return private_names.ping(engine.sync_engine.dialect, fairy.dbapi_connection)

        assert await connection.run_sync(ping)


async def test_starlette_puts_the_exception_handlers_into_the_scope() -> None:
    seen: list[Any] = []

    async def endpoint(request: Any) -> PlainTextResponse:
        seen.append(private_names.starlette_handlers(request.scope))
        return PlainTextResponse("")

    def handler(*_: Any) -> PlainTextResponse:
        return PlainTextResponse("")

    app = Starlette(
        routes=[Route("/", endpoint)], exception_handlers={ValueError: handler, 404: handler}
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        await client.get("/")
    ((by_class, by_status),) = seen
    assert by_class[ValueError] is handler
    assert by_status[404] is handler
    assert private_names.starlette_handlers({}) == ({}, {})


def test_an_engine_commits_and_closes_by_what_is_put_there() -> None:
    engine = create_engine("sqlite://", poolclass=NullPool)
    do_commit, do_close = engine.dialect.do_commit, engine.dialect.do_close
    called: list[str] = []

    def commit(connection: Any) -> None:
        called.append("commit")
        do_commit(connection)

    def close(connection: Any) -> None:
        called.append("close")
        do_close(connection)

    private_names.replace_of_dialect(engine.dialect, "do_commit", commit)
    private_names.replace_of_dialect(engine.dialect, "do_close", close)
    with engine.execution_options(a=1).begin() as connection:  # a copy
        connection.execute(select(1))
    assert called == ["commit", "close"]


async def test_every_statement_of_a_session_asks_for_its_bind(any_connect: DBConnect) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async with new_non_ctx_session(any_connect) as session:
        private_names.replace_get_bind(session.sync_session, refuse)
        for statement in (
            session.execute(select(1)),
            session.connection(),
            session.scalar(text("1")),
        ):
            with pytest.raises(ZeroDivisionError):
                await statement


def test_an_engine_takes_its_connections_from_the_pool_that_is_put_there() -> None:
    engine, other = create_engine("sqlite://"), create_engine("sqlite://", poolclass=NullPool)
    private_names.replace_pool(engine, other.pool)
    taken: list[object] = []
    event.listen(other.pool, "checkout", lambda *args: taken.append(args))
    with engine.connect():
        assert len(taken) == 1


def test_a_connection_that_is_taken_out_of_the_pool_is_replaced() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1)
    entries: list[Any] = []
    event.listen(engine, "checkin", lambda _, entry: entries.append(entry))
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
    taken = private_names.take_out(entries[0])
    assert taken is first
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection not in (None, first)
        assert connection.scalar(select(1)) == 1
    assert taken is not None
    taken.close()
    engine.dispose()


def test_a_connection_whose_part_of_the_pool_was_taken_is_invalid_before_that_is() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with engine.connect() as connection:
        connection.begin()
        pooled = private_names.take_pooled(connection)
        assert connection.invalidated
        connection.invalidate()  # as when a statement fails
        assert pooled.is_valid
        pooled.invalidate()
        with pytest.raises(PendingRollbackError):
            connection.scalar(select(1))
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_every_request_of_fastapi_comes_through_the_method_that_is_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []

    def wrap(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def wrapped(router: APIRouter, scope: Any, *channels: Any) -> None:
            called.append(scope["path"])
            await call(router, scope, *channels)

        return wrapped

    # As it is without any DBSessionDependency.
    monkeypatch.setattr(APIRouter, "__call__", Router.__call__)
    wrap_routers(APIRouter, wrap)
    wrap_routers(APIRouter, wrap)
    app, mounted, included = FastAPI(), FastAPI(), APIRouter()

    @app.get("/own")
    @mounted.get("/own")
    @included.get("/included")
    async def endpoint() -> None: ...

    app.include_router(included)
    app.mount("/mounted", mounted)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        for path in ("/own", "/included", "/mounted/own"):
            called.clear()
            assert (await client.get(path)).status_code == 200
            assert called == [path] * (2 if "mounted" in path else 1)


def test_a_connection_calls_its_own_method_before_each_statement() -> None:
    statements: list[str] = []

    class Checked(private_names.CheckedConnection):
        def check(self, context: Any) -> None:
            statements.append(context.statement)
            if "DROP" in context.statement:
                raise RuntimeError

    table = Table("checked", MetaData(), Column("id", Integer, primary_key=True))
    engine = create_engine("sqlite://")
    with Checked(engine) as connection:
        table.create(connection)
        connection.execute(table.insert().returning(table.c.id), [{"id": 1}, {"id": 2}])
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(RuntimeError):
            connection.execute(text("DROP TABLE checked"))
        assert [*connection.scalars(select(table.c.id))] == [1, 2]
    engine.dispose()
    verbs = [statement.split()[0] for statement in statements]
    assert [v for v in verbs if v != "PRAGMA"] == ["CREATE", "INSERT", "SELECT", "DROP", "SELECT"]


def test_a_static_pool_is_watched() -> None:
    calls: list[str] = []

    class Pool(private_names.WatchedStaticPool):
        def before_checkout(self) -> None:
            calls.append("before")

        def after_checkin(self) -> None:
            calls.append("after")

    engine = create_engine("sqlite://", poolclass=Pool)
    with engine.connect() as connection:
        assert calls == ["before"]
        connection.invalidate()
        assert calls == ["before", "after"]
    with engine.connect() as connection:
        connection.detach()
    assert calls == ["before", "after"] * 2
    engine.dispose()
    event.listen(engine, "do_connect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.connect()
    assert calls == ["before", "after"] * 3


@pytest.mark.parametrize("use_lifo", [False, True])
async def test_a_pool_keeps_its_connections_in_the_given_queue(use_lifo: bool) -> None:
    used = []

    class Fifo(asyncio.Queue[Any]):
        async def get(self) -> Any:
            used.append(type(self))
            return await super().get()

    class Lifo(Fifo, asyncio.LifoQueue[Any]):
        pass

    url, pool = "sqlite+aiosqlite://", private_names.pool_with_queues(Fifo, Lifo)
    engine = create_async_engine(
        url, poolclass=pool, pool_size=1, max_overflow=0, pool_timeout=0.01, pool_use_lifo=use_lifo
    )
    async with engine.connect():
        with pytest.raises(PoolTimeoutError, match="QueuePool limit of size 1"):
            await engine.connect()
    await engine.dispose()
    assert used[-1] is (Lifo if use_lifo else Fifo)


async def test_what_is_spawned_waits_inside_a_greenlet() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    def wait() -> int:
        assert private_names.in_greenlet()
        return private_names.await_only(answer())

    assert not private_names.in_greenlet()
    assert await private_names.greenlet_spawn(wait) == 42


def test_every_private_name_has_a_test() -> None:
    functions = set(public_names(private_names))
    tested = set(inspect.getsource(inspect.getmodule(transaction_of)).split("private_names.")[1:])  # type: ignore[arg-type]
    used = {re.split(r"\W", part)[0] for part in tested}
    assert functions - used == set()
    assert len(functions) > 12


def _names_of_our_own() -> set[str]:
    own: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    own.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.ClassDef(name=name):
                    own.add(name)
    return own


def _private_names_in(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found.add(name)
            case ast.ImportFrom(module=str(module)) if module.startswith("sqlalchemy.util"):
                found.add(f"_{module}")
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_no_other_file_uses_a_private_name_of_somebody_else() -> None:
    own = _names_of_our_own()
    found = {file.name: names for file in FILES if (names := _private_names_in(file) - own)}
    assert found.keys() == {"private_names.py"}
    assert "_connections" in found["private_names.py"]
    assert "_execute_mutex" in own, "LentConnection has one, so it is looked for here"
