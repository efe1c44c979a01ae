"""Which errors are transient, and functions that run again after one."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio
import stamina
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_session,
    on_commit,
    retry_on_transient_error,
    rollback_db_session,
)
from tests.conftest import Database, checked_connect, make_connect
from tests.helpers.connections import connections_out
from tests.helpers.models import Item
from tests.helpers.postgres import free_port
from tests.helpers.proxy import Call, Fault, proxy
from tests.http.test_asgi_utils import add


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def serializable(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect whose transactions are SERIALIZABLE, with each driver for PostgreSQL."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    options = {"isolation_level": "SERIALIZABLE", "pool_timeout": 0.1, "max_overflow": 0}
    async with checked_connect(url, database, **options) as connect:
        yield connect


async def error_of(work: Awaitable[Any]) -> BaseException:
    """Return what `work` raises."""
    try:
        await work
    except BaseException as error:
        return error
    pytest.fail("no error was raised")


async def fail_to_serialize(connect: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        for session in (one, two):
            await session.execute(text("SELECT count(*) FROM item"))
        for session in (one, two):
            await session.execute(text("INSERT INTO item (name) SELECT pg_backend_pid()::text"))
            await session.commit()


async def deadlock(connect: DBConnect, database: Database) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a'), ('b')")

    async def lock(session: AsyncSession, name: str) -> None:
        # Not a row: a SERIALIZABLE transaction fails to lock one that another has updated.
        await session.execute(text(f"SELECT pg_advisory_xact_lock({ord(name)})"))

    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await lock(one, "a")
        await lock(two, "b")
        results = await asyncio.gather(lock(one, "b"), lock(two, "a"), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result


async def fail_to_lock(connect: DBConnect, database: Database) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a')")
    lock = text("SELECT * FROM item FOR UPDATE NOWAIT")
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await one.execute(lock)
        await two.execute(lock)


async def be_terminated_between_statements(connect: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await database.terminate(await backend_of(session))
        await session.execute(text("SELECT 1"))


async def be_terminated_inside_a_statement(connect: DBConnect, database: Database) -> None:
    async def terminate() -> None:
        async with asyncio.timeout(10):
            while (pid := await database.pid_of("%pg_sleep%")) is None:
                await asyncio.sleep(0.001)
        await database.terminate(pid)

    async with new_non_ctx_session(connect) as session:
        terminating = asyncio.create_task(terminate())
        try:
            await session.execute(text("SELECT pg_sleep(20)"))
        finally:
            await terminating


async def be_refused(connect: DBConnect, _: Database) -> None:
    await connect_with(connect, port=free_port())


async def be_one_too_many(connect: DBConnect, database: Database) -> None:
    await database.execute(
        "DROP ROLE IF EXISTS limited; CREATE ROLE limited LOGIN CONNECTION LIMIT 0"
    )
    await connect_with(connect, username="limited")


async def connect_with(connect: DBConnect, **changes: Any) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    other = make_connect(connect.engine.url.set(**changes))
    try:
        async with new_non_ctx_session(other) as session:
            await session.connection()
    finally:
        await other.close()


async def backend_of(session: AsyncSession) -> int:
    pid = await session.scalar(text("SELECT pg_backend_pid()"))
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize(
    "work",
    [
        fail_to_serialize,
        deadlock,
        fail_to_lock,
        be_terminated_between_statements,
        be_terminated_inside_a_statement,
        be_refused,
        be_one_too_many,
    ],
)
async def test_what_may_succeed_the_next_time_is_transient(
    serializable: DBConnect, database: Database, work: Any
) -> None:
    error = await error_of(work(serializable, database))
    assert is_transient_error(error), repr(error)


async def violate_a_constraint(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.execute(insert(Item), [{"name": "a"}, {"name": "a"}])


async def divide_by_zero(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1/0"))


async def exhaust_the_pool(connect: DBConnect, _: Database) -> None:
    async with asyncio.TaskGroup() as group:
        for _number in range(6):
            group.create_task(hold_a_connection(connect))


async def hold_a_connection(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.connection()
        await asyncio.Event().wait()


async def use_a_failed_transaction(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        for statement in ("SELECT 1/0", "SELECT 1"):
            error = await error_of(session.execute(text(statement)))
        raise error


@pytest.mark.parametrize(
    "work", [violate_a_constraint, divide_by_zero, exhaust_the_pool, use_a_failed_transaction]
)
async def test_what_would_fail_again_is_not_transient(
    serializable: DBConnect, database: Database, work: Any
) -> None:
    error = await error_of(work(serializable, database))
    assert not is_transient_error(error), repr(error)


async def test_a_login_that_is_refused_is_not_transient(connect: DBConnect) -> None:
    error = await error_of(connect_with(connect, username="nobody"))
    assert not is_transient_error(error), repr(error)


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER, "terminated"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_lost_commit_is_never_transient_whoever_commits(
    database_url: URL, database: Database, fault: Any, driver: str
) -> None:
    async def lose_commit(call: Call) -> Fault | None:
        if not call.statement.startswith("COMMIT"):
            return None
        if isinstance(fault, Fault):
            return fault
        await database.terminate(call.pid)
        return None

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, lose_commit) as port:
        url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        lossy = make_connect(url)
        for commit in (commit_db_session, commit_session_itself):
            async with new_db_session_ctx():
                await add(lossy, f"by {commit.__name__}")
                error = await error_of(commit(lossy))
                assert not is_transient_error(error), repr(error)
                assert not is_transient_error(
                    BaseExceptionGroup("", [error, ConnectionResetError()])
                )
                assert (commit is commit_db_session) == isinstance(error, CommitOutcomeUnknownError)
                await rollback_db_session(lossy)
        await lossy.close()


async def commit_session_itself(connect: DBConnect) -> None:
    await (await db_session(connect)).commit()


async def test_a_busy_sqlite_database_is_transient(tmp_path: Path) -> None:
    connect = make_connect(
        f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 0}
    )
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await one.execute(text("CREATE TABLE item (name TEXT UNIQUE)"))
        await one.execute(text("INSERT INTO item VALUES ('a')"))
        busy = await error_of(two.execute(text("INSERT INTO item VALUES ('b')")))
        assert is_transient_error(busy)
        double = await error_of(one.execute(text("INSERT INTO item VALUES ('a')")))
        assert not is_transient_error(double)
    await connect.close()


def mysql_error(number: int) -> OperationalError:
    """Make what the drivers for MySQL raise: PyMySQL's errors, with their number first."""
    return OperationalError("UPDATE …", {}, Exception(number, "…"))


@pytest.mark.parametrize(
    ("number", "transient"), [(1205, True), (1213, True), (1040, True), (1064, False)]
)
def test_the_numbers_of_mysql_are_known(number: int, transient: bool) -> None:
    assert is_transient_error(mysql_error(number)) is transient


DEADLOCK = mysql_error(1213)
DUPLICATE = IntegrityError("INSERT …", {}, sqlite3.IntegrityError("UNIQUE"))
UNKNOWN = CommitOutcomeUnknownError()


def caused_by(cause: BaseException) -> Exception:
    error = Exception("cannot book the room")
    error.__cause__ = cause
    return error


def while_handling(error: BaseException, earlier: BaseException) -> BaseException:
    error.__context__ = earlier
    return error


def in_a_circle() -> Exception:
    one, two = Exception(), Exception()
    one.__cause__, two.__cause__ = two, one
    return one


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (DEADLOCK, True),
        (caused_by(caused_by(DEADLOCK)), True),
        (ExceptionGroup("", [caused_by(DEADLOCK)]), True),
        (ExceptionGroup("", [ValueError(), ExceptionGroup("", [DEADLOCK])]), True),
        (caused_by(ExceptionGroup("", [DEADLOCK])), True),
        (while_handling(mysql_error(1205), DUPLICATE), True),
        (ConnectionRefusedError(), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.InternalClientError("cannot switch to state 11"), True),
        (asyncpg.exceptions.ClientConfigurationError("`sslmode` is wrong"), False),
        (ExceptionGroup("", [DEADLOCK, DUPLICATE]), False),
        (ExceptionGroup("", [DEADLOCK, UNKNOWN]), False),
        (while_handling(ConnectionRefusedError(), UNKNOWN), False),
        (while_handling(ValueError(), DEADLOCK), False),
        (DUPLICATE, False),
        (UNKNOWN, False),
        (in_a_circle(), False),
        (KeyError(1213), False),
        (TimeoutError(), False),
        (PoolTimeoutError(), False),
        (socket.gaierror(), False),
        (asyncio.CancelledError(), False),
        (DBAPIError("SELECT 1", {}, Exception()), False),
    ],
)
def test_causes_and_groups_are_looked_into(error: BaseException, transient: bool) -> None:
    assert is_transient_error(error) is transient


class ConflictError(OperationalError):
    """A serialization failure, as SQLAlchemy wraps it."""

    def __init__(self, text: str = "") -> None:
        original = Exception(text)
        original.sqlstate = "40001"  # type: ignore[attr-defined]
        super().__init__("SELECT 1", {}, original)


@pytest.fixture
def no_pauses() -> Generator[None]:
    with stamina.set_testing(True, attempts=3):
        yield


class Failing:
    """Fails as often as it is told to, and counts."""

    def __init__(self, times: int, error: Callable[[], Exception] = ConflictError) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error()


@pytest.mark.usefixtures("no_pauses")
async def test_a_function_runs_again_in_a_new_context(
    connect: DBConnect, database: Database
) -> None:
    fail, called = Failing(2), list[str]()
    sessions = []

    @retry_on_transient_error(attempts=3)
    async def work(name: str, *, suffix: str) -> str:
        """Work."""
        sessions.append(await add(connect, name))
        on_commit(connect, lambda: called.append(name))
        fail()
        return name + suffix

    assert await work("a", suffix="!") == "a!"
    assert await database.names() == ["a"]
    assert called == ["a"]
    assert len(set(sessions)) == 3
    assert (work.__name__, work.__doc__) == ("work", "Work.")


@pytest.mark.usefixtures("no_pauses")
async def test_the_last_error_comes_out_unchanged(connect: DBConnect, database: Database) -> None:
    errors = [ConflictError(str(number)) for number in range(3)]
    raised = iter(errors)

    @retry_on_transient_error(attempts=3)
    async def work() -> None:
        await add(connect, "a")
        raise next(raised)

    error = await error_of(work())
    assert error is errors[-1]
    assert not getattr(error, "__notes__", [])
    assert await database.names() == []
    assert connections_out(connect) == 0


@pytest.mark.usefixtures("no_pauses")
async def test_another_error_is_raised_at_once(connect: DBConnect) -> None:
    fail = Failing(1, ValueError)

    @retry_on_transient_error()
    async def work() -> None:
        fail()

    assert isinstance(await error_of(work()), ValueError)
    assert fail.calls == 1


@pytest.mark.usefixtures("no_pauses")
async def test_a_function_whose_commit_fails_to_serialize_runs_again(
    serializable: DBConnect, database: Database
) -> None:
    runs = 0

    @retry_on_transient_error()
    async def work() -> None:
        nonlocal runs
        runs += 1
        session = await db_session(serializable)
        await session.execute(text("SELECT count(*) FROM item"))
        await session.execute(insert(Item).values(name="ours"))
        if runs == 1:
            async with new_db_session_ctx():
                other = await db_session(serializable)
                await other.execute(text("SELECT count(*) FROM item"))
                await other.execute(insert(Item).values(name="theirs"))

    await work()
    assert runs == 2
    assert await database.names() == ["theirs", "ours"]


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("commit", [commit_db_session, commit_session_itself])
async def test_an_attempt_that_has_committed_a_part_of_its_work_is_not_repeated(
    connect: DBConnect, database: Database, commit: Any
) -> None:
    fail = Failing(1)

    @retry_on_transient_error()
    async def work() -> None:
        await add(connect, "a")
        await commit(connect)
        fail()

    error = await error_of(work())
    assert "had been committed" in error.__notes__[0]
    assert fail.calls == 1
    assert await database.names() == ["a"]


@pytest.mark.usefixtures("no_pauses")
async def test_an_attempt_that_has_committed_nothing_but_an_empty_transaction_is_repeated(
    connect: DBConnect, database: Database
) -> None:
    fail = Failing(1)

    @retry_on_transient_error()
    async def work() -> None:
        async with atomic_db_session(connect):
            pass
        await add(connect, "a")
        fail()

    await work()
    assert await database.names() == ["a"]


@pytest.mark.usefixtures("no_pauses")
async def test_a_function_whose_commit_has_an_unknown_outcome_is_not_repeated(
    database_url: URL, database: Database
) -> None:
    async def lose_commit(call: Call) -> Fault | None:
        return Fault.LOST_AFTER if call.statement.startswith("COMMIT") else None

    assert database_url.host is not None
    assert database_url.port is not None
    runs = 0
    async with proxy(database_url.host, database_url.port, lose_commit) as port:
        lossy = make_connect(database_url.set(host="127.0.0.1", port=port))

        @retry_on_transient_error()
        async def work() -> None:
            nonlocal runs
            runs += 1
            await add(lossy, f"run {runs}")

        assert isinstance(await error_of(work()), CommitOutcomeUnknownError)
        await lossy.close()
    assert await database.names() == ["run 1"]


async def test_the_testing_switches_of_stamina_work() -> None:
    fail = Failing(99)

    @retry_on_transient_error(attempts=5, wait_initial=60, wait_max=60)
    async def work() -> None:
        fail()

    with stamina.set_testing(True, attempts=2):
        await error_of(work())
    assert fail.calls == 2
    stamina.set_active(False)
    try:
        await error_of(work())
    finally:
        stamina.set_active(True)
    assert fail.calls == 3


async def test_no_connection_is_held_between_two_attempts(connect: DBConnect) -> None:
    waits = list[int]()

    def hook(details: stamina.instrumentation.RetryDetails) -> None:
        assert details.name.endswith("work")
        assert (details.args, details.kwargs) == ((), {})
        waits.append(connections_out(connect))

    @retry_on_transient_error(wait_initial=0.001, wait_jitter=0)
    async def work(password: str) -> None:
        await add(connect, "a")
        raise ConflictError

    stamina.instrumentation.set_on_retry_hooks([hook])
    try:
        await error_of(work("hunter2"))
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)
    assert waits == [0, 0]


@pytest.mark.usefixtures("no_pauses")
async def test_before_commit_is_called_in_each_attempt(connect: DBConnect) -> None:
    fail = Failing(1)

    @retry_on_transient_error(before_commit=lambda _: fail())
    async def work() -> None:
        await add(connect, "a")

    await work()
    assert fail.calls == 2


@pytest.mark.usefixtures("no_pauses")
async def test_a_cancelled_function_is_not_repeated(connect: DBConnect) -> None:
    runs = 0
    running = asyncio.Event()

    @retry_on_transient_error()
    async def work() -> None:
        nonlocal runs
        runs += 1
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await running.wait()
    task.cancel()
    assert isinstance(await error_of(task), asyncio.CancelledError)
    assert runs == 1


def test_bad_arguments_are_refused_at_once() -> None:
    for attempts in (0, -1):
        with pytest.raises(ValueError, match="attempts must be at least 1"):
            retry_on_transient_error(attempts)
    with pytest.raises(TypeError, match="attempts must be an int, not str"):
        retry_on_transient_error("3")  # type: ignore[arg-type]

    def work() -> None: ...
    async def generate() -> AsyncGenerator[int]:
        yield 1

    with pytest.raises(TypeError, match=r"an async function, not <function .*work"):
        retry_on_transient_error()(work)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"an async function, not <function .*generate"):
        retry_on_transient_error()(generate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"@retry_on_transient_error\(\)"):
        retry_on_transient_error(work)  # type: ignore[arg-type]


async def test_a_decorated_function_keeps_its_types() -> None:
    @retry_on_transient_error()
    async def work(number: int) -> str:
        return str(number)

    result: str = await work(1)
    assert result == "1"
    with pytest.raises(TypeError):
        await work()  # type: ignore[call-arg]
    with pytest.raises(ContextNotInitiatedError):
        await db_session(make_connect("sqlite+aiosqlite://"))


@pytest.mark.parametrize("steps", range(5))
async def test_a_commit_that_asyncpg_does_not_send_is_tried_again(
    connect: DBConnect, database: Database, database_url: URL, steps: int
) -> None:
    pids: list[int] = []

    @retry_on_transient_error(attempts=2)
    async def write() -> None:
        await add(connect, "a")
        pids.append(await backend_of(await db_session(connect)))
        if len(pids) == 1:
            terminate_and_block(database_url, pids[0])
            # Between the server's last word and the end of the connection, which are read in turns
            # of the event loop that follow each other, asyncpg refuses to send anything.
            for _ in range(steps):
                await asyncio.sleep(0)

    try:
        await write()
    except CommitOutcomeUnknownError:
        assert await database.names() == []
    else:
        assert len(pids) == 2
        assert await database.names() == ["a"]


def terminate_and_block(url: URL, pid: int) -> None:
    """Terminate a backend while this event loop reads nothing."""
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
