"""The application around the handlers, for each framework: the same routes, nothing else.

`/nothing` asks for no session; `/body` streams 4 MiB after a SELECT, and `/background` leaves a
sleeping task after one; the others are in `benchmarks.work`. The process of a contender imports
only what it needs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, NamedTuple, TypeAlias

from benchmarks import work
from benchmarks.work import STEPS, Step
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send

Handler: TypeAlias = Callable[..., Awaitable[Any]]
MakeHandler: TypeAlias = Callable[[tuple[Step, ...]], Handler]
"""How a contender makes a handler that does the steps with a session."""


class Framework(NamedTuple):
    """How to make an application from handlers, and how to add this library to it."""

    build: Callable[[MakeHandler], Any]
    add_library: Callable[..., ASGIApp]


async def nothing() -> int:
    return 0


def build_asgi(make_handler: MakeHandler) -> ASGIApp:
    select = make_handler(STEPS["select"])
    handlers = {f"/{name}": make_handler(steps) for name, steps in STEPS.items()}
    handlers |= {"/nothing": nothing, "/body": select, "/background": select}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        content = str(await handlers[path]()).encode()
        headers = [(b"content-length", str(len(content)).encode())] if path != "/body" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/body":
            async for part in work.body():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            content = b""
        await send({"type": "http.response.body", "body": content})
        if path == "/background":
            await work.sleep()

    return app


def build_starlette(make_handler: MakeHandler) -> Any:
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    def route(path: str, handler: Handler, respond: Callable[[int], Response]) -> Route:
        async def endpoint(_: Request) -> Response:
            return respond(await handler())

        return Route(path, endpoint)

    def plain(answer: int) -> Response:
        return PlainTextResponse(str(answer))

    select = make_handler(STEPS["select"])
    return Starlette(
        routes=[
            route("/nothing", nothing, plain),
            *(route(f"/{name}", make_handler(steps), plain) for name, steps in STEPS.items()),
            route("/body", select, lambda _: StreamingResponse(work.body())),
            route(
                "/background",
                select,
                lambda answer: PlainTextResponse(
                    str(answer), background=BackgroundTask(work.sleep)
                ),
            ),
        ]
    )


def build_fastapi(make_handler: MakeHandler) -> Any:
    from fastapi import FastAPI, Response
    from fastapi.responses import StreamingResponse
    from starlette.background import BackgroundTask

    def responding(handler: Handler, respond: Callable[[int], Response]) -> Handler:
        @wraps(handler)  # FastAPI reads its parameters
        async def respond_to(**parameters: Any) -> Response:
            return respond(await handler(**parameters))

        return respond_to

    app = FastAPI()
    select = make_handler(STEPS["select"])
    stream = responding(select, lambda _: StreamingResponse(work.body()))
    background = responding(
        select, lambda answer: Response(str(answer), background=BackgroundTask(work.sleep))
    )
    app.add_api_route("/nothing", nothing)
    for name, steps in STEPS.items():
        app.add_api_route(f"/{name}", make_handler(steps))
    app.add_api_route("/body", stream, response_model=None)
    app.add_api_route("/background", background, response_model=None)
    return app


def add_to_asgi(app: Any, **options: Any) -> ASGIApp:
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware

    return ASGIHTTPDBSessionMiddleware(app, **options)


def add_to_starlette(app: Any, **options: Any) -> ASGIApp:
    from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware

    add_starlette_http_db_session_middleware(app, **options)
    return app  # type: ignore[no-any-return]


def add_to_fastapi(app: Any, **options: Any) -> ASGIApp:
    from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

    add_fastapi_http_db_session_middleware(app, **options)
    return app  # type: ignore[no-any-return]


FRAMEWORKS = {
    "ASGI": Framework(build_asgi, add_to_asgi),
    "Starlette": Framework(build_starlette, add_to_starlette),
    "FastAPI": Framework(build_fastapi, add_to_fastapi),
}
