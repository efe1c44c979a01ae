"""What the messages of ASGI say of a response."""

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
