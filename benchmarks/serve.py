"""Serve a contender with uvicorn, in its own process, until its standard input is closed.

    BENCH_SERVED_URL=postgresql+asyncpg://… python -m benchmarks.serve "FastAPI: this library" 10

The second argument is the size of the pool. Prints the port as soon as it listens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import uvicorn

from benchmarks.contenders import BY_KEY


async def main(key: str, pool_size: int) -> None:
    url = os.environ["BENCH_SERVED_URL"]
    async with BY_KEY[key].open_app(url, pool_size=pool_size, max_overflow=0) as app:
        config = uvicorn.Config(
            app,
            port=0,
            loop="asyncio",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    logging.disable()  # the clients report what is wrong
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
