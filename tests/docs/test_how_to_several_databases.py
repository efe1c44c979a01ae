"""The program of the how-to page on several databases, run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.helpers.connections import connections_out
from tests.helpers.programs import Outside
from tests.helpers.serving import http_client


@pytest_asyncio.fixture
async def shop(
    url: str,
    load: Callable[[str, str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncGenerator[Any]:
    """Return the program of the shop and its ledger, served, with a client in it."""
    ledger_url = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}"
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    shop = load("several_databases", url)
    shop.outside = Outside(url), Outside(ledger_url)
    async with http_client(shop.app) as shop.client:
        await shop.client.get("/openapi.json")  # once it answers, there are tables
        yield shop
        assert connections_out(shop.shop) == connections_out(shop.ledger) == 0


async def numbers(shop: Any) -> tuple[Any, Any]:
    """Return the numbers of the orders, and of their entries in the ledger."""
    in_shop, in_ledger = shop.outside
    return (
        await in_shop.rows("SELECT number FROM shop_order ORDER BY number"),
        await in_ledger.rows("SELECT number FROM entry ORDER BY number"),
    )


async def test_two_databases_are_committed_in_the_order_in_which_they_were_asked_for(
    shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="root")
    assert (await shop.client.post("/orders/1/sales")).status_code == 201
    assert await numbers(shop) == ([1], [1])
    names = [connect.engine.url.database for connect in (shop.shop, shop.ledger)]
    assert [record.getMessage() for record in caplog.records if record.name == "root"] == [
        *(f"about to commit {name}" for name in names),
        "order 1 is placed",
        "order 1 is booked",
    ]


async def test_what_a_flush_finds_undoes_both(shop: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="root")
    await shop.outside[1].rows("INSERT INTO entry VALUES (1, 'sales') RETURNING number")
    assert (await shop.client.post("/orders/1/sales")).status_code == 500
    assert await numbers(shop) == ([], [1])
    assert "order 1" not in caplog.text


async def test_when_the_second_commit_fails_the_first_stays_and_the_error_says_so(
    shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="root")
    assert (await shop.client.post("/orders/1/nowhere")).status_code == 500
    assert await numbers(shop) == ([1], [])
    assert "order 1 is placed" in caplog.text
    assert "order 1 is booked" not in caplog.text
    note = f"Already committed when this happened: {shop.shop.engine.url.host or ''}/"
    assert f"{note}{shop.shop.engine.url.database}" in caplog.text


async def test_an_order_that_is_booked_later_is_booked_once(shop: Any) -> None:
    for number in 1, 2:
        response = await shop.client.post(f"/later/orders/{number}/sales")
        assert response.status_code == 201
    assert await numbers(shop) == ([1, 2], [])
    # As after a crash between the two commits:
    await shop.outside[1].rows("INSERT INTO entry VALUES (1, 'sales') RETURNING number")
    assert await shop.book() == []
    assert await numbers(shop) == ([1, 2], [1, 2])
    assert await shop.outside[0].rows("SELECT number FROM unbooked_order") == []
    assert await shop.book() == []


async def test_an_order_that_cannot_be_booked_is_not_lost_and_keeps_no_other_back(
    shop: Any,
) -> None:
    assert (await shop.client.post("/later/orders/1/nowhere")).status_code == 201
    assert (await shop.client.post("/later/orders/2/sales")).status_code == 201
    assert await shop.book() == [1]
    assert await numbers(shop) == ([1, 2], [2])
    assert await shop.outside[0].rows("SELECT number FROM unbooked_order") == [1]
