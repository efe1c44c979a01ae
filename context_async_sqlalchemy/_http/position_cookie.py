"""The cookie of a client that has written: up to where a replica must have replayed for it."""

import hmac
import time
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

UNKNOWN = 2**64 - 1
"""The position that no replica reaches."""

_LONGEST = 120  # characters of a value: two numbers, and a signature


class PositionCookie(NamedTuple):
    """How the cookie is made: signed and dated, so that no client chooses whom to wait for."""

    secret: bytes
    name: str
    max_age: int  # seconds
    secure: bool

    def header(self, position: int) -> tuple[bytes, bytes]:
        """Return the header of a response that gives a client a position."""
        content = f"{position:x}.{int(time.time()) + self.max_age:x}"
        attributes = f"Max-Age={self.max_age}; Path=/; HttpOnly; SameSite=Lax"
        if self.secure:
            attributes += "; Secure"
        value = f"{self.name}={content}.{self._signature(content)}; {attributes}"
        return b"set-cookie", value.encode()

    def position(self, headers: Iterable[tuple[bytes, bytes]]) -> int:
        """Return the position that a request has; 0 if it has none that counts."""
        start = f"{self.name}=".encode()
        return max(
            (
                self._checked(pair.strip()[len(start) :])
                for name, value in headers
                if name == b"cookie" and start in value
                for pair in value.split(b";")
                if pair.strip().startswith(start)
            ),
            default=0,
        )

    def _checked(self, value: bytes) -> int:
        content, _, signature = value.decode("latin-1").rpartition(".")
        if len(value) > _LONGEST or not hmac.compare_digest(
            self._signature(content).encode(), signature.encode()
        ):
            return 0
        position, _, expires = content.partition(".")
        return int(position, 16) if int(expires, 16) > time.time() else 0

    def _signature(self, content: str) -> str:
        # With its name, under which alone it counts: another database has other positions.
        signed = f"context_async_sqlalchemy position {self.name}={content}"
        return hmac.new(self.secret, signed.encode(), sha256).hexdigest()
