"""Names for what tests make on a server that other runs of them may use at the same time."""

from __future__ import annotations

import secrets


def unique_name(prefix: str) -> str:
    """Return a name that nothing on the server has, so that nothing has to be dropped first."""
    # Not of `random`: pytest-randomly seeds that, perhaps two runs with the same number.
    return f"{prefix}_{secrets.token_hex(8)}"
