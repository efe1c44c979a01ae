"""Keeping passwords out of what is shown."""

from __future__ import annotations

import re

from sqlalchemy.ext.asyncio import AsyncEngine

_IN_URL = re.compile(r"(://[^:@\s]*):.*@")
# Of a URL's query, or of libpq's "key = 'value'".
_IN_QUERY = re.compile(r"(password\s*=\s*)('(?:\\.|[^'\\])*'|[^&\s]*)", re.IGNORECASE)


def hide_password(text: str, engine: AsyncEngine | None = None) -> str:
    """Replace every password in the URLs of `text`, and that of `engine`, by ***."""
    password = getattr(getattr(engine, "url", None), "password", None)
    if isinstance(password, str) and password:
        text = text.replace(password, "***")
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1:***@", text))
