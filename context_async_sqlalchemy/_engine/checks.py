"""What a connect or a context is given, checked before it is used."""

import math
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import sessionmaker


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called, before it is called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")


def check_host(host: str) -> str:
    """Refuse an empty host."""
    if not host:
        raise ValueError("host must not be empty")
    return host


def check_engine(engine: Any) -> AsyncEngine:
    """Refuse what an engine_creator must not return."""
    if isinstance(engine, Engine) or not hasattr(engine, "dispose"):
        raise TypeError(
            f"engine_creator must return an AsyncEngine, not {type(engine).__name__}: "
            "make it with create_async_engine()"
        )
    return engine  # type: ignore[no-any-return]  # duck-typed: users' tests pass mocks


def check_session_maker(session_maker: Any) -> async_sessionmaker[Any]:
    """Refuse what a session_maker_creator must not return."""
    if isinstance(session_maker, sessionmaker) or not callable(session_maker):
        raise TypeError(
            "session_maker_creator must return an async_sessionmaker, "
            f"not {type(session_maker).__name__}"
        )
    return session_maker  # type: ignore[no-any-return]  # duck-typed, too


def check_threshold(threshold: float | None) -> None:
    """Refuse a `leak_detection_threshold` that nothing, or everything, would exceed."""
    if threshold is not None and not (
        isinstance(threshold, int | float) and 0 < threshold < math.inf
    ):
        raise ValueError(
            "leak_detection_threshold must be a positive number of seconds, or None for no "
            f"leak detection, not {threshold!r}"
        )


def check_before_commit(before_commit: object) -> None:
    """Refuse what cannot be called before a commit, such as a connect, before there is one."""
    if before_commit is not None and not callable(before_commit):
        raise TypeError(
            "before_commit must be a function that takes a session, or None, not "
            f"{type(before_commit).__name__}. A context needs no connect: call "
            "'await db_session(connect)' in it."
        )
