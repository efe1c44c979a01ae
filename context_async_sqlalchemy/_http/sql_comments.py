"""A comment in each statement, which says whose it is: https://google.github.io/sqlcommenter/spec/."""

import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

from context_async_sqlalchemy.asgi_types import Scope


def checked_keys(keys: Collection[str]) -> frozenset[str]:
    """Return what a comment is to have, if it can have it."""
    if isinstance(keys, str) or not isinstance(keys, Collection) or {*keys} - _READ.keys():
        raise ValueError(f"sql_comments must be some of {sorted(_READ)}, not {keys!r}")
    return frozenset(keys)


def with_comment(statement: str, keys: Collection[str], scope: Scope, is_formatted: bool) -> str:
    """Return a statement with a comment of these keys at its end, unless it has a comment."""
    values = {key: value for key in keys if (value := _READ[key](scope))}
    if not values or "/*" in statement or "--" in statement:
        return statement
    # In a statement that the driver formats, a % begins a parameter.
    comment = _comment(values).replace("%", "%%" if is_formatted else "%")
    text = statement.rstrip()
    semicolon = ";" if text.endswith(";") else ""
    return f"{text.removesuffix(';')} {comment}{semicolon}"


def _comment(values: Mapping[str, str]) -> str:
    # Encoded, a value can end neither its quotes nor the comment.
    pairs = (f"{key}='{quote(value, safe='')}'" for key, value in sorted(values.items()))
    return f"/*{','.join(pairs)}*/"


def route_of(scope: Scope) -> str:
    """Return the template of the path, such as "/users/{id}", or "" if it is not known."""
    # Never the path itself, of which there are as many as there are users.
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else ""


def _traceparent_of(scope: Scope) -> str:
    """Return the trace of the request, if it is sampled: only then somebody looks for it."""
    header = _of_span() or next(
        (v.decode("latin-1") for k, v in scope.get("headers", ()) if k == b"traceparent"), ""
    )
    found = _TRACEPARENT.fullmatch(header)  # the client chooses it
    return header if found is not None and int(found[1], 16) & 1 else ""


def _of_span() -> str:
    try:
        from opentelemetry.trace import get_current_span
    except ImportError:
        return ""
    span: Any = get_current_span().get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


_TRACEPARENT = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})")
_READ = {"route": route_of, "traceparent": _traceparent_of}
