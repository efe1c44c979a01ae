"""The page *The life of a request*: its log is what the program prints, its table what happens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import insert

from context_async_sqlalchemy import DBConnect, commit_after_response, db_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from examples import life_of_a_request
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item, Seat
from tests.helpers.programs import ROOT, Outside, until
from tests.helpers.serving import http_client, serve

PAGE = ROOT / "docs/life-of-a-request.md"


async def test_the_log_of_the_page_is_what_the_program_prints(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    await life_of_a_request.main()
    logs = re.findall(r"^```\n(POST .+?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert "".join(logs) == capsys.readouterr().out
    assert len(logs) == 3
    bodies = await Outside(url).rows("SELECT body FROM life_of_a_request ORDER BY body")
    assert bodies == ["milk", "milk, indexed", "tea", "tea, streamed"]
    async with Outside(url).connection() as connection:
        await connection.run_sync(life_of_a_request.Base.metadata.drop_all)


@pytest.fixture
def app(connect: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    return app


async def test_a_streamed_body_that_raises_is_cut_off_and_rolled_back(
    app: FastAPI, connect: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            (await db_session(connect)).add(Item(name="body"))
            yield "a part"
            raise ValueError("no more parts")

        (await db_session(connect)).add(Item(name="handler"))
        return StreamingResponse(body())

    async with http_client(app, log_level="critical") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
    assert await database.names() == ["handler"]
    assert connections_out(connect) == 0


@pytest.mark.parametrize("status", [409, 202])
async def test_an_exception_handlers_answer_rolls_back_whatever_its_status(
    app: FastAPI, connect: DBConnect, database: Database, status: int
) -> None:
    @app.exception_handler(KeyError)
    async def answer(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(None, status_code=status)

    @app.get("/")
    async def stumble() -> None:
        (await db_session(connect)).add(Item(name="a"))
        raise KeyError

    async with http_client(app) as client:
        assert (await client.get("/")).status_code == status
    assert await database.names() == []


async def test_an_http_exception_is_an_answer_and_goes_by_its_status(
    app: FastAPI, connect: DBConnect, database: Database
) -> None:
    @app.get("/{status}")
    async def answer(status: int) -> None:
        (await db_session(connect)).add(Item(name=str(status)))
        raise HTTPException(status)

    async with http_client(app) as client:
        for status in 303, 409:
            assert (await client.get(f"/{status}")).status_code == status
    assert await database.names() == ["303"]


async def test_uvicorn_lets_a_handler_end_whose_client_has_hung_up(
    app: FastAPI, connect: DBConnect, database: Database
) -> None:
    waiting = asyncio.Event()

    @app.get("/")
    async def wait(request: Request) -> None:
        (await db_session(connect)).add(Item(name="nobody reads this"))
        waiting.set()
        await until(request.is_disconnected)

    async with serve(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await waiting.wait()
        writer.close()
        await writer.wait_closed()
        await until(database.names)
    assert connections_out(connect) == 0


async def test_who_commits_after_the_response_has_told_of_a_success(
    app: FastAPI, connect: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def take_a_seat_twice() -> None:
        commit_after_response()
        session = await db_session(connect)
        await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])

    async with http_client(app, log_level="critical") as client:
        assert (await client.get("/")).status_code == 200
    assert await database.seats() == []
