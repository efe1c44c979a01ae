"""DBConnect: lazy, one engine at a time, on the right host and the right loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from sqlalchemy import URL, create_engine, event, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Mapped, mapped_column, sessionmaker

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from tests.conftest import Database, make_connect
from tests.helpers.connections import connections_out
from tests.helpers.models import Base, Item
from tests.helpers.postgres import free_port
from tests.helpers.programs import until
from tests.helpers.proxy import Call, proxy


def engine_mock() -> Any:
    return Mock(spec=["dispose"], dispose=AsyncMock())


class Creators:
    """Counts the engines it makes, all of them mocks."""

    def __init__(self) -> None:
        self.engines: dict[str, list[Any]] = {}

    def engine(self, host: str) -> AsyncEngine:
        engine: AsyncEngine = engine_mock()
        self.engines.setdefault(host, []).append(engine)
        return engine

    def session_maker(self, engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return Mock(return_value=MagicMock(spec=AsyncSession, engine=engine))


@pytest.fixture
def creators() -> Creators:
    return Creators()


async def test_nothing_is_made_before_the_first_session(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    assert connect.host == "a"
    assert (connect._engine, connect._session_maker, connect.engine) == (None, None, None)

    await connect.create_session()
    await connect.create_session()

    assert list(creators.engines) == ["a"]
    assert len(creators.engines["a"]) == 1
    assert connect.engine is connect._engine is creators.engines["a"][0]


async def test_close_disposes_and_the_next_session_makes_a_new_engine(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.close()
    await connect.create_session()

    await connect.close()
    await connect.close()

    assert connect._engine is None
    assert connect._session_maker is None
    creators.engines["a"][0].dispose.assert_awaited_once_with()
    await connect.create_session()
    assert len(creators.engines["a"]) == 2


async def test_an_engine_that_was_put_there_by_hand_is_disposed_of(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    engine = connect._engine = engine_mock()
    await connect.close()
    engine.dispose.assert_awaited_once_with()

    engine = connect._engine = engine_mock()
    await connect.change_host("b")
    engine.dispose.assert_awaited_once_with()
    assert connect._engine is creators.engines["b"][0]


async def test_a_session_maker_that_was_put_there_by_hand_is_used(
    creators: Creators, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    connect._session_maker = session_maker = Mock()
    assert connect._session_maker is session_maker
    assert await connect.create_session() is session_maker.return_value
    assert creators.engines == {}
    await connect.close()
    assert connect._session_maker is None

    await connect.connect("a")
    made = connect._session_maker
    with monkeypatch.context() as patched:
        patched.setattr(connect, "_session_maker", session_maker)
        assert await connect.session_maker() is session_maker
    assert await connect.session_maker() is made
    # It is that of this event loop only.
    assert await asyncio.to_thread(asyncio.run, connect.session_maker()) is not made
    await connect.connect("b")
    assert connect._session_maker is not made


async def test_a_mock_that_a_creator_returns_again_is_disposed_of() -> None:
    engine = engine_mock()
    connect = DBConnect(Mock(return_value=engine), Mock(), host="a")
    await connect.connect("a")
    await connect.change_host("b")
    engine.dispose.assert_awaited_once_with()


async def test_change_host_puts_the_new_engine_in_place_before_it_retires_the_old_one(
    creators: Creators,
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    seen: list[object] = []
    creators.engines["a"][0].dispose.side_effect = lambda: seen.append(connect.engine)

    await connect.change_host("b")

    assert connect.host == "b"
    assert seen == [creators.engines["b"][0]]


async def test_change_host_to_the_same_host_does_nothing(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    await connect.change_host("a")
    creators.engines["a"][0].dispose.assert_not_awaited()


async def test_concurrent_changes_to_the_same_host_make_one_engine(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    await asyncio.gather(*(connect.change_host("b") for _ in range(10)))
    assert len(creators.engines["b"]) == 1


async def test_connect_makes_a_new_engine_even_for_the_same_host(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    await connect.connect("a")
    await connect.connect("a")
    assert len(creators.engines["a"]) == 2
    creators.engines["a"][0].dispose.assert_awaited_once_with()


async def test_the_handler_runs_before_each_session_and_may_set_the_host(
    creators: Creators,
) -> None:
    hosts = iter(["a", "a", "b"])

    async def handler(connect: DBConnect) -> None:
        await connect.change_host(next(hosts))

    connect = DBConnect(
        creators.engine, creators.session_maker, before_create_session_handler=handler
    )
    sessions: list[Any] = [await connect.create_session() for _ in range(3)]
    a, b = creators.engines["a"][0], creators.engines["b"][0]
    assert [session.engine for session in sessions] == [a, a, b]


@pytest.mark.parametrize("broken", ["engine", "session_maker", "handler"])
async def test_a_failing_creator_or_handler_leaves_the_engine_in_place(
    creators: Creators, broken: str
) -> None:
    fail = Mock(side_effect=OSError("no such host"))
    handler = AsyncMock()
    engine_creator = Mock(side_effect=creators.engine)
    session_maker_creator = Mock(side_effect=creators.session_maker)
    connect = DBConnect(
        engine_creator, session_maker_creator, host="a", before_create_session_handler=handler
    )
    await connect.create_session()
    part = {"engine": engine_creator, "session_maker": session_maker_creator, "handler": handler}
    part[broken].side_effect = fail

    with pytest.raises(OSError, match="no such host"):
        await (connect.create_session() if broken == "handler" else connect.change_host("b"))

    assert connect.host == "a"
    assert connect.engine == creators.engines["a"][0]
    handler.side_effect = None
    await connect.create_session()
    creators.engines["a"][0].dispose.assert_not_awaited()


async def test_a_session_in_flight_finishes_on_the_old_engine_and_leaves_no_connection(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with new_non_ctx_session(connect) as first:
        await first.execute(text("SELECT 1"))
        async with new_non_ctx_session(connect) as second:
            await second.execute(text("SELECT 1"))
        assert await database.connections() == 2

        await connect.connect("localhost")

        assert await database.connections() == 1
        await first.execute(text("SELECT 1"))
        await first.commit()
        await database.is_left_by_all()
        await first.execute(text("SELECT 1"))
    await database.is_left_by_all()
    assert connections_out(connect) == 0
    await connect.close()


async def test_a_session_in_flight_leaves_no_connection_after_close(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1"))
        await connect.close()
        assert await database.connections() == 1
    await database.is_left_by_all()


async def test_a_cancelled_change_of_hosts_leaves_no_connection(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.execute(text("SELECT 1"))
    assert await database.connections() == 5

    task = asyncio.create_task(connect.change_host("localhost"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert connect.host == "localhost"
    await database.is_left_by_all()


async def test_a_creator_may_keep_its_engines(database_url: URL, database: Database) -> None:
    engines: dict[str, AsyncEngine] = {}

    def engine_of(host: str) -> AsyncEngine:
        return engines.setdefault(host, create_async_engine(database_url.set(host=host)))

    connect = DBConnect(engine_of, async_sessionmaker, host="127.0.0.1")
    pids = []
    for host in ("localhost", "127.0.0.1", "127.0.0.1"):
        await connect.connect(host)
        async with new_non_ctx_session(connect) as session:
            pids.append(await session.scalar(text("SELECT pg_backend_pid()")))
    assert pids[1] == pids[2]
    await connect.close()
    await database.is_left_by_all()


def test_another_event_loop_gets_an_engine_of_its_own(database_url: URL) -> None:
    connect = make_connect(database_url)

    async def select_one() -> object:
        async with new_non_ctx_session(connect) as session:
            return await session.scalar(text("SELECT 1"))

    with warnings.catch_warnings():
        # asyncpg warns of the connections that went down with the first loop.
        warnings.simplefilter("ignore", ResourceWarning)
        assert asyncio.run(select_one()) == 1
        assert asyncio.run(select_one()) == 1
        asyncio.run(connect.close())
        gc.collect()


async def test_each_connect_has_a_context_key_of_its_own(creators: Creators) -> None:
    connects = [DBConnect(creators.engine, creators.session_maker) for _ in range(3)]
    assert len({connect.context_key for connect in connects}) == 3


def test_repr_names_the_connect_and_its_host(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    assert repr(connect) == f"<DBConnect {connect.context_key} host='a'>"


async def test_an_empty_host_is_refused(creators: Creators) -> None:
    with pytest.raises(ValueError, match=r"^host must not be empty$"):
        DBConnect(creators.engine, creators.session_maker, host="")
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    for change in (connect.connect, connect.change_host):
        with pytest.raises(ValueError, match=r"^host must not be empty$"):
            await change("")
    assert connect.host == "a"
    assert connect.engine is creators.engines["a"][0]


async def test_a_missing_host_is_refused(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await connect.create_session()
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await connect.session_maker()


@pytest.mark.parametrize(
    "name", ["engine_creator", "session_maker_creator", "before_create_session_handler"]
)
def test_a_creator_that_is_not_callable_is_refused(creators: Creators, name: str) -> None:
    arguments: dict[str, Any] = {
        "engine_creator": creators.engine,
        "session_maker_creator": creators.session_maker,
    }
    with pytest.raises(TypeError, match=f"{name} must be callable, not str"):
        DBConnect(**arguments | {name: "postgresql://"})


async def _coroutine(_: object) -> None:
    """Stand for an async creator that returns nothing."""


@pytest.mark.parametrize(
    ("engine_creator", "message"),
    [
        (lambda _: None, "must return an AsyncEngine, not NoneType"),
        (lambda _: create_engine("sqlite://"), r"make it with create_async_engine\(\)"),
        (_coroutine, "must return an AsyncEngine, not NoneType"),
    ],
)
async def test_an_engine_creator_that_returns_the_wrong_thing_is_refused(
    creators: Creators, engine_creator: Any, message: str
) -> None:
    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    with pytest.raises(TypeError, match=message):
        await connect.create_session()
    assert connect.engine is None


@pytest.mark.parametrize(
    ("session_maker_creator", "message"),
    [
        (lambda _: None, "must return an async_sessionmaker, not NoneType"),
        (lambda _: sessionmaker(), "must return an async_sessionmaker, not sessionmaker"),
        (_coroutine, "must return an async_sessionmaker, not NoneType"),
    ],
)
async def test_a_session_maker_creator_that_returns_the_wrong_thing_is_refused(
    creators: Creators, session_maker_creator: Any, message: str
) -> None:
    connect = DBConnect(creators.engine, session_maker_creator, host="a")
    with pytest.raises(TypeError, match=message):
        await connect.create_session()


async def test_creators_may_be_awaited(creators: Creators) -> None:
    async def engine_creator(host: str) -> AsyncEngine:
        await asyncio.sleep(0)  # an access token is fetched
        return creators.engine(host)

    async def session_maker_creator(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        await asyncio.sleep(0)
        return creators.session_maker(engine)

    connect = DBConnect(engine_creator, session_maker_creator, host="a")
    sessions = await asyncio.gather(*(connect.create_session() for _ in range(10)))
    assert len(creators.engines["a"]) == 1
    await asyncio.gather(*(connect.change_host("b") for _ in range(10)))
    assert len(creators.engines["b"]) == 1
    assert creators.engines["a"][0].dispose.await_count == 1
    assert {session.engine for session in sessions} == {creators.engines["a"][0]}  # type: ignore[attr-defined]
    await connect.close()
    assert creators.engines["b"][0].dispose.await_count == 1


async def test_sessions_are_made_on_the_old_host_while_the_engine_for_the_new_one_is_made(
    creators: Creators,
) -> None:
    release = asyncio.Event()

    async def engine_creator(host: str) -> AsyncEngine:
        if host == "b":
            await release.wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    await connect.create_session()
    switching = asyncio.create_task(connect.change_host("b"))
    await asyncio.sleep(0)
    assert (await connect.create_session()).engine is creators.engines["a"][0]  # type: ignore[attr-defined]
    release.set()
    await switching
    assert connect.host == "b"
    assert (await connect.create_session()).engine is creators.engines["b"][0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_creator_that_fails_or_is_cancelled_leaves_nobody_stuck(
    creators: Creators, how: str
) -> None:
    started = asyncio.Event()
    calls = 0

    async def engine_creator(host: str) -> AsyncEngine:
        nonlocal calls
        calls += 1
        if calls == 1:
            started.set()
            if how == "fails":
                raise OSError("no token")
            await asyncio.Event().wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    first = asyncio.create_task(connect.create_session())
    await started.wait()
    second = asyncio.create_task(connect.create_session())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises((OSError, asyncio.CancelledError)):
        await first
    assert await second
    assert calls == 2


@pytest.mark.parametrize("how", ["fails", "is cancelled", "returns the wrong thing"])
async def test_an_engine_without_a_sessionmaker_leaves_no_connection(
    database_url: URL, database: Database, how: str
) -> None:
    engines: list[AsyncEngine] = []  # so that it is not the garbage collector that closes them
    used = asyncio.Event()

    def engine_creator(_: str) -> AsyncEngine:
        engines.append(create_async_engine(database_url))
        return engines[-1]

    async def session_maker_creator(engine: AsyncEngine) -> Any:
        async with engine.connect() as connection:
            await connection.execute(select(1))
        used.set()
        if how == "fails":
            raise OSError("no such file")
        if how == "is cancelled":
            await asyncio.Event().wait()

    connect = DBConnect(engine_creator, session_maker_creator, host="a")
    making = asyncio.create_task(connect.create_session())
    await used.wait()
    if how == "is cancelled":
        making.cancel()
    with pytest.raises((OSError, asyncio.CancelledError, TypeError)):
        await making
    await connect.close()
    await database.is_left_by_all()


async def test_close_waits_for_an_engine_that_is_being_made(creators: Creators) -> None:
    release = asyncio.Event()

    async def engine_creator(host: str) -> AsyncEngine:
        await release.wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    making = asyncio.create_task(connect.create_session())
    await asyncio.sleep(0)
    closing = [asyncio.create_task(connect.close()) for _ in range(3)]
    await asyncio.sleep(0)
    release.set()
    await making
    await asyncio.gather(*closing)
    assert connect.engine is None
    assert creators.engines["a"][0].dispose.await_count == 1


async def test_a_connect_is_closed_by_async_with(creators: Creators) -> None:
    async with DBConnect(creators.engine, creators.session_maker, host="a") as connect:
        await connect.create_session()
    assert connect.engine is None
    assert creators.engines["a"][0].dispose.await_count == 1
    async with connect:
        pass  # nothing was opened


async def test_two_loops_at_the_same_time_keep_their_engines_until_both_are_closed(
    database_url: URL, database: Database
) -> None:
    connect, closed = make_connect(database_url), threading.Event()
    pids: dict[str, set[int]] = {"here": set(), "there": set()}
    engines: dict[str, set[Any]] = {"here": set(), "there": set()}
    turns = [threading.Event() for _ in range(2)]

    async def use(place: str) -> None:
        async with new_non_ctx_session(connect) as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            assert pid is not None
            pids[place].add(pid)
            engines[place].add(connect.engine)

    async def there() -> None:
        for _ in range(5):
            await use("there")
            turns[0].set()
            await asyncio.to_thread(turns[1].wait, 10)
            turns[1].clear()
        while not closed.is_set():
            await asyncio.sleep(0.001)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    for _ in range(5):
        await asyncio.to_thread(turns[0].wait, 10)
        turns[0].clear()
        await use("here")
        turns[1].set()
    assert len(pids["here"]) == len(pids["there"]) == 1
    assert len(engines["here"]) == len(engines["there"]) == 1
    assert engines["here"] != engines["there"]
    assert await database.connections() == 2

    await connect.close()  # each in its own loop
    async with asyncio.timeout(10):
        while await database.connections():
            await asyncio.sleep(0.001)
    closed.set()
    await thread


async def test_a_host_that_is_a_url_is_shown_without_its_password(creators: Creators) -> None:
    url = "postgresql+asyncpg://app:hunter2@db/shop"
    connect = DBConnect(creators.engine, creators.session_maker, host=url)
    assert "hunter2" not in repr(connect)
    assert "app:***@db/shop" in repr(connect)


async def test_ping_answers_or_raises(connect: DBConnect, database_url: URL) -> None:
    await connect.ping()
    async with make_connect(database_url.set(port=free_port())) as refused:
        with pytest.raises(ConnectionRefusedError):
            await refused.ping()


async def test_ping_waits_no_longer_than_it_is_told(connect: DBConnect, database: Database) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    async with AsyncExitStack() as stack:
        for _ in range(15):
            await stack.enter_async_context(connect.engine.connect())
        with pytest.raises(TimeoutError):
            await connect.ping(timeout=0.05)
    await connect.ping()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_ping_does_not_wait_for_the_end_of_a_silent_connection(
    database_url: URL, database: Database, driver: str
) -> None:
    speaks = asyncio.Event()
    speaks.set()

    async def hang(_: Call) -> None:
        await speaks.wait()

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, hang) as port:
        tasks = asyncio.all_tasks()
        url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        async with make_connect(url) as connect:
            await connect.ping()
            speaks.clear()
            # asyncpg closes such a connection in 2 seconds, psycopg in 5.
            async with asyncio.timeout(2):
                with pytest.raises(TimeoutError):
                    await connect.ping(timeout=0.5)
            speaks.set()
        await until(lambda: asyncio.all_tasks() <= tasks)
    await database.is_left_by_all()


async def test_a_database_that_comes_up_late_is_waited_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    directory = tmp_path / "later"
    connect = DBConnect.from_url(f"sqlite:///{directory}/test.db")
    waiting = asyncio.create_task(connect.wait_until_ready(attempts=1000, delay=0.001))
    async with asyncio.timeout(10):
        while not caplog.messages:
            await asyncio.sleep(0)
    directory.mkdir()
    await waiting
    assert "not ready (attempt 1 of 1000): OperationalError" in caplog.messages[0]
    await connect.close()


async def test_the_statement_is_run_with_a_limit_and_its_last_error_comes_out(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    statements: list[str] = []
    assert await connect.session_maker()
    assert connect.engine is not None
    event.listen(
        connect.engine.sync_engine,
        "before_cursor_execute",
        lambda *args: statements.append(args[2]),
    )
    await connect.wait_until_ready(select(Item))
    assert "LIMIT" in statements[-1]

    class Missing(Base):
        __tablename__ = "missing"
        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.remove(Base.metadata.tables["missing"])
    with pytest.raises(ProgrammingError, match="missing"):
        await connect.wait_until_ready(select(Missing), attempts=3, delay=0)
    assert len(caplog.messages) == 3


async def test_a_mistake_is_not_waited_for(creators: Creators) -> None:
    with pytest.raises(ValueError, match="host is not set"):
        await DBConnect(creators.engine, creators.session_maker).wait_until_ready()
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    for wrong in ({"attempts": 0}, {"delay": -1.0}):
        with pytest.raises(ValueError, match="attempts must be at least 1, and delay at least 0"):
            await connect.wait_until_ready(**wrong)


async def test_an_engine_that_two_connects_share_is_closed_by_the_last(
    database_url: URL, database: Database
) -> None:
    shared = create_async_engine(database_url)
    copy = shared.execution_options(isolation_level="AUTOCOMMIT")
    one = DBConnect(lambda _: shared, async_sessionmaker, host="h")
    two = DBConnect(lambda _: copy, async_sessionmaker, host="h")
    await one.ping()
    [pid] = await database.backends()
    await two.ping()
    await two.close()
    await one.ping()
    assert await database.backends() == [pid]
    await one.close()
    await database.is_left_by_all()


async def test_an_engine_that_a_test_has_patched_is_closed(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = make_connect(database_url)
    await connect.ping()
    engine = connect.engine
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(connect, "_engine", engine_mock())
    assert connect._engine is engine
    await connect.close()
    await database.is_left_by_all()


async def test_copies_of_an_engine_do_not_pile_up(database_url: URL) -> None:
    base = create_async_engine(database_url)
    connect = DBConnect(
        lambda _: base.execution_options(isolation_level="READ COMMITTED"),
        async_sessionmaker,
        host="h",
    )
    commit = base.dialect.do_commit
    for _ in range(10):
        await connect.connect("h")
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("SELECT 1"))
            await session.commit()
    assert getattr(base.dialect.do_commit, "__self__", None) is not commit
    assert base.dialect.do_commit.__self__._do_commit == commit  # type: ignore[attr-defined]
    await connect.close()


async def test_an_engine_that_fails_to_close_is_logged_and_the_next_one_serves(
    creators: Creators, caplog: pytest.LogCaptureFixture
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    creators.engines["a"][0].dispose.side_effect = OSError("no route")
    await connect.change_host("b")
    [engine] = creators.engines["b"]
    assert connect.engine == engine
    assert "no route" in caplog.text
    engine.dispose.side_effect = OSError("no route either")
    with pytest.raises(OSError, match="no route either"):
        await connect.close()
    assert connect.engine is None


async def test_engines_of_two_loops_that_fail_to_close_are_both_heard_of(
    creators: Creators, caplog: pytest.LogCaptureFixture
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    closed, made = threading.Event(), threading.Event()

    async def there() -> None:
        await connect.create_session()
        creators.engines["a"][0].dispose.side_effect = OSError("no route there")
        made.set()
        await asyncio.to_thread(closed.wait, 10)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    await asyncio.to_thread(made.wait, 10)
    await connect.create_session()
    creators.engines["a"][1].dispose.side_effect = OSError("no route here")
    with pytest.raises(OSError, match="no route here"):
        await connect.close()
    async with asyncio.timeout(10):
        while "no route there" not in caplog.text:
            await asyncio.sleep(0.001)
    closed.set()
    await thread
