"""The messages on the page on troubleshooting are those that are raised, and its rows are so."""

from __future__ import annotations

import asyncio
import gc
import re
import warnings
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

import pytest
from fastapi import FastAPI
from sqlalchemy import URL, select, text
from sqlalchemy.exc import (
    DBAPIError,
    InvalidRequestError,
    MissingGreenlet,
    PendingRollbackError,
    StatementError,
)
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from context_async_sqlalchemy import (
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_after_response,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.asgi import add, app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect, make_connect
from tests.helpers.models import Item, Seat
from tests.helpers.programs import until
from tests.helpers.serving import http_client

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
_, *SECTIONS = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
MESSAGES = {
    heading: " ".join(match[1].split())
    for heading, section in zip(SECTIONS[::2], SECTIONS[1::2], strict=True)
    if (match := re.search(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
}


async def no_context(connect: DBConnect) -> None:
    await db_session(connect)


async def task_that_outlives(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        task = asyncio.create_task(db_session(connect))
    await task


async def context_in_a_context(_: DBConnect) -> None:
    async with new_db_session_ctx():
        init_db_session_ctx()


async def session_without_await(connect: DBConnect) -> None:
    with closing(db_session(connect)) as session:
        session.execute(select(1))  # type: ignore[attr-defined]


async def block_for_a_session(_: DBConnect) -> None:
    async with new_db_session_ctx() as session:
        session.execute(select(1))  # type: ignore[attr-defined]


async def read_after_rollback(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        item = (await (await db_session(connect)).scalars(select(Item))).one()
        await rollback_db_session(connect)
        assert item.name


async def task_that_is_not_awaited(connect: DBConnect) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(new_db_session_ctx())
        session = await db_session(connect)
        await session.connection()
        task = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.1)")))
        stack.push_async_callback(asyncio.sleep, 0)
    with suppress(Exception):
        await task


async def savepoint_that_waits(connect: DBConnect) -> None:
    await connect.session_maker()
    assert connect.engine is not None
    impatient = DBConnect.from_url(connect.engine.url, pool_timeout=0.01)
    async with impatient, new_db_session_ctx():
        session = await db_session(impatient)
        inside = asyncio.Event()

        async def read() -> None:
            await inside.wait()
            await session.execute(select(1))

        task = asyncio.create_task(read())
        async with session.begin_nested():
            inside.set()
            await task


async def swallowed_error(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        with suppress(DBAPIError):
            await (await db_session(connect)).execute(text("SELECT 1 / 0"))


async def full_pool(connect: DBConnect) -> None:
    assert connect.engine is not None
    url = connect.engine.url
    small = make_connect(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    async with small, new_db_session_ctx():
        await (await db_session(small)).execute(text("SELECT 1"))
        await run_in_new_ctx(add, small, "a")


async def lost_at_commit(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        for statement in (
            "CREATE FUNCTION pg_temp.die() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END$$",
            "CREATE TEMP TABLE last (x int)",
            "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON last"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.die()",
            "INSERT INTO last VALUES (1)",
        ):
            await (await db_session(connect)).execute(text(statement))


async def no_host(_: DBConnect) -> None:
    connect = DBConnect(lambda host: create_async_engine(host), async_sessionmaker)
    await connect.create_session()


async def statement_of_another_connection(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        for _ in range(2):
            await add(connect, "a")
            await (await db_session(connect)).execute(text("DEALLOCATE ALL"))
            await rollback_db_session(connect)


async def loop_in_a_thread(connect: DBConnect) -> None:
    async def handler(_: Scope) -> int:
        await asyncio.to_thread(lambda: asyncio.run(no_context(connect)))
        return 200

    await call(app_of(handler))


async def transaction_in_a_transaction(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")
        async with session.begin():
            await add(connect, "b")


PROVOCATIONS: dict[str, Callable[[DBConnect], Awaitable[None]]] = {
    "ContextNotInitiatedError": no_context,
    "ContextClosedError": task_that_outlives,
    "ContextAlreadyInitiatedError": context_in_a_context,
    "MissingGreenlet": read_after_rollback,
    "A task still uses the session": task_that_is_not_awaited,
    "Another task is inside a savepoint": savepoint_that_waits,
    "'coroutine' object has no attribute": session_without_await,
    "A context is no session": block_for_a_session,
    "A transaction is already begun": transaction_in_a_transaction,
    "PendingRollbackError at the commit": swallowed_error,
    "QueuePool limit": full_pool,
    "CommitOutcomeUnknownError": lost_at_commit,
    "host is not set": no_host,
    "prepared statement does not exist": statement_of_another_connection,
    "This event loop is not the one that serves the request": loop_in_a_thread,
}


def told(error: BaseException) -> str:
    """Return what Python prints of an error, in one line, without the module of its class."""
    notes = getattr(error, "__notes__", ())
    said = re.sub(r"__asyncpg_stmt_\w+__", "__asyncpg_stmt_1__", f"{error}")
    return " ".join([f"{type(error).__name__}:", *said.split(), *" ".join(notes).split()])


@pytest.mark.parametrize("heading", PROVOCATIONS)
async def test_a_message_is_what_is_raised(heading: str, connect: DBConnect) -> None:
    await connect.session_maker()
    with pytest.raises(Exception) as raised:  # noqa: PT011  # whatever it says is compared
        await PROVOCATIONS[heading](connect)
    assert MESSAGES[heading] in told(raised.value)
    # A task that somebody has left alone goes on for a moment.
    await until(lambda: connections_out(connect) == 0)


async def test_the_message_of_sqlite_is_what_is_raised(sqlite_connect: DBConnect) -> None:
    assert sqlite_connect.engine is not None
    url = sqlite_connect.engine.url
    hurried: DBConnect = DBConnect.from_url(url, connect_args={"timeout": 0})
    async with hurried, new_db_session_ctx():
        await add(hurried, "a")
        with pytest.raises(DBAPIError) as raised:
            await run_in_new_ctx(add, hurried, "b")
        await rollback_db_session(hurried)
    assert MESSAGES["database is locked"] in told(raised.value)


async def test_what_is_said_on_sqlite_of_an_expired_attribute(sqlite_connect: DBConnect) -> None:
    said = MESSAGES["MissingGreenlet"].partition(": ")[2]
    async with new_db_session_ctx():
        session = await add(sqlite_connect, "a")
        item = (await session.scalars(select(Item))).one()
        session.expire(item)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy leaves a coroutine that nobody awaits
            # That of SQLAlchemy 2.1; 2.0 has the other one.
            with pytest.raises((StatementError, MissingGreenlet), match=said):
                assert item.name
            gc.collect()


async def test_what_python_says_of_a_session_that_is_not_awaited(connect: DBConnect) -> None:
    said = "'coroutine' object does not support the asynchronous context manager protocol"
    assert said in " ".join(PAGE.split())
    with closing(db_session(connect)) as session, pytest.raises(TypeError, match=said):
        async with session:  # type: ignore[attr-defined]
            pass
    assert "was never awaited" in PAGE
    with pytest.warns(RuntimeWarning, match="coroutine 'db_session' was never awaited"):
        db_session(connect)  # type: ignore[unused-coroutine]


def test_every_message_is_provoked() -> None:
    assert {*MESSAGES} == {*PROVOCATIONS, "database is locked"}


async def test_what_sqlalchemy_says_of_two_tasks(connect: DBConnect) -> None:
    said: list[object] = []
    async with new_non_ctx_session(connect) as session:
        said += await asyncio.gather(
            *(session.execute(text("SELECT 1")) for _ in range(2)), return_exceptions=True
        )
        session.add(Item(name="a"))
        said += await asyncio.gather(*(session.flush() for _ in range(2)), return_exceptions=True)
        await session.invalidate()
    errors = [error for error in said if isinstance(error, InvalidRequestError)]
    assert len(errors) == 2
    assert errors[0].code == "isce"
    quoted = (
        "This session is provisioning a new connection; concurrent operations are not permitted",
        "Session is already flushing",
    )
    for error, beginning in zip(errors, quoted, strict=True):
        assert str(error).startswith(beginning)
        assert beginning in " ".join(PAGE.split())


async def test_what_sqlalchemy_says_after_a_flush_that_failed(connect: DBConnect) -> None:
    beginning = "This Session's transaction has been rolled back"
    assert beginning in PAGE
    with pytest.raises(PendingRollbackError, match=beginning):
        async with new_db_session_ctx():
            session = await db_session(connect)
            session.add_all([Item(name="a"), Item(name="a")])
            with suppress(DBAPIError):
                await session.flush()
            await session.execute(text("SELECT 1"))


# A row is missing


async def left_uncommitted(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        session.add(Item(name="a"))
        await session.flush()


async def rolled_back(connect: DBConnect) -> None:
    await add(connect, "a")
    await rollback_db_session(connect)


async def closed(connect: DBConnect) -> None:
    await add(connect, "a")
    await close_db_session(connect)


async def undone_savepoint(connect: DBConnect) -> None:
    with suppress(ZeroDivisionError):
        await (await db_session(connect)).connection()
        async with atomic_db_session(connect, "savepoint"):
            await add(connect, "a")
            raise ZeroDivisionError


async def commits_late_and_fails(connect: DBConnect) -> None:
    commit_after_response()
    session = await add(connect, "a")
    session.add_all([Seat(number=1), Seat(number=1)])


@pytest.mark.parametrize(
    ("write", "status"),
    [
        (left_uncommitted, 200),
        (rolled_back, 200),
        (closed, 200),
        (undone_savepoint, 200),
        (commits_late_and_fails, 200),
        (lambda connect: add(connect, "a"), 303),
    ],
)
async def test_a_row_is_missing_although_the_client_saw_a_success(
    connect: DBConnect,
    database: Database,
    write: Callable[[DBConnect], Awaitable[None]],
    status: int,
) -> None:
    async def handler(_: Scope) -> int:
        await write(connect)
        return status

    async with http_client(app_of(handler, commit_on=lambda status: status < 300)) as client:
        assert (await client.get("/")).status_code == status
        await until(lambda: connections_out(connect) == 0)
    assert await database.names() == []


# A row is there


async def committed_early(connect: DBConnect) -> None:
    await add(connect, "a")
    await commit_db_session(connect)


async def committed_by_hand(connect: DBConnect) -> None:
    await (await add(connect, "a")).commit()


async def committed_by_a_block(connect: DBConnect) -> None:
    await add(connect, "a")
    async with atomic_db_session(connect):
        pass


async def in_a_context_of_its_own(connect: DBConnect) -> None:
    await run_in_new_ctx(add, connect, "a")


async def in_no_context(connect: DBConnect) -> None:
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Item(name="a"))


async def only_added(connect: DBConnect) -> None:
    await add(connect, "a")


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (committed_early, ["a"]),
        (committed_by_hand, ["a"]),
        (committed_by_a_block, ["a"]),
        (in_a_context_of_its_own, ["a"]),
        (in_no_context, ["a"]),
        (only_added, []),
    ],
)
async def test_a_row_is_there_although_the_client_saw_an_error(
    connect: DBConnect,
    database: Database,
    write: Callable[[DBConnect], Awaitable[None]],
    names: list[str],
) -> None:
    async def handler(_: Scope) -> int:
        await write(connect)
        return 500

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 500
    assert await database.names() == names


@pytest.mark.parametrize(
    ("engine_options", "options"),
    [({"isolation_level": "AUTOCOMMIT"}, {}), ({}, {"commit_on": lambda _: True})],
    ids=["autocommit", "commit_on"],
)
async def test_a_row_is_there_by_an_option(
    database_url: URL,
    database: Database,
    engine_options: dict[str, str],
    options: dict[str, Callable[[int], bool]],
) -> None:
    async with checked_connect(database_url, database, **engine_options) as connect:

        async def handler(_: Scope) -> int:
            await add(connect, "a")
            return 500

        async with http_client(app_of(handler, **options)) as client:
            assert (await client.get("/")).status_code == 500
    assert await database.names() == ["a"]


# A middleware


@pytest.mark.parametrize("is_added_before", [True, False])
async def test_a_middleware_has_a_context_if_it_is_added_before(
    connect: DBConnect, is_added_before: bool
) -> None:
    errors: list[Exception] = []

    class Asking:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                try:
                    await db_session(connect)
                except ContextNotInitiatedError as error:
                    errors.append(error)
            await self.app(scope, receive, send)

    app = FastAPI()
    if is_added_before:
        app.add_middleware(Asking)
    add_fastapi_http_db_session_middleware(app)
    if not is_added_before:
        app.add_middleware(Asking)
    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 404
    assert bool(errors) is not is_added_before
