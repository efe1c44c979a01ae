"""A FastAPI application that gets its session from a dependency."""


# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import fastapi.routing
import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import commit_after_response, db_session
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from tests.helpers.asgi import add
from tests.helpers.database import Database
from tests.helpers.models import Item, Seat
from tests.helpers.serving import http_client


def add_nothing(_: FastAPI) -> None:
    pass


def add_dispatch(app: FastAPI) -> None:
    app.middleware("http")(fastapi_http_db_session_middleware)


def add_other_middleware(app: FastAPI) -> None:
    @app.middleware("http")
    async def other(request: Any, call_next: Any) -> Any:
        return await call_next(request)


Adder = Callable[[FastAPI], None]
WAYS = [add_nothing, add_other_middleware, add_fastapi_http_db_session_middleware, add_dispatch]
every_way = pytest.mark.parametrize("add_middleware", WAYS)
SOURCE = inspect.getsource(fastapi.routing)


async def insert_item(session: AsyncSession, name: str) -> None:
    await session.execute(insert(Item).values(name=name))


@asynccontextmanager
async def served(
    dependency: DBSessionDependency,
    database: Database,
    add_middleware: Adder = add_nothing,
    before_response: Callable[[list[str]], None] = lambda _: None,
) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an application that gets its session from a dependency.

    Args:
        dependency: Its dependency.
        database: Looked at as each response starts.
        add_middleware: Adds the middleware to it.
        before_response: Called with the names of the items that are committed by then.
    """
    app = FastAPI()

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: IntegrityError) -> JSONResponse:
        return JSONResponse({}, 409)

    Session = Annotated[AsyncSession, Depends(dependency)]  # noqa: N806

    async def current_user(user: str, session: Session) -> str:
        await insert_item(session, user)
        if user == "nobody":
            raise HTTPException(401)
        return user

    async def audited(session: Session) -> AsyncGenerator[AsyncSession]:
        yield session
        await insert_item(session, "torn down")

    CurrentUser = Annotated[str, Depends(current_user)]  # noqa: N806

    router = APIRouter(prefix="/included")

    @app.post("/shared")
    @router.post("/shared")
    async def shared(user: CurrentUser, session: Session) -> str:
        assert session is await db_session(dependency.connect)
        await add(dependency.connect, "service")
        await insert_item(session, "endpoint")
        return user

    @app.post("/sync")
    def sync(user: CurrentUser) -> str:
        return user

    @app.post("/exception")
    async def exception(user: CurrentUser) -> str:
        raise ValueError(user)

    @app.post("/http-exception")
    async def http_exception(user: CurrentUser) -> str:
        raise HTTPException(404, user)

    @app.post("/returned")
    async def returned(user: CurrentUser) -> JSONResponse:
        return JSONResponse({}, 404)

    @app.post("/returned-sync")
    def returned_sync(user: CurrentUser) -> JSONResponse:
        return JSONResponse({}, 404)

    @app.post("/of-route", status_code=404)
    @router.post("/of-route", status_code=404)
    async def of_route(user: CurrentUser) -> str:
        return user

    @app.post("/of-response")
    async def of_response(user: CurrentUser, response: Response) -> str:
        response.status_code = 404
        return user

    @app.post("/invalid")
    async def invalid(user: CurrentUser, number: int) -> str:
        return user

    @app.post("/commit-fails")
    async def commit_fails(session: Session) -> dict[str, str]:
        await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])
        return {}

    @app.post("/teardown")
    async def teardown(session: Annotated[AsyncSession, Depends(audited)]) -> dict[str, str]:
        await insert_item(session, "endpoint")
        return {}

    @app.post("/own")
    async def own(session: Session) -> dict[str, str]:
        await insert_item(session, "committed")
        await session.commit()
        await insert_item(session, "forgotten")
        return {}

    @app.post("/late")
    async def late(session: Session) -> dict[str, str]:
        commit_after_response()
        await insert_item(session, "late")
        return {}

    @app.post("/body")
    async def body(session: Session) -> StreamingResponse:
        async def parts() -> AsyncGenerator[str]:
            await insert_item(session, "body")
            yield "x"

        return StreamingResponse(parts())

    app.include_router(router)
    add_middleware(app)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def look_and_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                before_response(await database.names())
            await send(message)

        await app(scope, receive, look_and_send)

    async with http_client(watched) as client:
        yield client
