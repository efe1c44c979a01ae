"""What a new connection costs, compared with one from the pool."""

import asyncio
import os
import statistics
import time

from sqlalchemy import NullPool

from context_async_sqlalchemy import DBConnect

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)
connect = DBConnect.from_url(
    DATABASE_URL,
    pool_pre_ping=True,
    ping_after_idle=5,
    pool_recycle=1800,
    idle_timeout=float(os.environ.get("IDLE_TIMEOUT", "300")),
    min_idle=1,
)
without_pool = DBConnect.from_url(DATABASE_URL, poolclass=NullPool)


async def main() -> None:
    async with connect, without_pool:
        print(f"a pooled connection: {await milliseconds(connect):.2f} ms")
        print(f"a new connection: {await milliseconds(without_pool):.2f} ms")


async def milliseconds(connect: DBConnect) -> float:
    await connect.wait_until_ready()
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        await connect.ping()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


if __name__ == "__main__":
    asyncio.run(main())
