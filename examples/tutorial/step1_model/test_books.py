"""A book that was added is listed."""

import httpx

DUNE = {"isbn": "9780441013593", "title": "Dune"}


async def test_a_book_that_was_added_is_listed(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.post("/books", json=DUNE)).status_code == 201
    assert (await client.get("/books")).json() == [DUNE]


async def test_each_test_begins_without_books(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.get("/books")).json() == []
