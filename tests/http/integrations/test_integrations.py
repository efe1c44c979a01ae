"""The same application in each framework, over real HTTP, as `docs/integrations` shows it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import insert

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, db_session
from tests.helpers.database import Database
from tests.helpers.integrations import LOGGERS, NOT_FOUND, Work, lose_race, served, stumble, succeed
from tests.helpers.models import Item, Seat
from tests.helpers.postgres import free_port
from tests.helpers.programs import ROOT, Outside, load_program, until
from tests.helpers.serving import http_client


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
