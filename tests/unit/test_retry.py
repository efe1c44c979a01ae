"""Functions that run again after a transient error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import psycopg
import pytest
import stamina
from sqlalchemy import URL, insert, text

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    on_commit,
    retry_on_transient_error,
)
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, make_connect
from tests.helpers.failures import (
    ConflictError,
    Failing,
    backend_of,
    commit_session_itself,
    error_of,
)
from tests.helpers.models import Item
from tests.helpers.proxy import Call, Fault, proxy


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
