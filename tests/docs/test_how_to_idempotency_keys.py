"""The program of the page on idempotency keys, run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest_asyncio

from tests.helpers.programs import Outside
from tests.helpers.serving import serve


@pytest_asyncio.fixture
async def payments(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program, served."""
    payments = load("idempotency_keys", url)
    payments.outside = Outside(url)
    async with serve(payments.app, lifespan="on") as payments.port:
        yield payments


class Unreliable(httpx.AsyncHTTPTransport):
    """Loses the answer to some requests."""

    lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if self.lost:
            self.lost -= 1
            await response.aclose()
            raise httpx.ReadError("lost")
        return response


async def test_a_client_that_gets_no_answer_pays_once(payments: Any, no_pauses: None) -> None:
    transport = Unreliable()
    base_url = f"http://127.0.0.1:{payments.port}"
    async with httpx.AsyncClient(transport=transport, base_url=base_url, timeout=30) as client:
        transport.lost = 2
        first = await payments.send_payment(client, 5)
        second = await payments.send_payment(client, 5)
        assert first != second
        assert list(await payments.outside.rows("SELECT amount FROM payment")) == [5, 5]

        headers = {"idempotency-key": "1", "authorization": "Bearer ann"}
        sent = [client.post("/payments?amount=7", headers=headers) for _ in range(5)]
        assert len({(await answer).text for answer in asyncio.as_completed(sent)}) == 1
        bob = headers | {"authorization": "Bearer bob"}
        assert (await client.post("/payments?amount=8", headers=bob)).status_code == 201
        assert (await client.post("/payments?amount=8", headers=headers)).status_code == 422
        assert (await client.post("/payments?amount=8")).status_code == 400
    amounts = await payments.outside.rows("SELECT amount FROM payment ORDER BY id")
    assert list(amounts) == [5, 5, 7, 8]
    assert await payments.outside.rows("SELECT count(*) FROM idempotency_key") == [4]
