"""Where the error of a duplicate comes, and what clients are told."""

import pytest
from sqlalchemy.exc import IntegrityError
from starlette.testclient import TestClient

from context_async_sqlalchemy import db_session

from . import services
from .conftest import DUNE
from .database import connect
from .models import Book
from .test_library import LOAN


def test_a_duplicate_is_told_by_its_name(client: TestClient) -> None:
    response = client.post("/books", json=DUNE)
    assert response.status_code == 409
    detail = "book 9780441013593 is there already"
    assert response.json() == {"detail": detail}


def test_a_book_is_lent_to_one_reader_and_counted_once(
    client: TestClient,
) -> None:
    assert client.post(LOAN, params={"reader": "ann"}).status_code == 201
    response = client.post(LOAN, params={"reader": "bob"})
    assert response.status_code == 409
    assert response.json() == {"detail": "conflict"}
    assert client.get("/books").json() == [{**DUNE, "times_lent": 1}]


async def add_and_hope(isbn: str, title: str) -> None:
    session = await db_session(connect)
    try:
        session.add(Book(isbn=isbn, title=title))
    except IntegrityError:  # never: nothing is sent yet
        raise services.AlreadyThereError(isbn) from None


def test_a_try_around_add_catches_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "add_book", add_and_hope)
    response = client.post("/books", json=DUNE)
    # The error of the commit, which the handler of IntegrityError answers.
    assert response.json() == {"detail": "conflict"}
