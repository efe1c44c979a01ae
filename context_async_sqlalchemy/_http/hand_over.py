"""Sees when the application hands over its response, inside every other middleware."""

import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from context_async_sqlalchemy._http.messages import ends_body
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send

RECIPIENT = "context_async_sqlalchemy.recipient"
"""In the scope of a request: its `Recipient`."""


class Recipient(Protocol):
    """Is told what the application does, whatever becomes of it in other middlewares."""

    def hand_over(self, start: Message, outer: BaseException | None) -> Awaitable[None] | None:
        """Take the start of the response; who called the application handles the error `outer`.

        Return what has to be done before the response goes on, if there is anything.
        """

    def end_early(self, error: BaseException | None) -> None:
        """Take it that the application has ended before its response was complete."""


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
        recipient: Recipient | None = scope.get(RECIPIENT)
        if recipient is None:
            await self.app(scope, receive, send)
            return

        outer = sys.exception()

        completed = False

        async def send_on(message: Message) -> None:
            nonlocal completed
            if message["type"] == "http.response.start":
                settling = recipient.hand_over(message, outer)
                if settling is not None:
                    await settling
            elif ends_body(message):
                completed = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except BaseException as error:
            if not completed:
                recipient.end_early(error)
            raise
        if not completed:
            recipient.end_early(None)
