"""The library of `docs/moving`, before, while and after it moves; and what differs afterwards."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Annotated, Any

import httpx
import pytest
import pytest_asyncio
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import event, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from examples.moving.models import Base, Entry, Loan
from tests.helpers.database import Database
from tests.helpers.programs import Outside, connects_of, is_all_closed, load_program, until
from tests.helpers.serving import http_client

OTHER = "fastapi-async-sqlalchemy"
needs_08 = pytest.mark.skipif(
    version(OTHER).startswith("0.7"), reason="0.8, of which the page tells, needs Python 3.12"
)
# What the client is told if the COMMIT fails; and what is stored, without a commit by hand, of a
# success ("kept") and of a 404 ("refused").
PROGRAMS: dict[str, tuple[int, list[str]]] = {
    "moving.depends_before": (200, []),
    "moving.depends_between": (409, ["kept"]),
    "moving.depends_after": (409, ["kept"]),
    "moving.scoped_before": (200, []),
    "moving.scoped_between": (409, ["kept"]),
    "moving.scoped_after": (409, ["kept"]),
    "moving.db_before": (500, ["kept", "refused"]),
    "moving.db_after": (409, ["kept"]),
    "moving.alchemy_before": (200, ["kept"]),
    "moving.alchemy_after": (409, ["kept"]),
    "moving.v2_before": (409, ["kept"]),  # on this version; on 2.1.9, 500
    "moving.v2_after": (409, ["kept"]),
}
DIARY = "SELECT text FROM diary_entry ORDER BY id"


each_program = pytest.mark.parametrize(
    ("name", "url"),
    [
        pytest.param(name, url, marks=needs_08 if name == "moving.db_before" else ())
        for name in PROGRAMS
        for url in ("sqlite", "postgresql")
        if url == "postgresql" or name != "moving.v2_before"  # whose engine has a host
    ],
    indirect=["url"],
)


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
    def load(name: str) -> Any:
        if name.startswith("moving.alchemy"):
            pytest.importorskip("advanced_alchemy.extensions.fastapi", reason="is in group newest")
        return load_program(monkeypatch, name, DATABASE_URL=url)

    return load


only_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


@each_program
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


@each_program
async def test_what_differs_is_what_a_client_is_told_and_what_is_stored_without_a_commit_by_hand(
    name: str, load_library: Callable[[str], Any], outside: Outside
) -> None:
    library = load_library(name)
    app: FastAPI = library.app
    Session = Annotated[AsyncSession, Depends(dependency_of(library))]  # noqa: N806

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    @app.post("/twice")
    async def twice(session: Session) -> None:
        session.add_all([Loan(book="Emma", reader=reader) for reader in ("ann", "bob")])

    @app.post("/kept")
    async def keep(session: Session) -> None:
        session.add(Entry(text="kept"))

    @app.post("/refused")
    async def refuse(session: Session) -> None:
        session.add(Entry(text="refused"))
        raise HTTPException(404)

    told, stored = PROGRAMS[name]
    async with http_client(app, log_level="critical") as client:
        assert (await client.post("/twice")).status_code == told
        assert (await client.post("/kept")).status_code == 200
        assert (await client.post("/refused")).status_code == 404
    assert await outside.rows(DIARY) == stored
    assert await outside.rows("SELECT book FROM loan") == []


def dependency_of(library: Any) -> Callable[..., Any]:
    """Return what gives an endpoint the session of its request."""

    async def session() -> Any:
        match library.__name__.removeprefix("examples.moving."):
            case "db_before":
                return library.db.session
            case "scoped_before":
                return library.session()
        return await db_session(writer_of(library))

    if hasattr(library, "alchemy"):
        provide: Callable[..., Any] = library.alchemy.provide_session()
        return provide
    return getattr(library, "get_session", session)


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


@only_postgresql
@pytest.mark.parametrize(
    ("name", "seen"), [("moving.alchemy_before", []), ("moving.alchemy_after", ["a loan"])]
)
async def test_a_background_task_sees_what_its_request_has_written_if_that_is_committed_by_then(
    name: str, seen: list[str], load_library: Callable[[str], Any], outside: Outside
) -> None:
    library, rows = load_library(name), []
    app: FastAPI = library.app
    Session = Annotated[AsyncSession, Depends(dependency_of(library))]  # noqa: N806

    async def look() -> None:
        rows.append(await outside.rows(DIARY))

    @app.post("/")
    async def write(session: Session, tasks: BackgroundTasks) -> None:
        session.add(Entry(text="a loan"))
        await session.flush()
        tasks.add_task(look)

    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 200
        await until(lambda: rows)
    assert rows == [seen]
    assert await outside.rows(DIARY) == ["a loan"]


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


# From a scoped session


@only_postgresql
async def test_a_function_that_another_one_calls_is_committed_with_it_and_was_committed_alone(
    load_library: Callable[[str], Any], outside: Outside
) -> None:
    for name, stored in (
        ("moving.scoped_before", ["before"]),
        ("moving.scoped_after", []),
        ("moving.scoped_between", []),
    ):
        library = load_library(name)

        @library.transactional  # type: ignore[untyped-decorator]
        async def fail(library: Any = library) -> None:
            await library.note("before")
            raise ZeroDivisionError

        if name == "moving.scoped_before":
            library.session_id.set("that of a job")
        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await outside.rows(DIARY) == stored
        await close_library(library)
        async with outside.connection() as connection:
            await connection.execute(text("DELETE FROM diary_entry"))


@only_postgresql
@pytest.mark.parametrize("name", ["moving.scoped_between", "moving.scoped_after"])
async def test_functions_that_run_at_the_same_time_are_apart(
    load_library: Callable[[str], Any], outside: Outside, name: str
) -> None:
    library = load_library(name)
    all_have_written = asyncio.Barrier(4)

    @library.transactional  # type: ignore[untyped-decorator]
    async def write(number: int) -> None:
        await library.lend(f"book {number}", "ann")
        await (await db_session(writer_of(library))).flush()
        async with asyncio.timeout(10):
            await all_have_written.wait()
        if number % 2:
            raise ZeroDivisionError

    outcomes = await asyncio.gather(*(write(n) for n in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), ZeroDivisionError] * 2
    stored = await outside.rows("SELECT book FROM loan ORDER BY book")
    assert stored == ["book 0", "book 2"]
    await close_library(library)


@only_postgresql
@pytest.mark.parametrize("name", ["moving.scoped_between", "moving.scoped_after"])
async def test_what_a_function_has_written_stays_if_its_caller_goes_on_unless_it_is_in_a_savepoint(
    load_library: Callable[[str], Any], outside: Outside, name: str
) -> None:
    library = load_library(name)

    @library.transactional  # type: ignore[untyped-decorator]
    async def write_and_fail(text: str) -> None:
        await library.note(text)
        raise ZeroDivisionError

    @library.transactional  # type: ignore[untyped-decorator]
    async def go_on() -> None:
        with suppress(ZeroDivisionError):
            await write_and_fail("stays")
        with suppress(ZeroDivisionError):
            async with atomic_db_session(writer_of(library), "savepoint"):
                await write_and_fail("is undone")
        await library.note("after it")

    expected = ["stays", "after it"]
    await go_on()
    assert await outside.rows(DIARY) == expected
    library.app.post("/")(go_on)
    async with http_client(library.app) as client:
        assert (await client.post("/")).status_code == 200
    assert await outside.rows(DIARY) == expected * 2


@only_postgresql
async def test_the_old_decorator_undid_what_the_caller_had_written_and_stored_what_came_after(
    load_library: Callable[[str], Any], outside: Outside
) -> None:
    library = load_library("moving.scoped_before")

    @library.transactional  # type: ignore[untyped-decorator]
    async def fail() -> None:
        raise ZeroDivisionError

    @library.transactional  # type: ignore[untyped-decorator]
    async def go_on() -> None:
        library.session.add(Entry(text="before it"))
        with suppress(ZeroDivisionError):
            await fail()
        library.session.add(Entry(text="after it"))

    library.session_id.set("that of a job")
    await go_on()
    assert await outside.rows(DIARY) == ["after it"]
    await close_library(library)


@only_postgresql
@pytest.mark.parametrize("name", ["moving.scoped_between", "moving.scoped_after"])
async def test_a_statement_that_has_failed_lets_nobody_go_on(
    load_library: Callable[[str], Any], outside: Outside, name: str
) -> None:
    library = load_library(name)

    @library.transactional  # type: ignore[untyped-decorator]
    async def lend_twice() -> None:
        await library.lend("Emma", "ann")
        with suppress(IntegrityError):
            await library.lend("Emma", "bob")
            await (await db_session(writer_of(library))).flush()

    with pytest.raises((PendingRollbackError, IntegrityError)):
        await lend_twice()
    library.app.post("/")(lend_twice)
    async with http_client(library.app, log_level="critical") as client:
        assert (await client.post("/")).status_code in (409, 500)
    assert await outside.rows(DIARY) == []


@only_postgresql
async def test_a_function_in_a_task_that_outlives_its_context_is_a_unit_of_its_own(
    load_library: Callable[[str], Any], outside: Outside
) -> None:
    library, has_ended = load_library("moving.scoped_after"), asyncio.Event()

    async def note_later() -> None:
        await has_ended.wait()
        await library.note("later")

    async with new_db_session_ctx():
        task = asyncio.create_task(note_later())
    has_ended.set()
    await task
    assert await outside.rows(DIARY) == ["later"]
    await close_library(library)


@only_postgresql
async def test_each_engine_of_a_session_that_routes_has_its_connections_home(
    load_library: Callable[[str], Any], outside: Outside, database: Database
) -> None:
    library = load_library("moving.scoped_between")
    pools = [engine.pool for engine in library.engines.values()]
    app: FastAPI = library.app

    @app.post("/fail/{how}")
    async def fail(how: str) -> None:
        session = await db_session(library.connect)
        await library.note("is undone")
        await session.flush()
        await session.execute(select(Loan))
        assert [pool.checkedout() > 0 for pool in pools] == [True, True]
        if how == "cancelled":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await session.execute(select(Loan))
        raise HTTPException(400)

    async with http_client(app, log_level="critical") as client:
        for number in range(2):
            await asyncio.gather(
                client.post(f"/loans/{number}/ann"),
                client.get("/diary"),
                client.post("/fail/cancelled"),
                client.post("/fail/refused"),
                client.delete(f"/loans/{number - 1}"),
            )
        assert (await client.post("/loans/1/bob")).status_code == 409
        await until(lambda: [pool.checkedout() for pool in pools] == [0, 0])
        await database.is_quiet()
        assert library.connect.engine is library.engines["writer"]
        diary = (await client.get("/diary")).json()
    takes = [text for text in diary if "takes" in text]
    assert takes == [f"ann takes {number}" for number in range(2)]
    assert "is undone" not in diary
    assert [pool.checkedin() for pool in [e.pool for e in library.engines.values()]] == [0, 0]


@only_postgresql
async def test_what_a_session_that_routes_has_written_is_not_read_before_its_commit(
    load_library: Callable[[str], Any], outside: Outside
) -> None:
    library = load_library("moving.scoped_between")
    read: list[str] = []
    for name, engine in library.engines.items():
        event.listen(
            engine.sync_engine, "before_cursor_execute", lambda *_, name=name: read.append(name)
        )
    async with new_db_session_ctx():
        session = await db_session(library.connect)
        await library.note("written")
        assert await library.diary() == []
        await session.commit()
        assert await library.diary() == ["written"]
    read.clear()
    await library.connect.ping()
    assert read == ["reader"]
    with pytest.raises(InvalidRequestError, match="a DBConnect of its own for each engine"):
        async with new_db_session_ctx():
            await db_session(library.connect, read_only=True)
    await close_library(library)


@only_postgresql
async def test_a_request_takes_a_connection_of_its_role_only(
    load_library: Callable[[str], Any], outside: Outside
) -> None:
    library = load_library("moving.scoped_after")
    async with http_client(library.app) as client:
        assert (await client.post("/loans/Emma/ann")).status_code == 201
        assert library.reader.engine is None
        assert (await client.get("/diary")).json() == ["ann takes Emma"]
        assert library.reader.pool_status().checked_in == 1
        assert library.writer.pool_status().checked_in == 1


def writer_of(library: Any) -> DBConnect:
    connect: DBConnect = library.writer if hasattr(library, "writer") else library.connect
    return connect


async def close_library(library: Any) -> None:
    if hasattr(library, "session"):
        await library.session.remove()
    for closed in (*connects_of(library), *getattr(library, "engines", {}).values()):
        await (closed.close() if isinstance(closed, DBConnect) else closed.dispose())
