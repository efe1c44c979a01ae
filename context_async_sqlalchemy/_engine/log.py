"""What is logged, without the passwords in it."""

import logging
import re

logger = logging.getLogger("context_async_sqlalchemy")

_USER = re.compile(r"://[^:@\s]*:")
# Of a URL's query, of libpq's "key = 'value'", or of ODBC's "KEY={value};". What is not closed is
# hidden to its end, not searched for again from the next place.
_SECRET = re.compile(
    r"((?:passw(?:or)?d|pwd|secret|scram_(?:client|server)_key)\s*+=\s*+)"
    r"('(?:\\.|[^'\\])*+(?:'|\\?\Z)|\{[^}]*+(?:\}|\Z)|[^&\s]*)",
    re.IGNORECASE | re.DOTALL,
)


def hide_password(text: str, password: str | None = None) -> str:
    """Replace every password in the URLs of `text`, and this one, by ***."""
    if password:
        text = text.replace(password, "***")
    return _SECRET.sub(r"\1***", "\n".join(map(_hide_in_urls, text.split("\n"))))


def _hide_in_urls(line: str) -> str:
    # To the last @: one in the password may not be percent-encoded.
    before, at, rest = line.rpartition("@")
    user = _USER.search(before) if at else None
    return f"{before[: user.end()]}***@{rest}" if user is not None else line
