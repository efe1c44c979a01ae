"""Options of the middleware and of a context: bad ones are refused, lost ones are named."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi import FastAPI
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    auto_commit_by_status_code,
    commit_all_sessions,
    db_session,
    new_db_session_ctx,
    retry_on_transient_error,
)
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from context_async_sqlalchemy.test_utils import set_test_context
from tests.helpers.asgi import add, app_of, call
from tests.helpers.database import Database
from tests.helpers.models import Seat
from tests.helpers.serving import http_client
from tests.helpers.starlette_apps import every_way


async def never(_: int) -> bool:
    return False


class Never:
    async def __call__(self, _: int) -> bool:
        return False


@pytest.mark.parametrize(
    "commit_on",
    [never, Never(), partial(never), partial(Never()), partial(partial(never)), Never().__call__],
)
@pytest.mark.parametrize(
    "add_to",
    [
        lambda app, **options: ASGIHTTPDBSessionMiddleware(app, **options),
        add_starlette_http_db_session_middleware,
        add_fastapi_http_db_session_middleware,
    ],
)
def test_an_async_commit_on_is_refused_when_it_is_given(add_to: Any, commit_on: Any) -> None:
    with pytest.raises(TypeError, match="commit_on must be a function, not an async one"):
        add_to(FastAPI(), commit_on=commit_on)


async def test_a_commit_on_that_returns_an_awaitable_commits_nothing(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return 409

    with pytest.raises(TypeError, match="commit_on must return a bool"):
        await call(app_of(handler, commit_on=lambda status: never(status)))
    assert await database.names() == []


async def test_a_commit_on_may_be_an_object_or_a_partial(
    connect: DBConnect, database: Database
) -> None:
    class Rule:
        def __call__(self, status: int) -> bool:
            return status == 404

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        await add(connect, "b")
        return 404

    for commit_on in Rule(), partial(lambda kind, status: status // 100 == kind, 4):
        await call(app_of(handler, commit_on=commit_on))
        assert await database.names() == ["a", "b"]
        await database.empty()


# What is called before a commit


@pytest.mark.parametrize("bad", ["a connect", 1])
async def test_what_cannot_be_called_before_a_commit_is_refused_at_once(
    connect: DBConnect, database: Database, bad: Any
) -> None:
    given: Any = connect if bad == "a connect" else bad
    request, call_next = Mock(), Mock()
    match = "before_commit must be a function .*'await db_session\\(connect\\)'"
    async with new_db_session_ctx():
        await add(connect, "a")
        for refuse in (
            lambda: new_db_session_ctx(given),
            lambda: retry_on_transient_error(before_commit=given),
            lambda: add_starlette_http_db_session_middleware(Starlette(), given),
            lambda: add_fastapi_http_db_session_middleware(FastAPI(), given),
            lambda: ASGIHTTPDBSessionMiddleware(Mock(), given),
        ):
            with pytest.raises(TypeError, match=match):
                refuse()
        waiting: list[Callable[[], Awaitable[object]]] = [
            lambda: commit_all_sessions(given),
            lambda: auto_commit_by_status_code(200, given),
            lambda: starlette_http_db_session_middleware(request, call_next, given),
        ]
        for refuse_later in waiting:
            with pytest.raises(TypeError, match=match):
                await refuse_later()
        call_next.assert_not_called()
        assert await database.names() == []
    assert await database.names() == ["a"]


def test_the_password_of_what_is_refused_is_not_shown() -> None:
    with pytest.raises(TypeError) as raised:
        new_db_session_ctx("postgresql://app:secret@host/db")  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)
    assert "not str" in str(raised.value)


# Exception handlers


@every_way
@pytest.mark.parametrize("wrap", [lambda f: f, partial])
async def test_a_handler_of_a_failed_commit_may_be_an_object(
    connect: DBConnect, add_middleware: Any, wrap: Any
) -> None:
    class Conflict:
        async def __call__(self, _: Request, error: Exception) -> Response:
            return JSONResponse(type(error).__name__, 409)

    async def endpoint(_: Request) -> Response:
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        return Response()

    app = Starlette(
        routes=[Route("/", endpoint)], exception_handlers={IntegrityError: wrap(Conflict())}
    )
    add_middleware(app)
    async with http_client(app) as client:
        response = await client.get("/")
        assert (response.status_code, response.json()) == (409, "IntegrityError")


# A middleware inside another one


def three(_: int) -> bool:
    return True


def nothing(_: AsyncSession) -> None: ...


@pytest.mark.parametrize(
    ("outer", "inner", "named"),
    [
        ({}, {}, None),
        ({"commit_on": three}, {"commit_on": three}, None),
        ({"commit_on": three, "attempts": 3}, {}, None),
        ({}, {"attempts": 1, "before_commit": None}, None),
        ({}, {"commit_on": three}, "commit_on"),
        ({"before_commit": nothing}, {"before_commit": print}, "before_commit"),
        ({"attempts": 2}, {"attempts": 3, "replay_body_limit": 9}, "attempts, replay_body_limit"),
    ],
)
async def test_the_options_that_a_nested_middleware_loses_are_named_once(
    connect: DBConnect,
    database: Database,
    caplog: pytest.LogCaptureFixture,
    outer: Any,
    inner: Any,
    named: str | None,
) -> None:
    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return Response(status_code=404)

    mounted = Starlette(routes=[Route("/", endpoint)])
    app = Starlette(routes=[Mount("/mounted", app=mounted)])
    add_starlette_http_db_session_middleware(mounted, **inner)
    add_starlette_http_db_session_middleware(app, **outer)
    caplog.set_level(logging.WARNING)
    async with http_client(app) as client:
        for _ in range(2):
            assert (await client.get("/mounted/?token=1")).status_code == 404
            await database.empty()
    messages = [r.getMessage() for r in caplog.records]
    if named is None:
        assert messages == []
    else:
        [message] = messages
        assert f"its own {named} has no effect" in message
        assert "(GET '/mounted/')" in message


async def test_a_middleware_inside_a_dispatch_function_loses_its_options_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def endpoint(_: Request) -> Response:
        return Response()

    app = Starlette(routes=[Route("/", endpoint)])
    add_starlette_http_db_session_middleware(app, commit_on=three)
    app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)
    async with http_client(app) as client:
        await client.get("/")
    assert "its own commit_on has no effect" in caplog.text


async def test_a_test_that_opens_the_context_is_not_warned(
    connect: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return 200

    async with set_test_context(auto_close=True):
        await call(app_of(handler, commit_on=three))
    assert caplog.text == ""
