"""What users see of the types: this only has to type-check."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from anyio import from_thread, to_thread
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine as create,
)

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    db_session,
    get_db_session_from_context,
    is_transient_error,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    pop_db_session_from_context,
    retry_on_transient_error,
    roll_back_this_request,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.postgres import keep_on_primary
from context_async_sqlalchemy.replicas import Replicated
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    shared_transaction,
)


class OurSession(AsyncSession):
    """A session class of the user's, as SQLModel's."""

    async def exec(self, statement: str) -> list[str]:
        return [statement]


async def with_the_class_of_sqlalchemy(connect: DBConnect) -> None:
    assert_type(await db_session(connect), AsyncSession)
    assert_type(await db_session(connect, read_only=True), AsyncSession)
    assert_type(await db_session(connect, read_only="snapshot"), AsyncSession)
    await db_session(connect, read_only="snap")  # type: ignore[call-overload]
    assert_type(await to_thread.run_sync(from_thread.run, db_session, connect), AsyncSession)
    assert_type(await run_in_new_ctx(db_session, connect), AsyncSession)
    assert_type(await asyncio.gather(*map(db_session, [connect])), list[AsyncSession])
    assert_type(await connect.create_session(), AsyncSession)


async def with_a_class_of_their_own(engine: AsyncEngine) -> None:
    def make(engine: AsyncEngine) -> async_sessionmaker[OurSession]:
        return async_sessionmaker(engine, class_=OurSession)

    async def make_later(engine: AsyncEngine) -> async_sessionmaker[OurSession]:
        return make(engine)

    for connect in (
        DBConnect(create, make, host="h"),
        DBConnect(create, make_later, host="h"),
        DBConnect(create, lambda engine: async_sessionmaker(engine, class_=OurSession), "h"),
        DBConnect.from_url("sqlite://", session_options={"class_": OurSession}),
    ):
        assert_type(connect, DBConnect[OurSession])
        assert_type(await db_session(connect), OurSession)
        assert_type(await db_session(connect, read_only=True), OurSession)
        assert_type(await to_thread.run_sync(from_thread.run, db_session, connect), OurSession)
        assert_type(await (await db_session(connect)).exec("SELECT"), list[str])
        assert_type(await connect.create_session(), OurSession)
        assert_type(get_db_session_from_context(connect), OurSession | None)
        assert_type(pop_db_session_from_context(connect), OurSession | None)
        async with (
            atomic_db_session(connect, "savepoint") as one,
            new_non_ctx_session(connect) as two,
            new_non_ctx_atomic_session(connect) as three,
        ):
            assert_type(one, OurSession)
            assert_type(two, OurSession)
            assert_type(three, OurSession)
        async with (
            shared_transaction(connect) as four,
            rollback_session(connect) as five,
            put_savepoint_session_in_ctx(connect, five) as six,
        ):
            assert_type(four, OurSession)
            assert_type(five, OurSession)
            assert_type(six, OurSession)
        assert_type(DBSessionDependency(connect).connect, DBConnect[OurSession])
        assert_type(await db_session(Replicated(connect, connect, secret="")), OurSession)
        # Who does not care about the class takes any connect.
        await with_the_class_of_sqlalchemy(connect)
        on_commit(connect, print)
        roll_back_this_request()


async def without_a_class() -> None:
    assert_type(DBConnect.from_url("sqlite://"), DBConnect[AsyncSession])
    assert_type(DBConnect(create, async_sessionmaker, host="h"), DBConnect[AsyncSession])
    async with DBConnect.from_url(
        "postgresql://h/d",
        "password",
        pool_size=2,
        isolation_level="SERIALIZABLE",
        before_create_session_handler=keep_on_primary(["a", "b"]),
        session_options={"expire_on_commit": True},
    ) as connect:
        assert_type(connect, DBConnect[AsyncSession])


async def a_dependency_is_told_the_class_before_it_has_a_connect() -> None:
    assert_type(DBSessionDependency().connect, DBConnect[AsyncSession])
    dependency = DBSessionDependency[OurSession]()
    assert_type(dependency.connect, DBConnect[OurSession])
    await dependency.initialize("sqlite://", session_options={"class_": OurSession}, pool_size=2)
    await dependency.initialize(
        "sqlite://",
        session_options={"class_": AsyncSession},  # type: ignore[arg-type]
    )


async def functions_keep_their_types() -> None:
    async def work(number: int, *, name: str = "") -> str:
        return name * number

    assert_type(await run_in_new_ctx(work, 1, name="a"), str)
    assert_type(await retry_on_transient_error(attempts=2)(work)(1, name="a"), str)
    await run_in_new_ctx(work, "1")  # type: ignore[arg-type]
    await retry_on_transient_error()(work)("1")  # type: ignore[arg-type]
    assert_type(is_transient_error(Exception()), bool)


def the_middleware_takes_its_options(app: Any) -> None:
    ASGIHTTPDBSessionMiddleware(app, attempts=3, commit_on=lambda status: status < 300)
    ASGIHTTPDBSessionMiddleware(app, attempts="3")  # type: ignore[arg-type]
    ASGIHTTPDBSessionMiddleware(app, read_only_methods={"GET", "HEAD"})
    add_fastapi_http_db_session_middleware(app, read_only_methods=["GET"])
    add_fastapi_http_db_session_middleware(app, read_only_methods=1)  # type: ignore[arg-type]
    DBConnect.from_url("sqlite://", pool_sise=3)  # type: ignore[call-arg]
    DBConnect.from_url("sqlite://", session_options={"autoflash": 3})  # type: ignore[arg-type]
