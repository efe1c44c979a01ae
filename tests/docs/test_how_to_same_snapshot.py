"""The program of the section on one snapshot, served while somebody writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.helpers.connections import connections_out
from tests.helpers.serving import http_client


async def test_a_report_agrees_with_itself_while_others_write(
    postgresql: str, load: Callable[[str, str], Any]
) -> None:
    program = load("same_snapshot", postgresql)
    async with http_client(program.app) as client:
        assert (await client.get("/report")).json() == [0, {}]

        async def sell() -> None:
            for number in range(20):
                article = ("tea", "milk")[number % 2]
                assert (await client.post(f"/sales/{article}?cents=10")).status_code == 201

        async def read() -> None:
            while not selling.done():
                total, by_article = (await client.get("/report")).json()
                assert total == sum(by_article.values())

        selling = asyncio.create_task(sell())
        # More clients than the pool has room for.
        await asyncio.gather(*(read() for _ in range(9)), selling)
        assert (await client.get("/report")).json() == [200, {"tea": 100, "milk": 100}]
        assert connections_out(program.connect) == 0
