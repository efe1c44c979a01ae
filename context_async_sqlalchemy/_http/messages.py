"""What the messages of ASGI say of a response."""

from math import inf

from context_async_sqlalchemy.asgi_types import Message


def is_streamed(start: Message) -> bool:
    """Return whether the body of a response is still to be made when it starts."""
    # What has been made has a length. ASGI has the names of headers in lower case.
    if start["status"] in (204, 304):  # which have no body, and so Starlette gives them no length
        return False
    return b"content-length" not in {name for name, _ in start.get("headers", ())}


def ends_body(message: Message) -> bool:
    """Return whether a message is the last part of a body, or the whole of it."""
    # https://asgi.readthedocs.io/en/latest/extensions.html: what is a body, and what is none, such
    # as "http.response.push".
    bodies = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")
    return message["type"] in bodies and not message.get("more_body", False)


def has_no_body(start: Message) -> bool:
    """Return whether a response is complete as soon as it starts."""
    return start["status"] in (204, 304) or _length_of(start) == 0


def ends_response(start: Message, message: Message) -> bool:
    """Return whether a message is the last one of the response with this start."""
    if start.get("trailers", False):
        is_trailers = message["type"] == "http.response.trailers"
        return is_trailers and not message.get("more_trailers", False)
    return ends_body(message)


class Streamed:
    """A body that comes in parts."""

    def __init__(self, start: Message) -> None:
        self._left = _length_of(start)  # bytes
        self.kept: list[Message] = []

    def keeps(self, message: Message) -> bool:
        """Keep a part if with it, or before, a client has as many bytes as were announced."""
        self._left -= len(message.get("body", b""))
        if self._left <= 0:
            self.kept.append(message)
        return self._left <= 0


def _length_of(start: Message) -> float:
    lengths = [value for name, value in start.get("headers", ()) if name == b"content-length"]
    return int(lengths[0]) if lengths else inf
