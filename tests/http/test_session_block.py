"""`async with await db_session(connect) as session:` leaves the session to its context."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import insert
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from context_async_sqlalchemy import (
    atomic_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
)
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from context_async_sqlalchemy.session import CurrentTransaction
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.dependency import WAYS, Adder
from tests.helpers.models import Item
from tests.helpers.serving import http_client
from tests.helpers.store import Store


async def write(store: Store, *names: str) -> AsyncSession:
    """Write each item in a block of its own."""
    for name in names:
        async with await db_session(store.connect) as session:
            await session.execute(insert(Item).values(name=name))
    return await db_session(store.connect)


async def test_what_a_block_writes_is_committed_with_its_request(store: Store) -> None:
    async def handler(scope: Scope) -> int:
        async with await db_session(store.connect) as session:
            await session.execute(insert(Item).values(name=scope["path"]))
            session.add(Item(name=scope["path"] + "+"))
        assert await db_session(store.connect) is session
        return int(scope["path"][1:])

    app = app_of(handler)
    for status in 200, 409, 303:
        assert (await call(app, http_scope(f"/{status}")))[0]["status"] == status
    assert await store.names() == ["/200", "/200+", "/303", "/303+"]


async def test_what_a_block_that_raises_has_done_is_rolled_back(store: Store) -> None:
    async with new_db_session_ctx():
        with suppress(KeyError):
            async with await db_session(store.connect) as session:
                await add(store.connect, "undone")
                session.add(Item(name="undone, too"))
                raise KeyError
        assert not session.in_transaction()
        await write(store, "after it")
    assert await store.names() == ["after it"]


async def test_blocks_nest_and_are_those_of_several_tasks(store: Store) -> None:
    async with new_db_session_ctx():
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(await db_session(store.connect))
            async with session, session.begin_nested():
                await add(store.connect, "inside")
            await add(store.connect, "between")
            await asyncio.gather(write(store, "a"), write(store, "b"), write(store, "c"))
        await add(store.connect, "outside")
    assert sorted(await store.names()) == ["a", "b", "between", "c", "inside", "outside"]


@pytest.mark.parametrize("mode", ["commit", "append", "savepoint"])
async def test_a_block_inside_an_atomic_one_leaves_the_session_to_that(
    store: Store, mode: CurrentTransaction
) -> None:
    async with new_db_session_ctx():
        await add(store.connect, "before")
        async with atomic_db_session(store.connect, mode) as session, session:
            await add(store.connect, "inside")
        with suppress(KeyError):
            async with atomic_db_session(store.connect) as session, session:
                await add(store.connect, "undone")
                raise KeyError
    assert await store.names() == ["before", "inside"]


@pytest.mark.parametrize("add_middleware", WAYS)
async def test_a_block_around_an_injected_session_leaves_it_to_its_request(
    store: Store, add_middleware: Adder
) -> None:
    app = FastAPI()
    add_middleware(app)
    dependency = DBSessionDependency(store.connect)

    @app.post("/{status}/{is_raised}")
    async def write_and_answer(
        status: int, is_raised: bool, session: Annotated[AsyncSession, Depends(dependency)]
    ) -> str:
        async with session:
            session.add(Item(name=f"{status} {is_raised}"))
            await session.flush()
            if is_raised:
                raise HTTPException(status)
        if status != 200:
            raise HTTPException(status)
        return "stored"

    async with http_client(app) as client:
        for status in 200, 303, 404:
            for is_raised in False, True:
                response = await client.post(f"/{status}/{is_raised}")
                assert response.status_code == status
    # An HTTPException goes by its status, inside a block, too.
    assert await store.names() == ["200 False", "200 True", "303 False", "303 True"]


async def test_what_was_written_before_a_block_that_raises_is_missed_in_the_log(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "context_async_sqlalchemy")

    async def handler(_: Scope) -> int:
        with suppress(KeyError):
            async with await db_session(store.connect):
                await add(store.connect, "nothing before it")
                raise KeyError
        await add(store.connect, "before")
        with suppress(KeyError):
            async with await db_session(store.connect):
                raise KeyError
        return 200

    assert (await call(app_of(handler), http_scope("/lost")))[0]["status"] == 200
    assert await store.names() == []
    [record] = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert "has raised KeyError, which rolls back what its transaction had written" in message
    assert "(GET '/lost')" in message


async def test_a_cancelled_block_is_rolled_back_and_gives_its_connection_back(
    store: Store,
) -> None:
    entered = asyncio.Event()

    async def write_and_wait() -> None:
        async with await db_session(store.connect):
            await add(store.connect, "undone")
            entered.set()
            await asyncio.Event().wait()

    async with new_db_session_ctx():
        task = asyncio.create_task(write_and_wait())
        await entered.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert store.connect.pool_status().checked_out == 0
        await write(store, "after it")
    assert await store.names() == ["after it"]


async def close(session: AsyncSession) -> None:
    await session.close()


async def close_in_a_block(session: AsyncSession) -> None:
    async with aclosing(session):
        pass


async def close_sync_session(session: AsyncSession) -> None:
    await session.run_sync(lambda sync_session: sync_session.close())


@pytest.mark.parametrize("close", [close, close_in_a_block, close_sync_session])
async def test_a_session_that_is_closed_by_name_is_rolled_back(
    store: Store, close: Callable[[AsyncSession], Any]
) -> None:
    async with new_db_session_ctx():
        session = await write(store, "undone")
        await close(session)
        assert not session.in_transaction()
        await write(store, "after it")
    assert await store.names() == ["after it"]


async def test_elsewhere_a_block_closes_its_session(store: Store) -> None:
    async with new_db_session_ctx():
        taken = await write(store, "undone")
        pop_db_session_from_context(store.connect)
        session = await store.connect.create_session()
        async with session, taken:
            session.add(Item(name="undone, too"))
        assert not session.in_transaction()
        assert not taken.in_transaction()
        async with new_non_ctx_session(store.connect) as session:
            async with session:
                await session.execute(insert(Item).values(name="undone as well"))
            assert not session.in_transaction()
        kept = await db_session(store.connect)
    async with kept:
        kept.add(Item(name="late"))
    assert not kept.in_transaction()
    assert await store.names() == []


async def test_a_block_that_began_before_the_context_had_its_session_closes_it(
    store: Store,
) -> None:
    session_maker = await store.connect.session_maker()
    async with new_db_session_ctx():
        async with session_maker() as session:
            put_db_session_to_context(store.connect, session)
            await write(store, "undone")
            assert session.in_transaction()
        assert not session.in_transaction()
        async with session_maker.begin() as session:
            put_db_session_to_context(store.connect, session)
            await write(store, "its own")
        assert not session.in_transaction()
    assert await store.names() == ["its own"]


async def test_a_block_under_test_is_that_of_production(store: Store) -> None:
    async with (
        rollback_session(store.connect) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(store.connect, session),
    ):
        await write(store, "a", "b")
        assert (await db_session(store.connect)).in_transaction()


async def test_a_transaction_may_begin_with_a_block_but_not_within_another(store: Store) -> None:
    async with new_db_session_ctx():
        async with await db_session(store.connect) as session, session.begin():
            await add(store.connect, "begun")
        assert await store.names() == ["begun"]
        await add(store.connect, "open")
        with pytest.raises(InvalidRequestError, match="already begun on this Session"):
            async with session.begin():
                pass
    assert await store.names() == ["begun", "open"]


class OwnSession(AsyncSession):
    """A session of a user's."""


class OwnBlock(AsyncSession):
    """A session whose block commits."""

    async def __aexit__(self, *args: Any) -> None:
        await self.commit()
        await super().__aexit__(*args)


async def test_the_class_of_a_session_looks_as_it_is(store: Store) -> None:
    await store.connect.session_maker()
    for cls in AsyncSession, OwnSession:
        store.connect._session_maker = async_sessionmaker(store.connect.engine, class_=cls)
        for name in "a", "b":
            async with new_db_session_ctx():
                session = await write(store, f"{cls.__name__} {name}")
                assert isinstance(session, cls)
                for attribute in "__name__", "__qualname__", "__module__", "__doc__":
                    assert getattr(type(session), attribute) == getattr(cls, attribute)
                assert repr(session).startswith(f"<{cls.__module__}.{cls.__qualname__} object at")
    assert await store.names() == [f"{c}Session {n}" for c in ("Async", "Own") for n in "ab"]


async def test_a_block_of_the_users_own_is_left_as_it_is(store: Store) -> None:
    await store.connect.session_maker()
    store.connect._session_maker = async_sessionmaker(store.connect.engine, class_=OwnBlock)
    async with new_db_session_ctx():
        session = await write(store, "committed")
        assert type(session).__aexit__ is OwnBlock.__aexit__
        assert await store.names() == ["committed"]
