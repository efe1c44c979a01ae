"""What one framework does differently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import blacksheep
import blacksheep.exceptions
import blacksheep.testing
import litestar
import litestar.exceptions
import litestar.testing
import pytest

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.context import is_context_initiated
from tests.helpers.database import Database
from tests.helpers.integrations import NOT_FOUND, Work, lose_race
from tests.helpers.postgres import free_port
from tests.helpers.programs import Outside, load_program
from tests.helpers.serving import http_client


def only(framework: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("framework", [framework], indirect=True)


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
