"""Run the queue worker until it is stopped."""

import asyncio

from examples.worker.queue import work

if __name__ == "__main__":
    asyncio.run(work())
