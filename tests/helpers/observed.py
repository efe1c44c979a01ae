"""Those who watch every engine, forgotten at the end of a test: a process watches until it ends."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from context_async_sqlalchemy._engine import observed


@contextmanager
def forgetting_observers() -> Generator[None]:
    """Let nobody who has called `observe_everywhere` in a block be told after it."""
    before = observed._everywhere
    try:
        yield
    finally:
        observed._everywhere = before
