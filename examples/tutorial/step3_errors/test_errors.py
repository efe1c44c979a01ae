"""Where the error of a duplicate comes, and what clients are told."""

import httpx
import pytest
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import db_session

from . import services
from .conftest import DUNE
from .database import connect
from .models import Book
from .test_library import LOAN

pytestmark = pytest.mark.usefixtures("book")
DUPLICATE = {"isbn": DUNE, "title": "Dune Messiah"}


async def test_a_duplicate_is_told_by_its_name(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/books", json=DUPLICATE)
    assert response.status_code == 409
    assert response.json() == {"detail": f"book {DUNE} is there already"}


async def test_a_book_is_lent_to_one_reader_and_counted_once(
    client: httpx.AsyncClient,
) -> None:
    await client.post(LOAN, params={"reader": "ann"})
    response = await client.post(LOAN, params={"reader": "bob"})
    assert response.status_code == 409
    assert response.json() == {"detail": "conflict"}
    [book] = (await client.get("/books")).json()
    assert book["times_lent"] == 1


async def add_and_hope(isbn: str, title: str) -> None:
    session = await db_session(connect)
    try:
        session.add(Book(isbn=isbn, title=title))
    except IntegrityError:  # never: nothing is sent yet
        raise services.AlreadyThereError(isbn) from None


async def test_a_try_around_add_catches_nothing(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "add_book", add_and_hope)
    response = await client.post("/books", json=DUPLICATE)
    # The error of the commit, which the handler of IntegrityError answers.
    assert response.json() == {"detail": "conflict"}
