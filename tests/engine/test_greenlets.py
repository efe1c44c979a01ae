"""The session of a context runs in greenlets that are used again."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from weakref import ref

import greenlet  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
)
from context_async_sqlalchemy._engine import greenlets
from context_async_sqlalchemy._engine.greenlets import run_in_greenlet
from context_async_sqlalchemy._engine.private_names import Provider

current: ContextVar[object] = ContextVar("current", default=None)


async def test_these_versions_let_a_greenlet_be_used_again() -> None:
    used: list[object] = []

    def work() -> None:
        await_only(asyncio.sleep(0))
        used.append(greenlet.getcurrent())

    await run_in_greenlet(work)
    await run_in_greenlet(work)
    assert used[0] is used[1]


@pytest.fixture
async def session(connect: DBConnect) -> AsyncGenerator[AsyncSession]:
    async with new_db_session_ctx():
        yield await db_session(connect)


async def greenlet_of(call: Callable[[Callable[..., object]], Awaitable[object]]) -> object:
    """Return the greenlet in which `call` calls what it is given."""
    used: list[object] = []
    await call(lambda *_: used.append(greenlet.getcurrent()))
    return used[0]


async def test_the_session_of_a_context_runs_in_it(
    session: AsyncSession, connect: DBConnect
) -> None:
    kept = await greenlet_of(run_in_greenlet)
    assert await greenlet_of(session.run_sync) is kept
    assert isinstance(kept, Provider)

    async def commit(note: Callable[..., object]) -> None:
        event.listen(session.sync_session, "after_commit", note)
        await session.execute(text("SELECT 1"))
        await commit_db_session(connect)

    assert await greenlet_of(commit) is kept

    async def execute(note: Callable[..., object]) -> None:
        event.listen(session.sync_session, "do_orm_execute", note)
        assert (await session.execute(text("SELECT 2"))).scalar_one() == 2
        assert await session.scalar(text("SELECT 3")) == 3

    assert await greenlet_of(execute) is kept


async def test_its_methods_are_async_functions_with_their_parameters(session: AsyncSession) -> None:
    # Starlette runs what is none, such as a background task, in a thread.
    for name in ("execute", "scalar", "commit", "flush"):
        assert inspect.iscoroutinefunction(getattr(session, name))
        signature = inspect.signature(getattr(AsyncSession, name))
        assert inspect.signature(getattr(type(session), name)) == signature


async def test_a_session_of_the_callers_runs_in_sqlalchemys_own(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        assert not isinstance(await greenlet_of(session.run_sync), Provider)


async def test_what_a_test_puts_in_the_place_of_a_method_is_called(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(*_: object) -> int:
        return 42

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSession, "scalar", answer)
        assert await session.scalar(text("SELECT 1")) == 42
    assert await session.scalar(text("SELECT 1")) == 1


async def test_a_class_with_a_method_of_its_own_keeps_it(database_url: URL) -> None:
    class Ours(AsyncSession):
        async def scalar(self, *args: Any, **options: Any) -> Any:
            return await super().scalar(*args, **options) + 1

    options: Any = {"class_": Ours}
    async with (
        DBConnect.from_url(database_url, session_options=options) as connect,
        new_db_session_ctx(),
    ):
        session = await db_session(connect)
        assert await session.scalar(text("SELECT 1")) == 2
        assert isinstance(await greenlet_of(session.run_sync), Provider)


async def test_an_error_is_raised_and_the_greenlet_goes_on() -> None:
    def fail() -> None:
        await_only(asyncio.sleep(0))
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await run_in_greenlet(fail)


async def test_a_cancellation_reaches_the_function_and_the_greenlet_goes_on() -> None:
    seen: list[BaseException] = []
    is_waiting = asyncio.Event()

    async def wait() -> None:
        is_waiting.set()
        await asyncio.Event().wait()

    def work() -> None:
        try:
            await_only(wait())
        except BaseException as error:
            seen.append(error)
            await_only(asyncio.sleep(0))  # as a rollback does
            raise

    for _ in range(3):
        is_waiting.clear()
        task: asyncio.Task[object] = asyncio.create_task(run_in_greenlet(work))
        await is_waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [type(error) for error in seen] == [asyncio.CancelledError] * 3


async def test_the_context_variables_are_those_of_the_task_and_are_not_kept() -> None:
    class Thing:
        pass

    seen: list[bool] = []

    async def task(thing: Thing) -> None:
        current.set(thing)

        def work() -> None:
            await_only(asyncio.sleep(0))
            seen.append(current.get() is thing)

        await run_in_greenlet(work)

    things = [Thing() for _ in range(5)]
    await asyncio.gather(*(asyncio.create_task(task(thing)) for thing in things))
    assert seen == [True] * 5
    alive = [ref(thing) for thing in things]
    things.clear()
    await asyncio.sleep(0)
    gc.collect()
    assert [thing() for thing in alive] == [None] * 5


async def test_an_error_is_not_kept() -> None:
    class OurError(Exception):
        pass

    def fail() -> None:
        raise OurError

    async def see() -> ref[OurError]:
        try:
            await run_in_greenlet(fail)
        except OurError as error:
            return ref(error)
        raise AssertionError("no error")

    error = await see()
    gc.collect()
    assert error() is None


async def test_many_at_a_time_are_served_and_few_are_kept() -> None:
    gate = asyncio.Event()
    done: list[int] = []

    def work(number: int) -> None:
        await_only(gate.wait())
        done.append(number)

    tasks = [
        asyncio.create_task(run_in_greenlet(lambda number=number: work(number)))
        for number in range(100)
    ]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert sorted(done) == list(range(100))
    assert len(greenlets._idle.greenlets) <= 64


async def test_a_function_may_commit_inside_another_one() -> None:
    order: list[str] = []

    def inner() -> None:
        await_only(asyncio.sleep(0))
        order.append("inner")

    def outer() -> None:
        await_only(run_in_greenlet(inner))
        order.append("outer")

    for _ in range(2):
        await run_in_greenlet(outer)
    assert order == ["inner", "outer"] * 2


def test_threads_keep_their_own() -> None:
    def serve() -> None:
        for _ in range(3):
            asyncio.run(_run())

    async def _run() -> None:
        await run_in_greenlet(lambda: await_only(asyncio.sleep(0)))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
