"""A dependency without the middleware stores what is known to be a success, and nothing else."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial, wraps
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.routing import Router

from context_async_sqlalchemy import ContextNotInitiatedError, DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.dependency import insert_item
from tests.helpers.models import Seat
from tests.helpers.serving import http_client


class Swapping(APIRoute):
    """A route class that answers in the place of its endpoints, as its query says."""

    def get_route_handler(self) -> Any:
        original = super().get_route_handler()

        async def handle(request: Request) -> Response:
            match request.query_params["handle"]:
                case "swap":
                    await original(request)
                    return JSONResponse({}, 409)
                case "catch":
                    try:
                        return await original(request)
                    except Exception:
                        return JSONResponse({}, 400)
            return await original(request)

        return handle


async def insert_twice(session: AsyncSession) -> None:
    # The number is checked at COMMIT.
    await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])


def make_app(connect: DBConnect) -> FastAPI:
    """Make an application with a route for each way in which a request may end."""
    app = FastAPI()
    router = APIRouter(route_class=Swapping)
    mounted = FastAPI()
    Session = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]  # noqa: N806

    @app.post("/plain", status_code=201)
    @router.post("/swapped", status_code=201)
    @mounted.post("/plain", status_code=201)
    async def plain(session: Session) -> dict[str, str]:
        await insert_item(session, "a")
        return {}

    @app.post("/refused")
    async def refused(session: Session) -> JSONResponse:
        await insert_item(session, "a")
        return JSONResponse({}, 404)

    @app.post("/sync-refused")
    def sync_refused(session: Session) -> JSONResponse:
        return JSONResponse({}, 404)

    @app.post("/commit-fails", status_code=201)
    @router.post("/swapped-commit-fails", status_code=201)
    @mounted.post("/commit-fails", status_code=201)
    async def commit_fails(session: Session) -> dict[str, str]:
        await insert_twice(session)
        return {}

    @router.post("/swapped-error")
    async def swapped_error(session: Session) -> None:
        await insert_item(session, "a")
        raise ValueError

    @app.post("/bad-model", response_model=int)
    async def bad_model(session: Session) -> str:
        await insert_item(session, "a")
        return "not a number"

    @app.post("/bad-json", response_class=JSONResponse, response_model=None)
    async def bad_json(session: Session) -> object:
        await insert_item(session, "a")
        return {"number": float("nan")}

    @app.post("/bad-file")
    async def bad_file(session: Session) -> FileResponse:
        await insert_item(session, "a")
        return FileResponse("/there/is/none")

    @app.post("/file")
    async def file(session: Session) -> FileResponse:
        await insert_item(session, "a")
        return FileResponse(__file__)

    @app.post("/not-modified", status_code=304)
    async def not_modified(session: Session) -> None:
        await insert_item(session, "a")

    @app.post("/redirect")
    async def redirect(session: Session) -> None:
        await insert_item(session, "a")
        raise HTTPException(303, headers={"Location": "/"})

    @app.post("/of-response")
    async def of_response(session: Session, response: Response) -> None:
        await insert_item(session, "a")
        response.status_code = 410

    @app.post("/error")
    async def error(session: Session) -> None:
        await insert_item(session, "a")
        raise KeyError

    @app.post("/background")
    async def background(session: Session, tasks: BackgroundTasks) -> None:
        tasks.add_task(insert_item, session, "a")

    @app.post("/stream")
    async def stream(session: Session) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            await insert_item(session, "a")
            yield "x"

        return StreamingResponse(body())

    async def of_partial(name: str, session: Session) -> None:
        await insert_item(session, name)

    app.post("/partial")(partial(of_partial, "a"))

    @app.exception_handler(KeyError)
    async def answer_with_200(_: Request, __: KeyError) -> JSONResponse:
        return JSONResponse({"error": "KeyError"})

    app.include_router(router)
    app.mount("/mounted", mounted)
    return app


def leave(_: FastAPI) -> None:
    """Change nothing."""


def replace_endpoints(app: FastAPI) -> None:
    """Replace the endpoints of an application that is made, as error trackers do."""

    def traced(call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def trace(*args: Any, **kwargs: Any) -> Any:
            returned = call(*args, **kwargs)
            return await returned if asyncio.iscoroutine(returned) else returned

        return trace

    for route in app.routes:
        # A plain function stays: FastAPI has seen already that it runs in a thread.
        if isinstance(route, APIRoute) and "sync" not in route.path:
            route.dependant.call = traced(route.endpoint)


def instrument(app: FastAPI) -> None:
    FastAPIInstrumentor.instrument_app(app)


@pytest.mark.parametrize("change", [leave, replace_endpoints, instrument])
@pytest.mark.parametrize(
    ("path", "status", "stored"),
    [
        ("/plain", 201, True),
        ("/refused", 404, False),
        ("/sync-refused", 404, False),
        ("/commit-fails", 500, False),
        ("/swapped?handle=", 201, True),
        ("/swapped?handle=swap", 409, False),
        ("/swapped-error?handle=catch", 400, False),
        ("/swapped-commit-fails?handle=catch", 500, False),
        ("/mounted/plain", 201, True),
        ("/mounted/commit-fails", 500, False),
        ("/bad-model", 500, False),
        ("/bad-json", 500, False),
        ("/bad-file", 500, False),
        ("/file", 200, True),
        ("/not-modified", 304, True),
        ("/redirect", 303, True),
        ("/of-response", 410, False),
        ("/error", 200, False),
        ("/background", 200, True),
        ("/stream", 200, True),
        ("/partial", 200, True),
    ],
)
async def test_what_is_stored_is_what_the_client_was_told(
    connect: DBConnect,
    database: Database,
    path: str,
    status: int,
    stored: bool,
    change: Callable[[FastAPI], None],
) -> None:
    app = make_app(connect)
    change(app)
    async with http_client(app) as client:
        assert (await client.post(path)).status_code == status
    assert await database.names() == (["a"] if stored else [])
    assert await database.seats() == []
    assert connections_out(connect) == 0


async def test_a_replaced_endpoint_is_no_reason_to_take_a_failure_for_a_success(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]  # noqa: N806

    @app.post("/refuse")
    async def refuse(session: Session) -> JSONResponse:
        await insert_item(session, "refused")
        return JSONResponse({}, 404)

    @app.post("/duplicate", status_code=201)
    async def duplicate(session: Session) -> None:
        await session.execute(insert(Seat).values(number=2))

    def wrap(function: Any) -> Callable[..., Awaitable[Any]]:
        async def traced(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return traced

    await database.execute("INSERT INTO seat (number) VALUES (2)")
    for route in app.routes:
        if isinstance(route, APIRoute):
            route.dependant.call = wrap(route.dependant.call)
    async with http_client(app) as client:
        assert (await client.post("/refuse")).status_code == 404
        assert (await client.post("/duplicate")).status_code == 500
    assert (await database.names(), await database.seats()) == ([], [2])


async def test_a_middleware_of_the_router_may_call_the_endpoint_in_a_task_of_its_own(
    connect: DBConnect, database: Database
) -> None:
    app = make_app(connect)

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    app.router.middleware_stack = BaseHTTPMiddleware(app.router.middleware_stack, dispatch)
    # It raises what the application raises after the response.
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/refused")).status_code == 404
        assert (await client.post("/plain")).status_code == 201
        assert connections_out(connect) == 0
    with pytest.raises(ContextNotInitiatedError):
        await db_session(connect)
    assert await database.names() == ["a"]


async def test_a_decorated_endpoint_is_settled_by_what_the_decorator_returns(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    def refusing(function: Any) -> Any:
        @wraps(function)
        async def refuse(**kwargs: Any) -> JSONResponse:
            await function(**kwargs)
            return JSONResponse({}, 404)

        return refuse

    @app.post("/")
    @refusing
    async def endpoint(
        session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
    ) -> None:
        await insert_item(session, "a")

    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 404
    assert await database.names() == []


async def test_a_dependency_may_take_the_place_of_another_in_a_route_made_before(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    async def get_session() -> None: ...

    @app.post("/{status}")
    async def endpoint(
        status: int, session: Annotated[AsyncSession, Depends(get_session)]
    ) -> Response:
        await insert_item(session, str(status))
        return Response(status_code=status)

    app.dependency_overrides[get_session] = DBSessionDependency(connect)
    async with http_client(app) as client:
        await client.post("/404")
        await client.post("/201")
    assert await database.names() == ["201"]


async def test_a_handler_of_a_failed_commit_may_write(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
    ) -> None:
        await insert_twice(session)

    @app.exception_handler(IntegrityError)
    async def note(_: Request, __: IntegrityError) -> JSONResponse:
        await add(connect, "noted")
        await (await db_session(connect)).commit()
        return JSONResponse({}, 409)

    async with http_client(app) as client:
        assert (await client.post("/")).status_code == 409
    assert (await database.names(), await database.seats()) == (["noted"], [])


async def test_what_a_body_writes_that_breaks_is_rolled_back_and_what_the_endpoint_wrote_is_not(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
    ) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            yield "x"
            await insert_item(session, "body")
            raise ValueError

        await insert_item(session, "endpoint")
        return StreamingResponse(body())

    async with http_client(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/")
    assert await database.names() == ["endpoint"]


async def test_a_request_whose_response_is_not_seen_is_refused(
    connect: DBConnect, database: Database
) -> None:
    app = make_app(connect)
    # As in a library that brings its own router.
    app.router.__class__ = type("OwnRouter", (APIRouter,), {"__call__": Router.__call__})
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        with pytest.raises(RuntimeError, match="add_fastapi_http_db_session_middleware"):
            await client.post("/plain")
    assert await database.names() == []
