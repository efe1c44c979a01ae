"""What the middleware costs a request that never asks for a session.

The same Starlette application, with and without the middleware, called in process; interleaved
rounds in one run, reported as the ratio of their CPU time.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware

ROUNDS = 40
REQUESTS = 2_000


def make_app() -> Starlette:
    async def hello(_: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    return Starlette(routes=[Route("/", hello)])


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b""}


async def send(_: object) -> None: ...


async def measure(app: Any) -> float:
    """Return the CPU time of a request, in microseconds."""
    start = time.process_time()
    for _ in range(REQUESTS):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/",
            "headers": [],
            "query_string": b"",
        }
        await app(scope, receive, send)
    return (time.process_time() - start) / REQUESTS * 1e6


async def main() -> None:
    bare, with_middleware = make_app(), make_app()
    add_starlette_http_db_session_middleware(with_middleware)
    rounds = []
    for number in range(ROUNDS + 1):
        # Each goes first in every other round.
        order = [bare, with_middleware] if number % 2 else [with_middleware, bare]
        times = {app: await measure(app) for app in order}
        rounds.append((times[bare], times[with_middleware]))
    rounds = rounds[1:]  # the first one warms up
    ratios = sorted(b / a for a, b in rounds)
    low, median, high = ratios[ROUNDS // 4], statistics.median(ratios), ratios[-ROUNDS // 4]
    print(f"bare Starlette    {statistics.median(a for a, _ in rounds):6.1f} µs of CPU a request")
    print(f"with middleware   {statistics.median(b for _, b in rounds):6.1f} µs of CPU a request")
    print(f"ratio             {median:6.2f}   (middle half of the rounds: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    asyncio.run(main())
