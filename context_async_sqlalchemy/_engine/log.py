"""What is logged, without the passwords in it."""

import logging
import re

logger = logging.getLogger("context_async_sqlalchemy")

_IN_URL = re.compile(r"(://[^:@\s]*):.*@")
# Of a URL's query, or of libpq's "key = 'value'".
_IN_QUERY = re.compile(r"(password\s*=\s*)('(?:\\.|[^'\\])*'|[^&\s]*)", re.IGNORECASE)


def hide_password(text: str, password: str | None = None) -> str:
    """Replace every password in the URLs of `text`, and this one, by ***."""
    if password:
        text = text.replace(password, "***")
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1:***@", text))
