"""A rehearsal of BEGIN with a first statement, without a server: does asyncpg play its part?"""

import asyncio
import struct
from collections.abc import Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any


def can_fly(cls: Any) -> bool:
    """Return whether a protocol of this class works as `begin_in_flight` needs it."""
    from asyncpg import Record  # the engine's driver, so it is there

    loop, stage = asyncio.get_running_loop(), _Stage()
    user = SimpleNamespace(user="", password="", database="", server_settings=None)
    protocol = cls(("", 0), loop.create_future(), user, Record, loop)
    protocol.wire = stage
    protocol.connection_made(stage)
    protocol.data_received(message(b"R", bytes(4)) + message(b"Z", b"I"))

    def play(operation: Coroutine[Any, Any, Any], answers: bytes = b"") -> Any:
        stage.sent = b""
        try:
            operation.send(None)
            protocol.data_received(answers)
            operation.send(None)
        except StopIteration as end:
            return end.value

    described = message(b"1") + message(b"t", bytes(2)) + message(b"n")
    state = play(protocol.prepare("s", "", _TIMEOUT, record_class=Record), described)
    waits = play(protocol.query("BEGIN;", _TIMEOUT)) == "BEGIN"

    with suppress(Exception):
        play(protocol.bind_execute(state, ("too many",), "", 0, True, _TIMEOUT))
    waits = waits and (stage.sent, protocol.begin) == (b"", "BEGIN;")

    begun = message(b"1") + message(b"2") + message(b"C", b"BEGIN\0")
    done = message(b"2") + message(b"C", b"SELECT 0\0") + message(b"Z", b"T")
    answer = play(protocol.bind_execute(state, (), "", 0, True, _TIMEOUT), begun + done)
    flies = answer[:2] == ([], b"SELECT 0") and _kinds(stage.sent) == "PBEBES"
    return waits and flies and not protocol.begin and protocol.is_in_transaction()


def message(kind: bytes, body: bytes = b"") -> bytes:
    """Return a message of the wire protocol."""
    return kind + struct.pack("!I", len(body) + 4) + body


_TIMEOUT = 60.0


class _Stage:
    """A transport that leads nowhere."""

    sent = b""

    def write(self, data: bytes) -> None:
        self.sent += bytes(data)

    def get_extra_info(self, _: str, default: object = None) -> object:
        return default

    def abort(self) -> None:
        """Be what a transport has to be."""


def _kinds(messages: bytes) -> str:
    kinds = ""
    while messages:
        kinds += chr(messages[0])
        messages = messages[1 + struct.unpack("!I", messages[1:5])[0] :]
    return kinds
