"""The same endpoint as an application of Starlette and of FastAPI."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.serving import http_client


def starlette_app(endpoint: Any, handlers: dict[Any, Any], **options: Any) -> Starlette:
    inner = Starlette(routes=[Route("/{name}", endpoint, methods=["POST"])])
    app = Starlette(
        routes=[Route("/{name}", endpoint, methods=["POST"]), Mount("/mounted", inner)],
        exception_handlers=handlers,
    )
    add_starlette_http_db_session_middleware(app, **options)
    return app


def fastapi_app(endpoint: Any, handlers: dict[Any, Any], **options: Any) -> FastAPI:
    app = FastAPI(exception_handlers=handlers)

    async def fastapi_endpoint(request: Request) -> Response:
        response: Response = await endpoint(request)
        return response

    app.add_api_route("/{name}", fastapi_endpoint, methods=["POST"])
    add_fastapi_http_db_session_middleware(app, **options)
    return app


every_framework = pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])


async def post(app: Any, path: str = "/a", content: bytes = b"") -> httpx.Response:
    async with http_client(app, log_level="critical") as client:
        return await client.post(path, content=content)
