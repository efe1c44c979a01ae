"""The options of the middleware: what is refused, and what is said of those that have no effect."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypedDict

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._unit.settle import is_success


class MiddlewareOptions(TypedDict, total=False):
    """The options of `ASGIHTTPDBSessionMiddleware`, without `app` and `before_commit`."""

    commit_on: Callable[[int], bool]
    attempts: int
    replay_body_limit: int


DEFAULTS: Mapping[str, Any] = {
    "before_commit": None,
    "commit_on": is_success,
    "attempts": 1,
    "replay_body_limit": 1024 * 1024,
}


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


def warn_of_ignored(options: Mapping[str, Any], outer: Mapping[str, Any], request: str) -> None:
    """Warn of what a nested middleware was given and the outer one, which decides, was not."""
    ignored = [
        name
        for name, value in options.items()
        if value != DEFAULTS[name] and value != outer.get(name, DEFAULTS[name])
    ]
    if ignored:
        logger.warning(
            "The middleware of a mounted application is inside another one, which opens and "
            "settles the context (%s): its own %s has no effect. Give it to the outer middleware, "
            "or do not add that one to the application around it.",
            request,
            ", ".join(ignored),
        )
