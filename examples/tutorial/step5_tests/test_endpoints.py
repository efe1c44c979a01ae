"""The endpoints: what clients are told, and what is stored then."""

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy.observability import assert_queries

from .conftest import DUNE
from .models import Book, Loan

LOAN = f"/books/{DUNE}/loan"

pytestmark = pytest.mark.usefixtures("book")


async def test_a_book_is_lent_and_taken_back(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    readers = select(Loan.reader)
    response = await client.post(LOAN, params={"reader": "ann"})
    assert response.status_code == 201
    assert list(await shared_session.scalars(readers)) == ["ann"]
    await shared_session.commit()
    assert (await client.delete(LOAN)).status_code == 204
    assert list(await shared_session.scalars(readers)) == []


async def test_a_second_reader_is_refused_and_not_counted(
    client: httpx.AsyncClient, shared_session: AsyncSession, book: Book
) -> None:
    await client.post(LOAN, params={"reader": "ann"})
    response = await client.post(LOAN, params={"reader": "bob"})
    assert response.status_code == 409
    await shared_session.refresh(book)
    assert book.times_lent == 1


async def test_a_duplicate_is_refused_by_name(
    client: httpx.AsyncClient,
) -> None:
    duplicate = {"isbn": DUNE, "title": "Dune Messiah"}
    response = await client.post("/books", json=duplicate)
    assert response.status_code == 409
    assert response.json() == {"detail": f"book {DUNE} is there already"}


async def test_a_book_that_is_not_there_is_not_lent(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/books/1/loan", params={"reader": "ann"})
    assert response.status_code == 404


async def test_readers_are_reminded_after_the_response(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    loan = Loan(isbn=DUNE, reader="ann")
    shared_session.add(loan)
    await shared_session.commit()
    assert (await client.post("/reminders")).status_code == 202
    await shared_session.refresh(loan)
    assert loan.reminded


async def test_the_list_of_books_is_one_statement(
    client: httpx.AsyncClient,
) -> None:
    with assert_queries(1):
        await client.get("/books")
