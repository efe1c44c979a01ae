"""The library over HTTP, each test in a transaction that is rolled back."""

import httpx
import pytest

from .conftest import DUNE

LOAN = f"/books/{DUNE}/loan"

pytestmark = pytest.mark.usefixtures("book")


async def test_a_book_is_lent_and_taken_back(client: httpx.AsyncClient) -> None:
    response = await client.post(LOAN, params={"reader": "ann"})
    assert response.status_code == 201
    assert (await client.delete(LOAN)).status_code == 204
    [book] = (await client.get("/books")).json()
    assert book == {"isbn": DUNE, "title": "Dune", "times_lent": 1}


async def test_a_book_that_is_not_there_is_not_lent(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/books/1/loan", params={"reader": "ann"})
    assert response.status_code == 404
    assert response.json() == {"detail": "no book 1"}


async def test_a_book_that_is_not_lent_is_not_taken_back(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.delete(LOAN)).status_code == 404
