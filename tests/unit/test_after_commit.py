"""What on_commit calls, and when."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    new_non_ctx_session,
    on_commit,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.helpers.asgi import add, app_of, call
from tests.helpers.calls import Calls
from tests.helpers.cancelling import cancel_at
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean, make_connect
from tests.helpers.models import Item, Seat
from tests.helpers.proxy import Call, Fault, proxy


async def by_session(connect: DBConnect) -> None:
    await (await db_session(connect)).commit()


async def by_transaction(connect: DBConnect) -> None:
    transaction = (await db_session(connect)).get_transaction()
    assert transaction is not None
    await transaction.commit()


async def by_all_sessions(_: DBConnect) -> None:
    await commit_all_sessions()


async def by_atomic_block(connect: DBConnect) -> None:
    async with atomic_db_session(connect, "append"):
        pass


every_committer = pytest.mark.parametrize(
    "commit", [by_session, by_transaction, by_all_sessions, by_atomic_block, commit_db_session]
)


@every_committer
async def test_a_callback_has_run_when_the_commit_returns_whoever_commits(
    connect: DBConnect, database: Database, calls: Calls, commit: Any
) -> None:
    async def look() -> None:
        calls.extend([*await database.names(), f"{connections_out(connect)} out"])

    async with new_db_session_ctx():
        await add(connect, "a")
        on_commit(connect, look)
        assert calls == []
        await commit(connect)
        assert calls == ["a", "0 out"]
    assert calls == ["a", "0 out"]


async def test_a_callback_runs_once_the_block_of_a_session_has_committed(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        async with session.begin():
            session.add(Item(name="a"))
            on_commit(connect, calls.callback("a"))
        assert calls == ["a"]


async def test_callbacks_sync_or_not_run_in_order_after_the_end_of_a_block(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        on_commit(connect, calls.callback("before the session was made"))
        await db_session(connect)
        on_commit(connect, partial(calls.append, "before the transaction began"))
        await add(connect, "a")
        on_commit(connect, calls.callback("after a statement"))
        assert calls == []
    assert calls == [
        "before the session was made",
        "before the transaction began",
        "after a statement",
    ]


async def test_a_callback_waits_for_the_next_transaction_if_none_is_open(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        on_commit(connect, calls.callback("first"))
        async with atomic_db_session(connect, "raise"):
            on_commit(connect, calls.callback("second"))
        assert calls == ["first", "second"]
        on_commit(connect, calls.callback("dropped"))
        await add(connect, "a")
        await rollback_db_session(connect)
        on_commit(connect, calls.callback("third"))
    assert calls == ["first", "second", "third"]


async def test_a_callback_without_any_transaction_runs_when_its_context_ends_well(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        on_commit(connect, calls.callback("a"))
    assert calls == ["a"]
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx():
            on_commit(connect, calls.callback("b"))
            raise ValueError("no")
    assert calls == ["a"]


async def by_session_rollback(connect: DBConnect) -> None:
    await (await db_session(connect)).rollback()


async def by_all_rolled_back(_: DBConnect) -> None:
    await rollback_all_sessions()


@pytest.mark.parametrize(
    "undo", [by_session_rollback, by_all_rolled_back, rollback_db_session, close_db_session]
)
async def test_a_callback_is_dropped_when_its_transaction_is_undone(
    connect: DBConnect, calls: Calls, undo: Any
) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        on_commit(connect, calls.callback("dropped"))
        await undo(connect)
        await add(connect, "b")
        on_commit(connect, calls.callback("b"))
    assert calls == ["b"]


async def test_a_callback_is_dropped_when_the_commit_fails(
    connect: DBConnect, calls: Calls
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add_all([Seat(number=1), Seat(number=1)])
        await session.flush()
        on_commit(connect, calls.callback("dropped"))
        with pytest.raises(IntegrityError):
            await commit_db_session(connect)
        await rollback_db_session(connect)
    assert calls == []


async def test_a_callback_is_dropped_when_nobody_can_know_the_outcome_of_the_commit(
    connect: DBConnect, database: Database, calls: Calls
) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    url = connect.engine.url
    assert url.host is not None
    assert url.port is not None

    async def lose_commit(call: Call) -> Fault | None:
        return Fault.LOST_AFTER if call.statement.startswith("COMMIT") else None

    async with proxy(url.host, url.port, lose_commit) as port:
        lossy = make_connect(url.set(host="127.0.0.1", port=port))
        with pytest.raises(CommitOutcomeUnknownError):
            async with new_db_session_ctx():
                await add(lossy, "a")
                on_commit(lossy, calls.callback("dropped"))
        await lossy.close()
    assert await database.names() == ["a"]
    assert calls == []


async def test_a_callback_is_dropped_with_its_savepoint(connect: DBConnect, calls: Calls) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        on_commit(connect, calls.callback("outside"))
        for fails in (True, False):
            try:
                async with atomic_db_session(connect, "savepoint"):
                    on_commit(connect, calls.callback(f"fails: {fails}"))
                    async with atomic_db_session(connect, "savepoint"):
                        on_commit(connect, calls.callback(f"inner, fails: {fails}"))
                    if fails:
                        raise ValueError
            except ValueError:
                pass
        assert calls == []
    assert calls == ["outside", "fails: False", "inner, fails: False"]


async def test_a_callback_of_a_released_savepoint_is_dropped_with_the_transaction(
    connect: DBConnect, calls: Calls
) -> None:
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx():
            await add(connect, "a")
            async with atomic_db_session(connect, "savepoint"):
                on_commit(connect, calls.callback("dropped"))
            raise ValueError("no")
    assert calls == []


@pytest.mark.parametrize(("status", "called"), [(200, ["a"]), (404, [])])
async def test_the_status_of_a_response_decides_and_the_callback_comes_before_it(
    connect: DBConnect, calls: Calls, status: int, called: list[str]
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        on_commit(connect, calls.callback("a"))
        return status

    app = app_of(handler)

    async def send(message: Any) -> None:
        assert calls == called, "the response has overtaken the callback"

    await app({"type": "http"}, None, send)  # type: ignore[arg-type]
    assert calls == called


async def test_callbacks_run_in_a_call_and_in_a_context_opened_by_hand(
    connect: DBConnect, calls: Calls
) -> None:
    async def work(name: str) -> None:
        await add(connect, name)
        on_commit(connect, calls.callback(name))

    await run_in_new_ctx(work, "call")
    token = init_db_session_ctx()
    await work("by hand")
    await commit_all_sessions()
    await reset_db_session_ctx(token)
    assert calls == ["call", "by hand"]


async def test_a_callback_of_a_test_runs_in_the_transaction_of_the_test(
    connect: DBConnect, database: Database
) -> None:
    async with (
        rollback_session(connect) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(connect, session),
    ):
        await add(connect, "a")
        on_commit(connect, partial(add, connect, "b"))
        await commit_db_session(connect)
        await commit_db_session(connect)
        names = await session.scalars(text("SELECT name FROM item ORDER BY id"))
        assert names.all() == ["a", "b"]
    assert await database.names() == []


async def test_the_callbacks_of_several_databases_wait_until_all_are_committed(
    connect: DBConnect, second_connect: DBConnect, database: Database, calls: Calls
) -> None:
    async def look(name: str) -> None:
        calls.extend([name, *await database.names()])

    async with new_db_session_ctx():
        await add(connect, "a")
        await add(second_connect, "b")
        on_commit(second_connect, partial(look, "second"))
        on_commit(connect, partial(look, "first"))
    assert sorted(calls) == ["a", "a", "b", "b", "first", "second"]


async def test_the_callbacks_of_what_was_committed_run_though_another_commit_fails(
    connect: DBConnect, second_connect: DBConnect, calls: Calls
) -> None:
    with pytest.raises(IntegrityError):
        async with new_db_session_ctx():
            await add(connect, "a")
            session = await db_session(second_connect)
            session.add_all([Seat(number=1), Seat(number=1)])
            on_commit(connect, calls.callback("committed"))
            await session.flush()
            on_commit(second_connect, calls.callback("dropped"))
    assert calls == ["committed"]


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
@pytest.mark.parametrize("way", ["request", "block", "commit_db_session"])
@pytest.mark.parametrize("early", [True, False])
async def test_a_callback_runs_if_and_only_if_the_commit_took_place_whenever_cancelled(
    connect: DBConnect, database: Database, calls: Calls, kind: str, way: str, early: bool
) -> None:
    async def work(_: Scope | None = None) -> int:
        if early:
            on_commit(connect, calls.callback("called"))
        await add(connect, "a")
        if not early:
            on_commit(connect, calls.callback("called"))
        if way == "commit_db_session":
            await commit_db_session(connect)
        return 200

    outcomes = set()
    for number in itertools.count(1):
        async with new_non_ctx_session(connect) as session:
            await session.connection()  # the cancelled request before it has cost the last one
        todo = call(app_of(work)) if way == "request" else run_in_block(work)
        suspensions = await cancel_at(number, todo, kind, pause=0.01)
        await assert_clean(connect, database)
        names = await database.names()
        assert calls == (["called"] if names else [])
        outcomes.add((suspensions >= number, bool(names)))
        await database.empty()
        calls.clear()
        if suspensions < number:
            break
    # Some were cancelled before the commit, some during it or later, and the last one not at all.
    assert outcomes == {(True, False), (True, True), (False, True)}


async def run_in_block(work: Callable[[], Awaitable[Any]]) -> None:
    async with new_db_session_ctx():
        await work()


async def test_a_thing_that_cannot_be_called_is_refused_at_once(connect: DBConnect) -> None:
    async def callback() -> None: ...

    async with new_db_session_ctx():
        for wrong in (callback(), None, "callback"):
            with pytest.raises(TypeError, match="callback must be a function"):
                on_commit(connect, wrong)  # type: ignore[arg-type]


async def test_a_callback_needs_a_context(connect: DBConnect, calls: Calls) -> None:
    with pytest.raises(ContextNotInitiatedError):
        on_commit(connect, calls.callback("a"))
    ended = asyncio.Event()

    async def late() -> None:
        await ended.wait()
        on_commit(connect, calls.callback("a"))

    async with new_db_session_ctx():
        task = asyncio.create_task(late())
    ended.set()
    with pytest.raises(ContextClosedError):
        await task
    assert calls == []


async def test_nothing_is_logged_when_all_goes_well(
    connect: DBConnect, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "context_async_sqlalchemy"):
        async with new_db_session_ctx():
            await add(connect, "a")
            on_commit(connect, calls.callback("a"))
    assert caplog.messages == []
