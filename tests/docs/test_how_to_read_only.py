"""The program of the page on read-only requests."""

from collections.abc import Callable
from typing import Any

from tests.helpers.serving import http_client


async def test_a_get_reads_what_a_post_has_written(
    load: Callable[[str, str], Any], url: str
) -> None:
    program = load("read_only_requests", url)
    async with http_client(program.app) as client:
        assert (await client.post("/visits/home")).status_code == 201
        assert (await client.get("/visits")).json() == ["home"]
