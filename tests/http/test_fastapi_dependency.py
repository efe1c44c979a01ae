"""The session as a dependency of a FastAPI application, served over HTTP."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
from collections.abc import AsyncIterable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    ContextClosedError,
    DBConnect,
    db_session,
    on_commit,
    pop_db_session_from_context,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.test_utils import rollback_session, set_test_context
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.dependency import (
    SOURCE,
    WAYS,
    Adder,
    add_nothing,
    every_way,
    insert_item,
    served,
)
from tests.helpers.serving import http_client


@every_way
@pytest.mark.parametrize("path", ["/shared", "/included/shared"])
async def test_a_chain_of_dependencies_shares_a_transaction_that_is_durable_before_the_response(
    connect: DBConnect, database: Database, add_middleware: Adder, path: str
) -> None:
    seen: list[list[str]] = []
    dependency = DBSessionDependency(connect)
    async with served(dependency, database, add_middleware, seen.append) as client:
        assert (await client.post(path, params={"user": "ann"})).status_code == 200
    assert seen == [["ann", "service", "endpoint"]]
    assert await database.names() == seen[0]


@every_way
async def test_a_sync_endpoint_is_committed_before_the_response(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    seen: list[list[str]] = []
    dependency = DBSessionDependency(connect)
    async with served(dependency, database, add_middleware, seen.append) as client:
        assert (await client.post("/sync?user=ann")).status_code == 200
    assert seen == [["ann"]]


@every_way
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/shared?user=nobody", 401),
        ("/exception?user=ann", 500),
        ("/http-exception?user=ann", 404),
        ("/returned?user=ann", 404),
        ("/returned-sync?user=ann", 404),
        ("/of-route?user=ann", 404),
        ("/included/of-route?user=ann", 404),
        ("/of-response?user=ann", 404),
        ("/invalid?user=ann&number=x", 422),
        ("/commit-fails", 409),
    ],
)
async def test_a_failure_is_rolled_back(
    connect: DBConnect, database: Database, add_middleware: Adder, path: str, status: int
) -> None:
    async with served(DBSessionDependency(connect), database, add_middleware) as client:
        assert (await client.post(path)).status_code == status
        assert (await database.names(), await database.seats()) == ([], [])
        assert connections_out(connect) == 0


# The dispatch function refuses it: its context ends with the body.
@pytest.mark.parametrize("add_middleware", WAYS[:3])
async def test_what_a_dependency_writes_when_it_ends_is_committed(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    async with served(DBSessionDependency(connect), database, add_middleware) as client:
        assert (await client.post("/teardown")).status_code == 200
    assert await database.names() == ["endpoint", "torn down"]


@pytest.mark.parametrize("add_middleware", [add_nothing, add_fastapi_http_db_session_middleware])
async def test_a_request_may_be_committed_late(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    seen: list[list[str]] = []
    dependency = DBSessionDependency(connect)
    async with served(dependency, database, add_middleware, seen.append) as client:
        assert (await client.post("/late")).status_code == 200
    assert seen == [[]]
    assert await database.names() == ["late"]


@every_way
async def test_what_a_body_writes_is_committed(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    async with served(DBSessionDependency(connect), database, add_middleware) as client:
        assert (await client.post("/body")).text == "x"
        assert await database.names() == ["body"]


@pytest.mark.skipif(
    "application/jsonl" not in SOURCE,
    reason="this FastAPI streams no generator that is an endpoint",
)
@pytest.mark.parametrize("add_middleware", [add_nothing, add_fastapi_http_db_session_middleware])
async def test_what_an_endpoint_writes_that_is_a_generator_is_committed_if_it_ends_well(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = FastAPI()
    add_middleware(app)

    @app.post("/{name}")
    async def endpoint(
        name: str, session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))]
    ) -> AsyncIterable[str]:
        await insert_item(session, name)
        yield name
        if name == "bad":
            raise ValueError

    async with http_client(app) as client:
        assert (await client.post("/good")).json() == "good"
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/bad")
    assert await database.names() == ["good"]


@every_way
@pytest.mark.parametrize("manages", [True, False])
async def test_two_dependencies_on_one_database_see_one_session(
    connect: DBConnect, database: Database, add_middleware: Adder, manages: bool
) -> None:
    app = FastAPI()
    add_middleware(app)
    first, second = (DBSessionDependency(connect, manage_transactions=manages) for _ in range(2))

    @app.post("/")
    async def endpoint(
        one: Annotated[AsyncSession, Depends(first)],
        other: Annotated[AsyncSession, Depends(second, use_cache=False)],
        again: Annotated[AsyncSession, Depends(first, use_cache=False)],
        name: str,
    ) -> dict[str, str]:
        assert one is other
        assert one is again
        await insert_item(one, name)
        return {}

    async with http_client(app) as client:
        for name in ("a", "b"):  # the second finds the engine open
            assert (await client.post(f"/?name={name}")).status_code == 200
    assert await database.names() == (["a", "b"] if manages else [])


@every_way
async def test_two_databases_are_settled_together(
    connect: DBConnect, second_connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = FastAPI()
    add_middleware(app)

    @app.post("/{status}")
    async def endpoint(
        status: int,
        one: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
        other: Annotated[AsyncSession, Depends(DBSessionDependency(second_connect))],
    ) -> Response:
        await insert_item(one, f"{status} 1")
        await insert_item(other, f"{status} 2")
        return Response(status_code=status)

    async with http_client(app) as client:
        assert (await client.post("/404")).status_code == 404
        assert (await client.post("/201")).status_code == 201
    assert await database.names() == ["201 1", "201 2"]


@every_way
async def test_requests_at_the_same_time_have_a_session_each(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:

    app = FastAPI()
    add_middleware(app)
    sessions: list[AsyncSession] = []
    both = asyncio.Event()

    @app.post("/{status}")
    async def endpoint(
        status: int, session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))]
    ) -> Response:
        await insert_item(session, str(status))
        sessions.append(session)
        if len(sessions) == 2:
            both.set()
        await both.wait()
        return Response(status_code=status)

    async with http_client(app) as client:
        await asyncio.gather(client.post("/201"), client.post("/404"))
    assert sessions[0] is not sessions[1]
    assert await database.names() == ["201"]


async def test_an_endpoint_that_calls_another_application_is_not_settled_by_it(
    connect: DBConnect, database: Database
) -> None:
    inner, app = FastAPI(), FastAPI()

    @inner.get("/")
    async def answer() -> dict[str, str]:
        return {}

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
    ) -> Response:
        await insert_item(session, "a")
        transport = httpx.ASGITransport(inner)
        async with httpx.AsyncClient(transport=transport, base_url="http://inner") as client:
            assert (await client.get("/")).status_code == 200
        assert await database.names() == []
        return Response(status_code=404)

    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 404
    assert await database.names() == []


async def test_a_task_that_calls_the_endpoint_by_another_route_does_not_settle_the_request(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    async def endpoint(request: Request) -> Response:
        if request.method == "GET":
            return Response()
        await add(connect, "a")
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            await asyncio.create_task(client.get("/"))
        assert await database.names() == []
        return Response(status_code=404)

    dependencies = [Depends(DBSessionDependency(connect))]
    app.add_api_route("/", endpoint, methods=["POST"], dependencies=dependencies)
    app.add_api_route("/", endpoint, methods=["GET"])
    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 404
    assert await database.names() == []


@every_way
@pytest.mark.parametrize("manages", [True, False])
async def test_a_session_is_refused_after_its_request(
    connect: DBConnect, database: Database, add_middleware: Adder, manages: bool
) -> None:
    app = FastAPI()
    add_middleware(app)
    dependency = DBSessionDependency(connect, manage_transactions=manages)
    kept: list[AsyncSession] = []

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(dependency)]) -> None:
        await insert_item(session, "a")
        kept.append(session)

    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 200
    with pytest.raises(ContextClosedError):
        await insert_item(kept[0], "b")
    assert await database.names() == (["a"] if manages else [])


@pytest.mark.parametrize("add_middleware", WAYS[:3])
@pytest.mark.parametrize("manages", [True, False])
async def test_a_scope_that_somebody_sends_again_is_another_request(
    connect: DBConnect, database: Database, add_middleware: Adder, manages: bool
) -> None:
    app = FastAPI()
    add_middleware(app)
    dependency = DBSessionDependency(connect, manage_transactions=manages)
    sessions: list[AsyncSession] = []

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(dependency)]) -> None:
        sessions.append(session)
        await insert_item(session, str(len(sessions)))
        await session.commit()

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        async def ignore(_: Any) -> None: ...

        if scope["type"] == "http":
            await app(scope, receive, ignore)
        await app(scope, receive, send)

    async with http_client(twice) as client:
        assert (await client.post("/")).status_code == 200
    assert sessions[0] is not sessions[1]
    assert await database.names() == ["1", "2"]


@every_way
async def test_without_managed_transactions_nothing_is_committed_for_the_application(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    dependency = DBSessionDependency(connect, manage_transactions=False)
    async with served(dependency, database, add_middleware) as client:
        assert (await client.post("/own")).status_code == 200
        assert (await client.post("/shared?user=ann")).status_code == 200
    assert await database.names() == ["committed"]


async def test_a_request_of_which_the_application_has_committed_a_part_is_not_repeated(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app, attempts=3)
    dependency = DBSessionDependency(connect, manage_transactions=False)
    calls: list[str] = []

    @app.post("/{part}")
    async def endpoint(part: str, session: Annotated[AsyncSession, Depends(dependency)]) -> None:
        calls.append(part)
        if part == "committed":
            await insert_item(session, "a")
            await session.commit()
        await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    async with http_client(app) as client:
        assert (await client.post("/committed")).status_code == 500
        assert (await client.post("/nothing")).status_code == 500
    assert calls == ["committed", "nothing", "nothing", "nothing"]
    assert await database.names() == ["a"]


@pytest.mark.parametrize("manages", [True, False])
async def test_a_test_that_has_a_context_settles_itself(
    connect: DBConnect, database: Database, manages: bool
) -> None:
    app = FastAPI()
    dependency = DBSessionDependency(connect, manage_transactions=manages)

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(dependency)]) -> dict[str, str]:
        await insert_item(session, "a")
        return {}

    transport = httpx.ASGITransport(app)
    async with (
        rollback_session(connect),
        set_test_context(),
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        assert (await client.post("/")).status_code == 200
        session = await db_session(connect)
        assert (await session.execute(text("SELECT name FROM item"))).scalars().all() == ["a"]
    assert await database.names() == []


async def test_a_callback_waits_for_the_commit(connect: DBConnect, database: Database) -> None:
    app = FastAPI()
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append(await database.names())

    @app.post("/{status}")
    async def endpoint(
        status: int, session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))]
    ) -> Response:
        await insert_item(session, str(status))
        on_commit(connect, look)
        return Response(status_code=status)

    async with http_client(app) as client:
        await client.post("/404")
        await client.post("/201")
    assert seen == [["201"]]


async def test_a_session_that_the_application_settles_can_be_popped(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    dependency = DBSessionDependency(connect, manage_transactions=False)

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(dependency)]) -> bool:
        return pop_db_session_from_context(connect) is session

    async with http_client(app) as client:
        assert (await client.post("/")).json() is True
