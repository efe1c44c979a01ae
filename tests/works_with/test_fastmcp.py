"""FastMCP: each call of a tool has a session of its own, over HTTP."""

from __future__ import annotations

import asyncio

import pytest

from tests.helpers.connections import connections_out
from tests.works_with.conftest import Serve

FACTS = "SELECT text FROM works_with_fact ORDER BY text"


async def test_a_call_of_a_tool_is_committed_or_rolled_back_before_it_is_answered(
    serve_program: Serve,
) -> None:
    # Not imported by every process that collects the tests: it takes a second.
    why = "asks for newer versions than tests/oldest.txt has"
    fastmcp = pytest.importorskip("fastmcp", reason=why)
    async with (
        serve_program("works_with.tools") as program,
        fastmcp.Client(f"{program.client.base_url}/mcp") as client,
    ):
        for facts, is_error in (["a"], False), (["b", ""], True), (["c", "a"], True):
            result = await client.call_tool("learn", {"facts": facts}, raise_on_error=False)
            assert result.is_error is is_error
            assert await program.outside.rows(FACTS) == ["a"]
            assert connections_out(program.connect) == 0
        calls = [[str(n), "" if n % 2 else f"{n} again"] for n in range(10)]
        learn = (client.call_tool("learn", {"facts": f}, raise_on_error=False) for f in calls)
        results = await asyncio.gather(*learn)
        assert [result.is_error for result in results] == 5 * [False, True]
        learned = sorted(fact for call in calls[::2] for fact in call)
        assert await program.outside.rows(FACTS) == [*learned, "a"]
