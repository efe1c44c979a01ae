"""The same application in each framework, over real HTTP, as `docs/integrations` shows it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import blacksheep
import blacksheep.exceptions
import blacksheep.testing
import fastapi
import httpx
import litestar
import litestar.exceptions
import litestar.testing
import pytest
import pytest_asyncio
import starlette.exceptions
import uvicorn
import werkzeug.exceptions
from sqlalchemy import insert, text

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    db_session,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.context import is_context_initiated
from tests.conftest import Database
from tests.helpers.connections import connections_out
from tests.helpers.models import Item, Seat
from tests.helpers.postgres import free_port
from tests.helpers.programs import ROOT, Outside, is_all_closed, load_program, until
from tests.helpers.serving import http_client

NOT_FOUND: dict[str, Callable[[], Exception]] = {
    "fastapi": lambda: fastapi.HTTPException(404),
    "starlette": lambda: starlette.exceptions.HTTPException(404),
    "litestar": litestar.exceptions.NotFoundException,
    "quart": werkzeug.exceptions.NotFound,
    "blacksheep": blacksheep.exceptions.NotFound,
}
"""What a handler of each framework raises for a 404; pure ASGI has no such thing."""

LOGGERS = {
    "fastapi": "uvicorn.error",
    "starlette": "uvicorn.error",
    "asgi": "uvicorn.error",
    "litestar": "litestar",
    "quart": "examples.integrations.quart",
    "blacksheep": "blacksheep.server",
}
"""Who logs an exception of a handler."""


def only(framework: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("framework", [framework], indirect=True)


@pytest.fixture(params=LOGGERS)
def framework(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database: PostgreSQL, unless a test asks for the other one."""
    if getattr(request, "param", "postgresql") == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'notes.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest_asyncio.fixture
async def program(framework: str, url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Any]:
    program = load_program(monkeypatch, f"integrations.{framework}", DATABASE_URL=url)
    yield program
    assert is_all_closed(program)
    async with Outside(url).connection() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS note"))


@asynccontextmanager
async def served(program: Any, database: Database, app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an application of the program; at the end no connection is left checked out."""
    async with http_client(app, log_level="error") as client:
        yield client
        await until(lambda: connections_out(program.connect) == 0)
        assert await database.states() == []


@pytest_asyncio.fixture
async def client(program: Any, database: Database) -> AsyncGenerator[httpx.AsyncClient]:
    async with served(program, database, program.app) as client:
        yield client


@pytest.fixture
def handle(program: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Return a way to let the program do something else than to add a note, or to read the notes.

    It adds an item and then does the work, in the streamed body for three items.
    """

    def handle(work: Work) -> None:
        async def add_item(title: str) -> int:
            session = await db_session(program.connect)
            await session.execute(insert(Item).values(name=title))
            return await work(title)

        async def stream() -> AsyncGenerator[bytes]:
            for title in "one", "two", "bad":
                await add_item(title)
                yield f"{title}\n".encode()

        monkeypatch.setattr(program, "add_note", add_item)
        monkeypatch.setattr(program, "read_notes", stream)

    return handle


Work = Callable[[str], Awaitable[int]]


async def succeed(_: str) -> int:
    return 201


async def stumble(title: str) -> int:
    if title.endswith("bad"):
        raise RuntimeError("stumbled")
    return 201


def test_a_program_opens_nothing_when_it_is_imported(tmp_path: Path) -> None:
    code = f"""
import importlib
for name in {list(LOGGERS)}:
    assert importlib.import_module("examples.integrations." + name).connect.engine is None
"""
    environment = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
async def test_the_program_runs(program: Any, url: str) -> None:
    async with http_client(program.app) as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert (await client.post("/notes/milk")).status_code == 409
        assert (await client.post("/notes/milk/copy")).status_code == 202
        stored = ["milk", "copy of milk"]

        async def is_copied() -> bool:
            return await Outside(url).rows("SELECT title FROM note") == stored

        await until(is_copied)
        assert (await client.get("/notes")).text == "milk\ncopy of milk\n"
        assert (await client.get("/nothing")).status_code == 404


async def test_a_success_is_committed_when_the_client_has_the_answer(
    program: Any,
    client: httpx.AsyncClient,
    handle: Callable[[Work], None],
    database: Database,
    postgresql: str,
) -> None:
    async def book(_: str) -> int:
        session = await db_session(program.connect)
        await session.execute(insert(Seat).values(number=1))
        return 201

    async def post() -> list[str]:
        async with client.stream("POST", "/notes/milk") as response:
            assert response.status_code == 201
            return await database.names()

    handle(book)
    async with Outside(postgresql).connection() as other:
        # The COMMIT that checks the number of the seat waits for whoever may have it.
        await other.execute(insert(Seat).values(number=1))
        posting = asyncio.create_task(post())
        await until(lambda: database.pid_of("COMMIT%"))
        done, _ = await asyncio.wait([posting], timeout=0.1)
        assert not done, "there is an answer before the commit"
        await other.rollback()
        assert await posting == ["milk"]


async def test_a_4xx_is_rolled_back(
    client: httpx.AsyncClient, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    async def refuse(title: str) -> int:
        if title == "raised":
            raise NOT_FOUND[framework]()
        return 404

    handle(refuse)
    titles = ["returned", "raised"] if framework in NOT_FOUND else ["returned"]
    for title in titles:
        assert (await client.post(f"/notes/{title}")).status_code == 404
    assert await database.names() == []


async def test_an_exception_is_rolled_back_and_a_500_that_is_logged(
    client: httpx.AsyncClient,
    framework: str,
    handle: Callable[[Work], None],
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handle(stumble)
    logging.getLogger(LOGGERS[framework]).addHandler(caplog.handler)  # Litestar's goes no further
    assert (await client.post("/notes/bad")).status_code == 500
    logging.getLogger(LOGGERS[framework]).removeHandler(caplog.handler)
    assert await database.names() == []
    loggers = {record.name for record in caplog.records if record.exc_info}
    assert loggers == {LOGGERS[framework]}
    assert "stumbled" in caplog.text
    assert (await client.post("/notes/good")).status_code == 201
    assert await database.names() == ["good"]


async def test_a_child_task_has_the_session_of_its_request(
    program: Any, client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    sessions: list[object] = []

    async def keep(title: str) -> None:
        session = await db_session(program.connect)
        await session.execute(insert(Item).values(name=f"{title}'s child"))
        sessions.append(session)

    async def work(title: str) -> int:
        await asyncio.create_task(keep(title))
        sessions.append(await db_session(program.connect))
        return 201 if title == "good" else 404

    handle(work)
    assert (await client.post("/notes/bad")).status_code == 404
    assert (await client.post("/notes/good")).status_code == 201
    of_first, first, of_second, second = sessions
    assert of_first is first is not second is of_second
    assert await database.names() == ["good", "good's child"]


async def test_a_commit_that_fails_is_a_500(
    program: Any,
    client: httpx.AsyncClient,
    handle: Callable[[Work], None],
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def book_twice(_: str) -> int:
        session = await db_session(program.connect)
        await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])
        return 201

    handle(book_twice)
    assert (await client.post("/notes/a")).status_code == 500
    assert "IntegrityError" in caplog.text
    assert (await database.names(), await database.seats()) == ([], [])


async def test_what_a_streamed_body_writes_is_committed_when_it_is_complete(
    client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    handle(succeed)
    async with client.stream("GET", "/notes") as response:
        assert [line async for line in response.aiter_lines()] == ["one", "two", "bad"]
        assert await database.names() == ["one", "two", "bad"]


async def test_a_streamed_body_that_raises_is_cut_off_and_rolled_back(
    client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    handle(stumble)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/notes")
    assert await database.names() == []


async def test_a_background_task_is_committed(
    client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    handle(succeed)
    assert (await client.post("/notes/milk/copy")).status_code == 202
    assert await until(database.names) == ["copy of milk"]


async def test_a_background_task_that_fails_is_rolled_back_and_logged(
    client: httpx.AsyncClient,
    framework: str,
    handle: Callable[[Work], None],
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handle(stumble)
    assert (await client.post("/notes/bad/copy")).status_code == 202

    def is_logged() -> bool:
        gc.collect()  # asyncio logs what nobody has asked a task for when that is collected
        return "stumbled" in caplog.text

    await until(is_logged)
    loggers = {record.name for record in caplog.records if record.exc_info}
    others = {"litestar": "uvicorn.error", "blacksheep": "asyncio"}
    assert loggers == {others.get(framework, LOGGERS[framework])}
    assert await database.names() == []


async def test_an_application_does_not_start_without_its_database(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://app@127.0.0.1:{free_port()}/notes"
    program = load_program(monkeypatch, f"integrations.{framework}", DATABASE_URL=url)
    server = uvicorn.Server(uvicorn.Config(program.app, port=0, lifespan="on", log_config=None))
    with pytest.raises(SystemExit):
        await server.serve()


async def test_a_commit_that_fails_is_tried_again(
    program: Any, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    calls: list[str] = []

    async def refuse_later(title: str) -> int:
        calls.append(title)
        if title == "refused" and calls.count(title) == 2:
            if framework in NOT_FOUND:
                raise NOT_FOUND[framework]()
            return 404
        return 201

    async def lose_once(session: Any) -> None:
        if calls.count(calls[-1]) == 1:
            await lose_race(session)

    handle(refuse_later)
    app = ASGIHTTPDBSessionMiddleware(program.app, before_commit=lose_once, attempts=3)
    async with served(program, database, app) as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert (await client.post("/notes/refused")).status_code == 404
    assert calls == ["milk", "milk", "refused", "refused"]
    assert await database.names() == ["milk"]


async def test_an_exception_is_tried_again_unless_the_framework_answers_it_itself(
    program: Any, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    calls: list[str] = []

    async def lose_once(title: str) -> int:
        calls.append(title)
        if len(calls) == 1:
            await lose_race(await db_session(program.connect))
        return 201

    handle(lose_once)
    app = ASGIHTTPDBSessionMiddleware(program.app, attempts=3)
    async with served(program, database, app) as client:
        response = await client.post("/notes/milk")
    is_repeated = framework not in ("quart", "blacksheep")
    assert (response.status_code, len(calls)) == ((201, 2) if is_repeated else (500, 1))
    assert await database.names() == ["milk"] * is_repeated


async def lose_race(session: Any) -> None:
    await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))


# What one framework does differently


def add_exception_handler(program: Any, framework: str, seen: list[Exception]) -> Any:
    """Return the application with a handler of every exception, which is a 418."""
    if framework == "litestar":

        def answer(_: object, error: Exception) -> litestar.Response[None]:
            seen.append(error)
            return litestar.Response(None, status_code=418)

        return litestar.Litestar(
            [program.post_note],
            lifespan=[program.lifespan],
            exception_handlers={Exception: answer},
            logging_config=None,
        )
    if framework == "quart":

        async def answer_quart(error: Exception) -> tuple[str, int]:
            seen.append(error)
            return "", 418

        program.app.register_error_handler(Exception, answer_quart)
        return program.app

    async def answer_blacksheep(_: object, __: object, error: Exception) -> blacksheep.Response:
        seen.append(error)
        return blacksheep.Response(418)

    program.application.exceptions_handlers[Exception] = answer_blacksheep
    return program.application


@pytest.mark.parametrize("framework", ["litestar", "quart", "blacksheep"], indirect=True)
async def test_no_exception_handler_of_the_framework_sees_a_commit_that_fails(
    program: Any, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    seen: list[Exception] = []

    async def fail_twice(title: str) -> int:
        if title == "handler":
            raise RuntimeError("in the handler")
        return 201

    handle(fail_twice)
    app = ASGIHTTPDBSessionMiddleware(
        add_exception_handler(program, framework, seen), before_commit=lose_race
    )
    async with http_client(app, log_level="critical") as client:
        assert (await client.post("/notes/handler")).status_code == 418
        assert [str(error) for error in seen] == ["in the handler"]
        assert (await client.post("/notes/commit")).status_code == 500
    assert len(seen) == 1
    assert await database.names() == []


@only("asgi")
async def test_pure_asgi_starts_without_its_database_unless_uvicorn_is_told_that_it_has_a_lifespan(
    monkeypatch: pytest.MonkeyPatch, framework: str
) -> None:
    url = f"postgresql://app@127.0.0.1:{free_port()}/notes"
    program = load_program(monkeypatch, f"integrations.{framework}", DATABASE_URL=url)
    async with http_client(program.app, log_level="critical") as client:
        assert (await client.get("/nothing")).status_code == 404


@pytest.mark.parametrize("framework", ["fastapi", "starlette"], indirect=True)
async def test_a_middleware_that_is_added_before_has_the_session_and_one_added_after_has_not(
    program: Any, framework: str
) -> None:
    seen: list[bool] = []

    class Seeing:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                seen.append(is_context_initiated())
            await self.app(scope, receive, send)

    app = getattr(program, {"fastapi": "FastAPI", "starlette": "Starlette"}[framework])()
    app.add_middleware(Seeing)
    getattr(program, f"add_{framework}_http_db_session_middleware")(app)
    app.add_middleware(Seeing)
    async with http_client(app) as client:
        await client.get("/nothing")
    assert seen == [False, True]


@only("litestar")
async def test_litestar_answers_a_later_attempt_only_if_the_middleware_is_around_it(
    program: Any, handle: Callable[[Work], None]
) -> None:
    calls: list[str] = []

    async def refuse_later(title: str) -> int:
        calls.append(title)
        if len(calls) % 2 == 0:
            raise NOT_FOUND["litestar"]()
        return 201

    class LosingOnce(ASGIHTTPDBSessionMiddleware):
        def __init__(self, app: Any) -> None:
            super().__init__(app, before_commit=lose_race, attempts=2)

    handle(refuse_later)
    in_list = litestar.Litestar(
        [program.post_note],
        lifespan=[program.lifespan],
        middleware=[LosingOnce],  # type: ignore[list-item]
        logging_config=None,  # the default would be that of the whole process
    )
    without = litestar.Litestar(
        [program.post_note], lifespan=[program.lifespan], logging_config=None
    )
    for app, status in (in_list, 500), (LosingOnce(without), 404):
        async with http_client(app, log_level="critical") as client:
            assert (await client.post("/notes/milk")).status_code == status
    assert len(calls) == 4


@only("litestar")
async def test_the_test_client_of_litestar_has_an_event_loop_of_its_own(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[object] = []

    async def see_loop(_: str) -> int:
        loops.append(asyncio.get_running_loop())
        return 201

    monkeypatch.setattr(program, "add_note", see_loop)
    async with litestar.testing.AsyncTestClient(program.app) as client:
        assert (await client.post("/notes/milk")).status_code == 201
    assert loops != [asyncio.get_running_loop()]


@only("quart")
async def test_the_test_client_of_quart_passes_the_middleware_and_starts_once(
    program: Any, database: Database, url: str
) -> None:
    async with program.app.test_app() as app:
        assert (await app.test_client().post("/notes/milk")).status_code == 201
        assert (await app.test_client().post("/notes/milk")).status_code == 409
        assert await Outside(url).rows("SELECT title FROM note") == ["milk"]
    with pytest.raises(Exception, match="Error during startup"):
        await program.app.test_app().startup()


@only("blacksheep")
async def test_the_test_client_of_blacksheep_does_not_pass_the_middleware(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await program.application.start()
    client = blacksheep.testing.TestClient(program.application)
    response = await client.post("/notes/milk")
    assert response is not None
    assert response.status == 500
    assert "ContextNotInitiatedError" in caplog.text
    await program.application.stop()
