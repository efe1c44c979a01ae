"""The options of the middleware: what is refused, and what is said of those that have no effect."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from typing import Any, TypedDict, TypeVar

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.settle import is_success

Context = TypeVar("Context", bound=DBSessionContext)


class MiddlewareOptions(TypedDict, total=False):
    """The options of `ASGIHTTPDBSessionMiddleware`, without `app` and `before_commit`."""

    commit_on: Callable[[int], bool]
    attempts: int
    replay_body_limit: int
    read_only_methods: Collection[str]


def is_async(function: object) -> bool:
    """Return whether the call of `function` has to be awaited, as far as can be seen."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object: what is called
    )


def checked_commit_on(commit_on: Callable[[int], bool]) -> Callable[[int], bool]:
    """Return `commit_on`, which raises if it returns an awaitable: that would always be true."""
    if not callable(commit_on) or is_async(commit_on):
        raise TypeError(
            "commit_on must be a function, not an async one, that takes a status and returns a bool"
        )
    if commit_on is is_success:
        return commit_on

    def decide(status: int) -> bool:
        decision = commit_on(status)
        if inspect.isawaitable(decision):
            if inspect.iscoroutine(decision):
                decision.close()
            raise TypeError("commit_on must return a bool, and has returned an awaitable")
        return decision

    return decide


def checked_methods(methods: Collection[str], option: str = "read_only_methods") -> frozenset[str]:
    """Return `methods`, which are HTTP methods in capitals, as in the ASGI scope."""
    if (
        isinstance(methods, str)
        or not isinstance(methods, Collection)
        or not all(isinstance(method, str) and method.isupper() for method in methods)
    ):
        raise TypeError(f"{option} must be like {{'GET', 'HEAD'}}, not {methods!r}")
    return frozenset(methods)


@lru_cache
def reading(cls: type[Context], methods: frozenset[str]) -> type[Context]:
    """Return the class of the contexts of a middleware with these `read_only_methods`."""
    # An attribute of the class costs a request nothing.
    return type(cls.__name__, (cls,), {"read_only_methods": methods}) if methods else cls


def warn_of_ignored(
    options: Mapping[str, Any], outer: Mapping[str, Any], defaults: Mapping[str, Any], request: str
) -> None:
    """Warn of what a nested middleware was given and the outer one, which decides, was not."""
    if ignored := [n for n, value in options.items() if value not in (defaults[n], outer[n])]:
        logger.warning(
            "The middleware of a mounted application is inside another one, which opens and "
            "settles the context (%s): its own %s has no effect. Give it to the outer middleware, "
            "or do not add that one to the application around it.",
            request,
            ", ".join(ignored),
        )
