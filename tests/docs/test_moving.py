"""The library of `docs/moving`, before, while and after it moves; and what differs afterwards."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

import httpx
import pytest
import pytest_asyncio
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from examples.moving.models import Base, Entry, Loan
from tests.helpers.programs import Outside, is_all_closed, load_program, until
from tests.helpers.serving import http_client

OTHER = "fastapi-async-sqlalchemy"
needs_08 = pytest.mark.skipif(
    version(OTHER).startswith("0.7"), reason="0.8, of which the page tells, needs Python 3.12"
)
PROGRAMS = ["moving.depends_before", "moving.depends_between", "moving.depends_after"]
DIARY = "SELECT text FROM diary_entry ORDER BY id"


@pytest.fixture(params=[*PROGRAMS, pytest.param("moving.db_before", marks=needs_08)])
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest_asyncio.fixture
async def outside(url: str) -> AsyncGenerator[Outside]:
    outside = Outside(url)
    async with outside.connection() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield outside
    async with outside.connection() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture
def load_library(
    url: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    return lambda name: load_program(monkeypatch, name, DATABASE_URL=url)


only_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


async def test_the_library_answers_the_same_before_while_and_after_it_moves(
    name: str, load_library: Callable[[str], Any], outside: Outside
) -> None:
    library = load_library(name)
    async with http_client(library.app) as client:
        assert (await client.post("/loans/Emma/ann")).status_code == 201
        assert await outside.rows(DIARY) == ["ann takes Emma"]
        assert (await client.post("/loans/Emma/bob")).status_code == 409
        assert await outside.rows("SELECT reader FROM loan") == ["ann"]
        assert await outside.rows(DIARY) == ["ann takes Emma"]
        assert (await client.delete("/loans/Emma")).status_code == 204
        thanked = ["ann takes Emma", "thank you, ann"]

        async def is_thanked() -> bool:
            return await outside.rows(DIARY) == thanked

        await until(is_thanked)
        assert (await client.delete("/loans/Emma")).status_code == 404
        assert await outside.rows(DIARY) == [*thanked, "nobody had Emma"]
    assert is_all_closed(library)


# From Depends


@asynccontextmanager
async def served_with_middleware(
    connect: DBConnect, app: FastAPI
) -> AsyncGenerator[httpx.AsyncClient]:
    add_fastapi_http_db_session_middleware(app)
    async with connect, http_client(app, log_level="critical") as client:
        yield client


@only_postgresql
async def test_the_parameter_is_the_session_of_the_context_and_that_of_get_session_is_not(
    url: str, outside: Outside
) -> None:
    connect, app, engine = DBConnect.from_url(url), FastAPI(), create_async_engine(url)

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    New = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]  # noqa: N806
    Old = Annotated[AsyncSession, Depends(get_session)]  # noqa: N806

    @app.post("/")
    async def compare(new: New, old: Old) -> list[bool]:
        session = await db_session(connect)
        new.add(Entry(text="by the new one"))
        await new.flush()
        return [new is session, old is session, await old.get(Entry, 1) is None]

    async with served_with_middleware(connect, app) as client:
        assert (await client.post("/")).json() == [True, False, True]
    await engine.dispose()
    assert await outside.rows(DIARY) == ["by the new one"]


async def test_a_commit_that_stays_makes_what_follows_a_transaction_of_its_own(
    url: str, outside: Outside
) -> None:
    connect, app = DBConnect.from_url(url), FastAPI()

    @app.post("/")
    async def commit_in_the_middle() -> None:
        session = await db_session(connect)
        session.add(Entry(text="before the commit"))
        await session.commit()
        session.add(Entry(text="after the commit"))
        raise HTTPException(409)

    async with served_with_middleware(connect, app) as client:
        assert (await client.post("/")).status_code == 409
    assert await outside.rows(DIARY) == ["before the commit"]


async def test_a_4xx_that_is_returned_was_committed_by_a_dependency_that_commits(
    url: str, outside: Outside
) -> None:
    connect, app, engine = DBConnect.from_url(url), FastAPI(), create_async_engine(url)

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with AsyncSession(engine) as session, session.begin():
            yield session

    @app.post("/before")
    async def before(session: Annotated[AsyncSession, Depends(get_session)]) -> JSONResponse:
        session.add(Entry(text="before"))
        return JSONResponse({}, 404)

    @app.post("/raised")
    async def raised(session: Annotated[AsyncSession, Depends(get_session)]) -> None:
        session.add(Entry(text="raised"))
        raise HTTPException(404)

    @app.post("/after")
    async def after() -> JSONResponse:
        (await db_session(connect)).add(Entry(text="after"))
        return JSONResponse({}, 404)

    async with served_with_middleware(connect, app) as client:
        for path in "/before", "/raised", "/after":
            assert (await client.post(path)).status_code == 404

    await engine.dispose()
    assert await outside.rows(DIARY) == ["before"]


async def test_an_error_of_the_commit_is_not_seen_by_the_endpoint_unless_it_flushes(
    url: str, outside: Outside
) -> None:
    connect, app = DBConnect.from_url(url), FastAPI()

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    @app.post("/{flushes}", status_code=201)
    async def add_twice(flushes: bool) -> None:
        session = await db_session(connect)
        session.add_all([Loan(book="Emma", reader=reader) for reader in ("ann", "bob")])
        try:
            if flushes:
                await session.flush()
        except IntegrityError:
            raise HTTPException(410) from None

    async with served_with_middleware(connect, app) as client:
        assert (await client.post("/true")).status_code == 410
        assert (await client.post("/false")).status_code == 409
    assert await outside.rows("SELECT reader FROM loan") == []


async def test_what_the_database_generates_is_there_after_a_flush(
    url: str, outside: Outside
) -> None:
    connect, app = DBConnect.from_url(url), FastAPI()

    @app.post("/{flushes}")
    async def add_entry(flushes: bool) -> int | None:
        session = await db_session(connect)
        entry = Entry(text="an entry")
        session.add(entry)
        if flushes:
            await session.flush()
        return entry.id

    async with served_with_middleware(connect, app) as client:
        assert (await client.post("/false")).json() is None
        assert (await client.post("/true")).json() == 2


async def test_an_override_is_not_seen_by_db_session(url: str, outside: Outside) -> None:
    connect, app = DBConnect.from_url(url), FastAPI()
    get_session = DBSessionDependency(connect)
    other = AsyncSession()
    app.dependency_overrides[get_session] = lambda: other

    @app.get("/")
    async def compare(session: Annotated[AsyncSession, Depends(get_session)]) -> list[bool]:
        return [session is other, await db_session(connect) is other]

    async with served_with_middleware(connect, app) as client:
        assert (await client.get("/")).json() == [True, False]


# From other libraries


async def test_a_4xx_is_committed_if_commit_on_says_so(url: str, outside: Outside) -> None:
    connect, app = DBConnect.from_url(url), FastAPI()

    @app.post("/{status}")
    async def fail(status: int) -> None:
        (await db_session(connect)).add(Entry(text=str(status)))
        raise HTTPException(status)

    middleware = ASGIHTTPDBSessionMiddleware(app, commit_on=lambda status: status < 500)
    async with connect, http_client(middleware, log_level="critical") as client:
        for status in 404, 503:
            assert (await client.post(f"/{status}")).status_code == status
    assert await outside.rows(DIARY) == ["404"]


@needs_08
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_what_the_page_says_of_fastapi_async_sqlalchemy(
    url: str, outside: Outside, load_library: Callable[[str], Any]
) -> None:
    library = load_library("moving.db_before")
    app: FastAPI = library.app
    db = library.db
    errors: list[str] = []

    def try_session() -> None:
        try:
            _ = db.session
        except RuntimeError as error:
            errors.append(str(error))

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    @app.post("/twice")
    async def twice() -> None:
        db.session.add_all([Loan(book="Emma", reader=reader) for reader in ("ann", "bob")])

    @app.post("/refused")
    async def refuse() -> None:
        db.session.add(Entry(text="refused"))
        raise HTTPException(404)

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncGenerator[bytes]:
            yield b"one"
            try_session()
            yield b"two"

        return StreamingResponse(body())

    @app.post("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(try_session)

    async with http_client(app, log_level="critical") as client:
        assert (await client.post("/twice")).status_code == 500
        assert (await client.post("/refused")).status_code == 404
        assert (await client.post("/stream")).status_code == 200
        assert (await client.post("/background")).status_code == 200
        await until(lambda: len(errors) == 2)
    assert await outside.rows(DIARY) == ["refused"]
    assert "closed for streaming" in errors[0]
    assert "closed after response finalization" in errors[1]


async def test_a_scoped_session_is_that_of_its_task_and_a_context_is_that_of_its_children(
    connect: DBConnect,
) -> None:
    scoped = async_scoped_session(async_sessionmaker(), scopefunc=asyncio.current_task)

    async def of_task() -> AsyncSession:
        return scoped()

    child = await asyncio.create_task(of_task())
    assert child is not scoped()
    await scoped.remove()
    async with new_db_session_ctx():
        session = await db_session(connect)
        assert await asyncio.create_task(db_session(connect)) is session
