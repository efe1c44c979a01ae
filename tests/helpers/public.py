"""The public names of a module."""

from __future__ import annotations

from typing import Any


def public_names(module: Any) -> list[str]:
    """Return what a module has in `__all__`, or else the functions and classes that are its own."""
    own = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return getattr(module, "__all__", own)
