"""What a callback of on_commit may do, and what becomes of the rest if it fails."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event

from context_async_sqlalchemy import (
    DBConnect,
    commit_all_sessions,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    on_commit,
    put_db_session_to_context,
    reset_db_session_ctx,
)
from context_async_sqlalchemy._unit.on_commit import CommitWatch
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call
from tests.helpers.calls import Calls
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item


async def test_a_callback_that_fails_is_logged_and_stops_nothing(
    connect: DBConnect, database: Database, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(secret: str) -> None:
        raise ValueError("the mail server is down")

    async def be_cancelled() -> None:
        raise asyncio.CancelledError

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        on_commit(connect, partial(fail, "hunter2"))
        on_commit(connect, be_cancelled)
        on_commit(connect, calls.callback("the next"))
        return 201

    sent = await call(app_of(handler))

    assert sent[0]["status"] == 201
    assert calls == ["the next"]
    assert await database.names() == ["a"]
    assert "the mail server is down" in caplog.text
    assert "fail" in caplog.messages[0]
    assert "be_cancelled" in caplog.messages[1]
    assert "hunter2" not in caplog.text


async def test_a_callback_has_a_context_of_its_own_which_is_committed(
    connect: DBConnect, database: Database, calls: Calls
) -> None:
    async with new_db_session_ctx():
        outer = await add(connect, "a")

        async def callback() -> None:
            assert await add(connect, "b") is not outer
            on_commit(connect, calls.callback("after b"))

        on_commit(connect, callback)
        await commit_db_session(connect)
        assert await db_session(connect) is outer
        assert await database.names() == ["a", "b"]
        assert calls == ["after b"]


async def test_a_callback_whose_own_work_fails_leaves_that_of_the_others(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        on_commit(connect, partial(add, connect, "a"))
        on_commit(connect, partial(add, connect, "b"))
    assert await database.names() == ["a", "b"]
    assert "IntegrityError" in caplog.text
    assert connections_out(connect) == 0


async def test_what_a_callback_writes_through_a_session_it_has_kept_is_not_lost(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")

        async def write(name: str, *, fails: bool) -> None:
            session.add(Item(name=name))
            await session.flush()
            if fails:
                raise ValueError

        on_commit(connect, partial(write, "fails", fails=True))
        on_commit(connect, partial(write, "b", fails=False))
    assert await database.names() == ["a", "b"]
    assert connections_out(connect) == 0


async def test_a_callback_that_a_listener_of_the_commit_registers_is_not_lost(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")
        event.listen(
            session.sync_session,
            "after_commit",
            lambda _: on_commit(connect, calls.callback("from the listener")),
            once=True,
        )
        await session.commit()
    assert calls == ["from the listener"]


async def test_a_session_that_outlives_its_contexts_is_not_watched_by_them(
    connect: DBConnect,
) -> None:
    gc.collect()
    others = count_watches()  # kept by the tracebacks of earlier tests
    async with await connect.create_session() as session:
        for _ in range(10):
            token = init_db_session_ctx()
            put_db_session_to_context(connect, session)
            on_commit(connect, list)
            await commit_all_sessions()
            await reset_db_session_ctx(token, with_close=False)
        gc.collect()
        assert count_watches() == others


def count_watches() -> int:
    return sum(isinstance(o, CommitWatch) for o in gc.get_objects())


async def test_a_session_is_as_good_as_new_after_a_cancelled_callback(
    connect: DBConnect, database: Database, calls: Calls
) -> None:
    running, release = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        running.set()
        await release.wait()
        calls.append("slow")

    async def work() -> None:
        async with new_db_session_ctx():
            session = await add(connect, "a")
            on_commit(connect, slow)
            with pytest.raises(asyncio.CancelledError):
                await session.commit()
            await add(connect, "b")

    task = asyncio.create_task(work())
    await running.wait()
    task.cancel()
    release.set()
    await task
    assert calls == ["slow"]
    assert await database.names() == ["a", "b"]


async def test_a_session_that_is_put_into_a_context_is_watched_too(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        on_commit(connect, calls.callback("a"))
        async with await connect.create_session() as session:
            put_db_session_to_context(connect, session)
            session.add(Item(name="a"))
            await session.commit()
            assert calls == ["a"]


async def test_a_callback_that_is_registered_while_committing_is_not_lost(
    connect: DBConnect, calls: Calls
) -> None:
    def before_commit(_: Any) -> None:
        on_commit(connect, calls.callback("from before_commit"))

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return 200

    await call(app_of(handler, before_commit=before_commit))
    assert calls == ["from before_commit"]


async def test_a_listener_of_sqlalchemys_own_that_fails_fails_what_is_committed(
    connect: DBConnect, database: Database
) -> None:
    def fail(_: object) -> None:
        raise ValueError("too late")

    async def handler(_: Scope) -> int:
        session = await add(connect, "a")
        event.listen(session.sync_session, "after_commit", fail, once=True)
        return 200

    with pytest.raises(ValueError, match="too late"):
        await call(app_of(handler))
    assert await database.names() == ["a"]
    assert connections_out(connect) == 0
