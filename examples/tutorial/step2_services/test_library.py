"""The library over HTTP, each test in a transaction that is rolled back."""

from starlette.testclient import TestClient

from .conftest import DUNE

LOAN = "/books/9780441013593/loan"


def test_a_book_is_lent_and_taken_back(client: TestClient) -> None:
    assert client.post(LOAN, params={"reader": "ann"}).status_code == 201
    assert client.delete(LOAN).status_code == 204
    assert client.get("/books").json() == [{**DUNE, "times_lent": 1}]


def test_a_book_that_is_not_there_is_not_lent(client: TestClient) -> None:
    response = client.post("/books/1/loan", params={"reader": "ann"})
    assert response.status_code == 404
    assert response.json() == {"detail": "no book 1"}


def test_a_book_that_is_not_lent_is_not_taken_back(client: TestClient) -> None:
    assert client.delete(LOAN).status_code == 404
