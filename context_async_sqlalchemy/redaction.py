"""Keeping passwords out of what is shown."""

from __future__ import annotations

import re

from sqlalchemy.ext.asyncio import AsyncEngine

_IN_URL = re.compile(r"(://[^:@\s]*):.*@")
_IN_QUERY = re.compile(r"(password=)[^&\s]*")


def hide_password(text: str, engine: AsyncEngine | None = None) -> str:
    """Replace by *** the passwords of URLs in `text`, and that of `engine`."""
    password = getattr(getattr(engine, "url", None), "password", None)
    if isinstance(password, str) and password:
        text = text.replace(password, "***")
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1:***@", text))
