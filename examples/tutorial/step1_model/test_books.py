"""A book that was added is listed."""

from starlette.testclient import TestClient

DUNE = {"isbn": "9780441013593", "title": "Dune"}


def test_a_book_that_was_added_is_listed(shared_client: TestClient) -> None:
    assert shared_client.post("/books", json=DUNE).status_code == 201
    assert shared_client.get("/books").json() == [DUNE]


def test_each_test_begins_without_books(shared_client: TestClient) -> None:
    assert shared_client.get("/books").json() == []
