"""The endpoints: what clients are told, and what is stored then."""

import httpx
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy.observability import assert_queries

from .conftest import DUNE
from .models import Loan


async def test_a_book_is_lent_and_taken_back(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    loan = f"/books/{DUNE}/loan"
    response = await client.post(loan, params={"reader": "ann"})
    assert response.status_code == 201
    assert (await session.get_one(Loan, DUNE)).reader == "ann"
    await session.commit()
    assert (await client.delete(loan)).status_code == 204
    assert await session.scalar(select(func.count()).select_from(Loan)) == 0


async def test_a_second_reader_is_refused_and_not_counted(
    client: httpx.AsyncClient,
) -> None:
    loan = f"/books/{DUNE}/loan"
    await client.post(loan, params={"reader": "ann"})
    response = await client.post(loan, params={"reader": "bob"})
    assert response.status_code == 409
    [book] = (await client.get("/books")).json()
    assert book["times_lent"] == 1


async def test_a_duplicate_is_refused_by_name(
    client: httpx.AsyncClient,
) -> None:
    book = {"isbn": DUNE, "title": "Dune Messiah"}
    response = await client.post("/books", json=book)
    assert response.status_code == 409
    assert response.json() == {"detail": f"book {DUNE} is there already"}


async def test_a_book_that_is_not_there_is_not_lent(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/books/1/loan", params={"reader": "ann"})
    assert response.status_code == 404


async def test_readers_are_reminded_after_the_response(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    session.add(Loan(isbn=DUNE, reader="ann"))
    await session.commit()
    assert (await client.post("/reminders")).status_code == 202
    loan = await session.get_one(Loan, DUNE)
    await session.refresh(loan)
    assert loan.reminded


async def test_the_list_of_books_is_one_statement(
    client: httpx.AsyncClient,
) -> None:
    with assert_queries(1):
        await client.get("/books")
