"""Who uses the one transaction of a test at the same time takes turns, or is told."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.models import Item
from tests.helpers.shared import Served, names_after, names_in


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


async def test_another_event_loop_is_refused(tested: DBConnect) -> None:
    has_engine, is_shared = threading.Event(), threading.Event()

    async def insert_meanwhile() -> None:
        async with new_non_ctx_session(tested) as session:
            await session.scalar(select(1))
        engine_here = tested.engine
        has_engine.set()
        await asyncio.to_thread(is_shared.wait)
        try:
            with pytest.raises(RuntimeError, match="another event loop"):
                await run_in_new_ctx(Served(tested).insert, "a")
            assert tested.engine is not None
            with pytest.raises(InvalidRequestError, match="another event loop"):
                await tested.engine.connect()  # not the engine of this loop, which would commit
        finally:
            assert engine_here is not None
            await engine_here.dispose()

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, insert_meanwhile()))
    await asyncio.to_thread(has_engine.wait)
    async with shared_transaction(tested):
        is_shared.set()
        await other
