"""Endpoints that are plain functions, which run in threads, over real HTTP."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from anyio import from_thread, to_thread
from fastapi import Depends, FastAPI
from sqlalchemy import URL, insert
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from context_async_sqlalchemy import (
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    is_context_initiated,
)
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.database import Database, checked_connect
from tests.helpers.models import Item, Seat
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client

Add = Callable[..., None]


@pytest.fixture
def add(connect: DBConnect) -> Add:
    """Return a plain function that adds items from a thread."""

    async def insert_items(*names: str) -> None:
        session = await db_session(connect)
        await session.execute(insert(Item), [{"name": name} for name in names])

    def add(*names: str) -> None:
        from_thread.run(insert_items, *names)

    return add


@pytest.fixture(params=[Starlette, FastAPI])
def app(request: pytest.FixtureRequest) -> Starlette:
    app: Starlette = request.param()
    add_starlette_http_db_session_middleware(app)
    return app


@asynccontextmanager
async def served(
    app: Starlette, endpoint: Callable[[Request], Response]
) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an endpoint at "/"."""
    if isinstance(app, FastAPI):
        app.add_api_route("/", endpoint, methods=["POST"], response_model=None)
    else:
        app.add_route("/", endpoint, methods=["POST"])
    async with http_client(app) as client:
        yield client


async def test_a_success_is_committed_when_the_client_has_the_answer(
    app: Starlette, connect: DBConnect, add: Add, database: Database, postgresql: str
) -> None:
    async def book() -> None:
        session = await db_session(connect)
        await session.execute(insert(Seat).values(number=1))

    def endpoint(_: Request) -> Response:
        assert threading.current_thread() is not threading.main_thread()
        assert is_context_initiated()
        add("milk")
        from_thread.run(book)
        return Response(status_code=201)

    async def post() -> list[str]:
        async with client.stream("POST", "/") as response:
            assert response.status_code == 201
            return await database.names()

    async with served(app, endpoint) as client, Outside(postgresql).connection() as other:
        # The COMMIT that checks the number of the seat waits for whoever may have it.
        await other.execute(insert(Seat).values(number=1))
        posting = asyncio.create_task(post())
        await until(lambda: database.pid_of("COMMIT%"))
        done, _ = await asyncio.wait([posting], timeout=0.1)
        assert not done, "there is an answer before the commit"
        await other.rollback()
        assert await posting == ["milk"]


async def test_a_4xx_and_an_exception_are_rolled_back(
    app: Starlette, add: Add, database: Database
) -> None:
    def endpoint(request: Request) -> Response:
        how = request.url.query
        add(how)
        if how == "refused":
            raise HTTPException(403)
        if how == "raised":
            raise RuntimeError("stumbled")
        return Response(status_code=404)

    async with served(app, endpoint) as client:
        answers = [await client.post(f"/?{how}") for how in ("returned", "refused", "raised")]
    assert [answer.status_code for answer in answers] == [404, 403, 500]
    assert await database.names() == []


async def test_a_commit_that_fails_is_a_500(
    app: Starlette, connect: DBConnect, add: Add, database: Database
) -> None:
    async def book_twice() -> None:
        session = await db_session(connect)
        await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])

    def endpoint(_: Request) -> Response:
        add("milk")
        from_thread.run(book_twice)
        return Response()

    async with served(app, endpoint) as client:
        assert (await client.post("/")).status_code == 500
    assert (await database.names(), await database.seats()) == ([], [])


async def test_a_background_task_that_is_a_function_is_committed_or_rolled_back(
    app: Starlette, add: Add, database: Database
) -> None:
    def later(how: str) -> None:
        add(f"{how}, later")
        if how == "bad":
            raise RuntimeError("stumbled")

    def endpoint(request: Request) -> Response:
        how = request.url.query
        add(how)
        return Response(background=BackgroundTask(later, how))

    async with served(app, endpoint) as client:
        assert (await client.post("/?good")).status_code == 200
        assert (await client.post("/?bad")).status_code == 200
    # The server has waited for both tasks, but not for one before the next request.
    assert sorted(await database.names()) == ["bad", "good", "good, later"]


async def test_what_a_generator_writes_is_committed_when_the_body_is_complete(
    app: Starlette, add: Add, database: Database
) -> None:
    def body(parts: str) -> Generator[str]:
        for part in parts:
            if part == "x":
                raise RuntimeError("stumbled")
            add(f"part {part}")
            yield part

    def endpoint(request: Request) -> Response:
        return StreamingResponse(body(request.url.query))

    async with served(app, endpoint) as client:
        async with client.stream("POST", "/?123") as response:
            assert "".join([part async for part in response.aiter_text()]) == "123"
            assert await database.names() == ["part 1", "part 2", "part 3"]
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/?45x")
    assert await database.names() == ["part 1", "part 2", "part 3"]


async def test_a_dependency_with_yield_that_is_a_function_is_part_of_the_request(
    add: Add, database: Database
) -> None:
    app = FastAPI()
    add_starlette_http_db_session_middleware(app)

    def dependency(how: str) -> Generator[None]:
        add(f"{how} before")
        yield
        add(f"{how} after")

    @app.post("/", dependencies=[Depends(dependency)])
    def endpoint(how: str) -> None:
        add(how)
        if how == "bad":
            raise RuntimeError("stumbled")

    async with http_client(app) as client:
        assert (await client.post("/?how=bad")).status_code == 500
        assert (await client.post("/?how=good")).status_code == 200
    assert await database.names() == ["good before", "good", "good after"]


async def test_what_a_thread_adds_without_a_statement_is_committed(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_starlette_http_db_session_middleware(app)
    dependency = DBSessionDependency(connect)

    @app.post("/")
    def endpoint(
        session: Annotated[AsyncSession, Depends(dependency)], status: int, response: Response
    ) -> None:
        session.add(Item(name=f"of {status}"))
        response.status_code = status

    async with http_client(app) as client:
        assert (await client.post("/?status=404")).status_code == 404
        assert (await client.post("/?status=200")).status_code == 200
    assert await database.names() == ["of 200"]


# Mistakes


def in_another_thread(function: Callable[[], object]) -> None:
    """Raise what a function raises in a thread that is not anyio's."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise errors[0]


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("statement", MissingGreenlet),
        ("lazy loading", MissingGreenlet),
        ("coroutine", TypeError),
        ("another thread", RuntimeError),
        ("another thread with a loop", ContextNotInitiatedError),
    ],
)
async def test_a_mistake_is_refused(
    mistake: str, error: type[Exception], connect: DBConnect, add: Add, database: Database
) -> None:
    app = Starlette()
    add_starlette_http_db_session_middleware(app)

    async def expired_item() -> Item:
        session = await db_session(connect)
        item = Item(name="milk")
        session.add(item)
        await session.flush()
        session.expire(item)
        return item

    async def get_session() -> AsyncSession:
        return await db_session(connect)

    def make(mistake: str) -> None:
        item = from_thread.run(expired_item)
        session = from_thread.run(get_session)
        if mistake == "statement":
            session.sync_session.execute(insert(Item).values(name="tea"))
        elif mistake == "lazy loading":
            _ = item.name
        elif mistake == "coroutine":
            coroutine: Any = get_session()
            try:
                from_thread.run(coroutine)
            finally:
                coroutine.close()
        elif mistake == "another thread":
            in_another_thread(lambda: from_thread.run(get_session))
        else:
            in_another_thread(lambda: asyncio.run(get_session()))

    errors: list[Exception] = []

    def endpoint(_: Request) -> Response:
        try:
            make(mistake)
        except Exception as caught:
            errors.append(caught)
            raise
        return Response()

    async with served(app, endpoint) as client:
        assert (await client.post("/")).status_code == 500
    assert isinstance(errors[0], error)
    assert await database.names() == []


async def test_the_context_of_a_request_is_refused_on_another_loop(
    app: Starlette, connect: DBConnect, database: Database
) -> None:
    errors: list[Exception] = []

    async def add() -> None:
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="milk"))

    def endpoint(_: Request) -> Response:
        try:
            asyncio.run(add())
        except RuntimeError as error:
            errors.append(error)
            raise
        return Response()

    async with served(app, endpoint) as client:
        assert (await client.post("/")).status_code == 500
    assert "anyio.from_thread.run" in str(errors[0])
    assert await database.names() == []


@pytest.mark.parametrize(("response_model", "pool_timeout"), [(int, 0.5), (None, 30)])
async def test_a_return_value_that_is_validated_in_a_thread_holds_the_connection_until_then(
    response_model: Any, pool_timeout: float, database_url: URL, database: Database
) -> None:
    app = FastAPI()
    add_starlette_http_db_session_middleware(app)
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": pool_timeout}
    async with checked_connect(database_url, database, **options) as connect:

        async def add(number: int) -> None:
            session = await db_session(connect)
            await session.execute(insert(Item).values(name=str(number)))
            # The first, which has the only connection, goes on when all the others have come.
            await until(lambda: threads.statistics().tasks_waiting == 6 or len(done) > 0)

        @app.post("/{number}", response_model=response_model)
        def endpoint(number: int) -> int:
            from_thread.run(add, number)
            done.append(number)
            return number

        threads = to_thread.current_default_thread_limiter()
        threads.total_tokens = 2
        done: list[int] = []
        async with http_client(app) as client:
            answers = await asyncio.gather(*(client.post(f"/{n}") for n in range(8)))
        statuses = {answer.status_code for answer in answers}
        assert (500 in statuses) is (response_model is int)
