"""A client that keeps a server busy, in its own process.

    python -m benchmarks.client '{"port": 8000, "path": "/insert", "clients": 8, "seconds": 2}'

Each client has one connection, and sends a request when the last one has been answered. It speaks
just enough HTTP, and takes about a sixth of the CPU time of a server with this library.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import sys
import time
from typing import Any

WARM_UP = 0.2  # seconds
DISTURBERS = 50


async def request_again_and_again(
    port: int, path: str, finished: list[tuple[float, float]]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    try:
        while True:
            start = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError(head)
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            finished.append((start, time.perf_counter()))
    finally:
        writer.transport.abort()


async def read_slowly(port: int, path: str) -> None:
    """Send one request, and read the response like a client with a bad connection."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        # A small buffer: whatever fits into the system's is taken without the client reading it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while await loop.sock_recv(connection, 8_192):
            await asyncio.sleep(0.2)


async def main(
    port: int,
    path: str,
    clients: int,
    seconds: float,
    disturbing: str | None = None,
    settling: float = 1.0,
) -> dict[str, Any]:
    """Return how many requests per second were answered, and how fast, after a warm-up.

    With a `disturbing` path, 50 others request it first, and hold what they take after `settling`
    seconds.
    """
    finished: list[tuple[float, float]] = []
    tasks: list[asyncio.Task[None]] = []
    if disturbing is not None:
        tasks += [asyncio.create_task(read_slowly(port, disturbing)) for _ in range(DISTURBERS)]
        await asyncio.sleep(settling)
    start = time.perf_counter() + WARM_UP
    tasks += [
        asyncio.create_task(request_again_and_again(port, path, finished)) for _ in range(clients)
    ]
    await asyncio.wait(tasks, timeout=WARM_UP + seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    failures = [
        error
        for error in await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(error, Exception)
    ]
    latencies = [(end - begin) * 1e3 for begin, end in finished if start <= end <= start + seconds]
    if len(latencies) > 1:
        quantiles = statistics.quantiles(latencies, n=100)
    else:
        quantiles = (latencies or [0.0]) * 99  # before Python 3.13, one value has no quantiles
    return {
        "throughput": len(latencies) / seconds,
        "p50": quantiles[49],
        "p99": quantiles[98],
        "failures": [repr(failure) for failure in failures],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(**json.loads(sys.argv[1])))))
