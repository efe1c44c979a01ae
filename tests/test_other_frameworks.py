"""The middleware under Litestar, Quart and BlackSheep: their how-to program, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import blacksheep.exceptions
import httpx
import litestar.exceptions
import pytest
import pytest_asyncio
import werkzeug.exceptions
from sqlalchemy import insert, text

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, db_session
from examples.demo import connections_out
from examples.serving import http_client
from tests.conftest import Database
from tests.models import Item, Seat
from tests.programs import Outside, until

NOT_FOUND = {
    "litestar": litestar.exceptions.NotFoundException,
    "quart": werkzeug.exceptions.NotFound,
    "blacksheep": blacksheep.exceptions.NotFound,
}
"""What a handler of each framework raises for a 404."""


@pytest.fixture(params=NOT_FOUND)
def framework(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def program(load: Callable[[str, str], Any], postgresql: str) -> Any:
    return load("other_frameworks", postgresql)


@asynccontextmanager
async def served(program: Any, database: Database, app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an application of the program; at the end no connection is left checked out."""
    async with http_client(app, log_level="error") as client:
        yield client
        await until(lambda: connections_out(program.connect) == 0)
        assert await database.states() == []


@pytest_asyncio.fixture
async def client(
    program: Any, framework: str, database: Database
) -> AsyncGenerator[httpx.AsyncClient]:
    async with served(program, database, getattr(program, f"{framework}_app")) as client:
        yield client


@pytest.fixture
def handle(program: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Return a way to let the program do something else than to add a note."""

    def handle(work: Work) -> None:
        async def add_item(title: str) -> int:
            session = await db_session(program.connect)
            await session.execute(insert(Item).values(name=title))
            return await work(title)

        monkeypatch.setattr(program, "add_note", add_item)

    return handle


Work = Callable[[str], Awaitable[int]]


async def succeed(_: str) -> int:
    return 201


async def stumble(title: str) -> int:
    if title == "bad":
        raise RuntimeError("stumbled")
    return 201


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'notes.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


async def test_the_program_runs(framework: str, url: str, load: Callable[[str, str], Any]) -> None:
    program = load("other_frameworks", url)
    async with http_client(getattr(program, f"{framework}_app")) as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert (await client.post("/notes/milk")).status_code == 409
        assert (await client.post("/notes/tea-bread/words")).text == "tea\nbread\n"
    titles = await Outside(url).rows("SELECT title FROM titled_note ORDER BY id")
    assert titles == ["milk", "tea", "bread"]


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
            raise NOT_FOUND[framework]
        return 404

    handle(refuse)
    for title in "returned", "raised":
        assert (await client.post(f"/notes/{title}")).status_code == 404
    assert await database.names() == []


async def test_an_exception_is_rolled_back_and_a_500(
    client: httpx.AsyncClient,
    handle: Callable[[Work], None],
    database: Database,
) -> None:
    handle(stumble)
    assert (await client.post("/notes/bad")).status_code == 500
    assert await database.names() == []
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
    async with client.stream("POST", "/notes/1-2-3/words") as response:
        assert [line async for line in response.aiter_lines()] == ["1", "2", "3"]
        assert await database.names() == ["1", "2", "3"]


async def test_a_streamed_body_that_raises_is_cut_off_and_rolled_back(
    client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    handle(stumble)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/notes/1-2-bad/words")
    assert await database.names() == []


@pytest.mark.parametrize("framework", ["litestar", "quart"], indirect=True)
async def test_a_background_task_is_committed(
    client: httpx.AsyncClient, handle: Callable[[Work], None], database: Database
) -> None:
    handle(succeed)
    assert (await client.post("/notes/milk/copy")).status_code == 202
    assert await until(database.names) == ["copy of milk"]


async def test_a_commit_that_fails_is_tried_again(
    program: Any, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    calls: list[str] = []

    async def refuse_later(title: str) -> int:
        calls.append(title)
        if title == "raised" and calls.count(title) == 2:
            raise NOT_FOUND[framework]
        return 201

    async def lose_once(session: Any) -> None:
        if calls.count(calls[-1]) == 1:
            await lose_race(session)

    handle(refuse_later)
    app = ASGIHTTPDBSessionMiddleware(
        getattr(program, f"{framework}_app"), before_commit=lose_once, attempts=3
    )
    async with served(program, database, app) as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert (await client.post("/notes/raised")).status_code == 404
    assert calls == ["milk", "milk", "raised", "raised"]
    assert await database.names() == ["milk"]


async def test_only_litestar_lets_an_exception_be_tried_again(
    program: Any, framework: str, handle: Callable[[Work], None], database: Database
) -> None:
    calls: list[str] = []

    async def lose_once(title: str) -> int:
        calls.append(title)
        if len(calls) == 1:
            await lose_race(await db_session(program.connect))
        return 201

    handle(lose_once)
    app = ASGIHTTPDBSessionMiddleware(getattr(program, f"{framework}_app"), attempts=3)
    async with served(program, database, app) as client:
        response = await client.post("/notes/milk")
    is_repeated = framework == "litestar"
    assert (response.status_code, len(calls)) == ((201, 2) if is_repeated else (500, 1))
    assert await database.names() == ["milk"] * is_repeated


async def lose_race(session: Any) -> None:
    await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
