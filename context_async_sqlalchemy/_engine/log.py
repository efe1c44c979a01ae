"""What is logged, without the passwords in it, and each message in a line of its own."""

import logging
import re
from urllib.parse import quote

logger = logging.getLogger("context_async_sqlalchemy")


def show_control_characters(record: logging.LogRecord) -> bool:
    """Escape in a message, as `repr` does, what would begin a line or drive a terminal."""
    # An error quotes what a client has sent, and HTTP/2 lets a client choose even the method.
    text = record.getMessage()
    if not text.isprintable():
        escapes = {ord(c): repr(c)[1:-1] for c in set(text) if not c.isprintable()}
        record.msg, record.args = text.translate(escapes), ()
    return True


logger.addFilter(show_control_characters)


# A text may quote what a client has sent, megabytes of it.
_LONGEST = 10_000

# What stands after password=, 'password': or PWD=, in quotes, braces (ODBC) or neither; of what is
# not closed, all. No part can be matched in two ways, so that each character is read once.
_SECRET = re.compile(
    r"""(?:passw(?:or)?d|passphrase|pwd|secret|scram_(?:client|server)_key)\w{0,20}+['"]?+\s*+
    (?:[=:,]?+\s*+(?:Secret\w{0,9}+\()?+[bru]{0,2}+
        (?P<quoted>'(?:\\.|''|[^'\\])*+(?:'|\\?\Z)|"(?:\\.|[^"\\])*+(?:"|\\?\Z))
    |=\s*+(?P<braced>\{(?:\}\}|[^}])*+(?:\}|\Z))
    |[=:]\s*+(?!(?:YES|NO)\))(?P<bare>[^&\s]++))  # "using password: YES", MySQL says
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)


def hide_password(text: str, password: str | None = None) -> str:
    """Replace what may be a password in `text`, and this one, by ***; cut what is too long.

    Between a user's colon and the last @ of the text, everything may be one: who has written a
    password may have left in it an @, a slash, a blank or the end of a line.
    """
    spans = [_span_in_url(text)]
    spans += [match.span(match.lastgroup or 0) for match in _SECRET.finditer(text, 0, _LONGEST)]
    for known in {password, quote(password, safe=""), repr(password)[1:-1]} if password else ():
        end = _LONGEST + len(known)  # of which a part may be before the cut
        spans += [match.span() for match in re.finditer(re.escape(known), text[:end])]
    shown, last = "", 0
    for start, end in sorted(spans):
        if end > last and start < _LONGEST:
            shown += text[last:start] + "***" if start >= last else ""
            last = end
    shown += text[last:_LONGEST]
    return shown if len(text) <= _LONGEST else f"{shown}… ({len(text)} characters)"


def _span_in_url(text: str) -> tuple[int, int]:
    at = text.rfind("@")
    colon = text.find(":", 0, max(at, 0))
    if text.startswith("://", colon):
        colon = text.find(":", colon + 3, at)
    return (colon + 1, at) if colon >= 0 else (0, 0)
