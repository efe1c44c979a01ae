"""What a connect or a context is given, checked before it is used."""

import math


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called, before it is called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")


def check_host(host: str) -> str:
    """Refuse an empty host."""
    if not host:
        raise ValueError("host must not be empty")
    return host


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
