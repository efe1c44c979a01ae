"""Sees when the application hands over its response, inside every other middleware."""

import sys
from collections.abc import Callable
from typing import Any

from context_async_sqlalchemy._http.messages import ends_body, is_streamed
from context_async_sqlalchemy._http.send import SCOPE_KEY, RequestContext
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send


def see_hand_over(app: object) -> None:
    """Put a `HandOver` around the application that is inside the middlewares of `app`, if needed.

    So for what a router of Starlette leads to: mounted applications, and routes with middlewares.
    """
    layer: Any = None
    inner: Any = app
    routes: list[Any] = []
    passes_on = True
    while (inside := _inside(inner)) is not None:
        layer, inner = inner, inside
        routes += vars(layer).get("routes", ())
        passes_on = passes_on and _passes_on(layer, inner)
    if layer is not None and not isinstance(inner, HandOver):
        if not passes_on:
            setattr(layer, "app" if "app" in vars(layer) else "middleware_stack", HandOver(inner))
        for route in routes:
            see_hand_over(getattr(route, "app", None))


def _passes_on(layer: object, inner: object) -> bool:
    """Return whether a layer is known to pass on each message at once, in the same task."""
    is_router = getattr(inner, "__self__", None) is layer  # that has no middlewares
    return is_router or f"{type(layer).__module__}.{type(layer).__qualname__}" in _PASSING_ON


# All that most applications have inside the middleware. They are spared the `HandOver`.
_PASSING_ON = {
    "fastapi.middleware.asyncexitstack.AsyncExitStackMiddleware",
    "starlette.middleware.exceptions.ExceptionMiddleware",
}


def _inside(layer: Any) -> Callable[..., Any] | None:
    # Where middlewares keep what they go around; not by getattr(), to which a mock has an answer.
    attributes = getattr(layer, "__dict__", {})
    if hasattr(type(layer), "build_middleware_stack") and layer.middleware_stack is None:
        # As an application of Starlette's does itself, for its first request.
        layer.middleware_stack = layer.build_middleware_stack()
    inner = attributes.get("app") or attributes.get("middleware_stack")
    return inner if callable(inner) else None


class HandOver:
    """Goes around the application itself, inside every middleware.

    Other middlewares hold the start of a response back, or pass it on in another task: meanwhile
    its body has begun. And for Starlette's BaseHTTPMiddleware, a body that raises is one that ends.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext | None = scope.get(SCOPE_KEY)
        if context is None:
            await self.app(scope, receive, send)
            return
        outer, completed = sys.exception(), False

        async def send_on(message: Message) -> None:
            nonlocal completed
            if message["type"] == "http.response.start":
                if context.handed_over is None:
                    await _hand_over(context, message, outer)
            elif ends_body(message):
                completed = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except BaseException as error:
            if not completed:
                if context.handed_over is None:
                    context.answered = error
                elif isinstance(error, Exception):  # or else somebody has no more use for it
                    context.error = error
            raise
        if not completed:
            context.is_cut_off = context.handed_over is not None  # as when the client has left


async def _hand_over(context: RequestContext, start: Message, outer: BaseException | None) -> None:
    """Take the start of a response from the application itself.

    Who called it handles the error `outer`. What it did is settled now if the body is still to be
    made: that may begin before the response starts, and has a transaction of its own.
    """
    context.handed_over = start["status"]
    if context.answered is not None or sys.exception() is not None:
        context.outer = (*context.outer, outer)
        context.answered = context.handled_error()
    if context.is_settled():
        context.was_settled = True
    elif is_streamed(start) and not context.settles_late:
        if (settling := context.settle_by(start)) is not None:
            await settling
        context.was_settled = not context.in_transaction()
