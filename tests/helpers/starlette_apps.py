"""An endpoint with the middleware of Starlette, added in every way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)

Endpoint = Callable[[Request], Awaitable[Response]]


def add_dispatch(app: Starlette) -> None:
    app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)


def add_other_middleware(app: Starlette) -> None:
    async def dispatch(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)


def add_inside_of_other_middleware(app: Starlette) -> None:
    add_starlette_http_db_session_middleware(app)
    add_other_middleware(app)


def add_outside_of_other_middleware(app: Starlette) -> None:
    add_other_middleware(app)
    add_starlette_http_db_session_middleware(app)


def add_twice(app: Starlette) -> None:
    add_starlette_http_db_session_middleware(app)
    add_dispatch(app)
    add_starlette_http_db_session_middleware(app)


ASGI = [
    add_starlette_http_db_session_middleware,
    add_inside_of_other_middleware,
    add_outside_of_other_middleware,
    add_twice,
]
EVERY = [*ASGI, add_dispatch]
every_way = pytest.mark.parametrize("add_middleware", EVERY)


def app_of(endpoint: Endpoint, add_middleware: Callable[[Starlette], None]) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint)])
    add_middleware(app)
    return app
