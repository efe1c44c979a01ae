"""The services, without HTTP."""

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import new_db_session_ctx
from library import services
from library.models import Book, Loan

DUNE = "9780441013593"


async def test_a_loan_is_stored_and_counted(session: AsyncSession) -> None:
    async with new_db_session_ctx():
        await services.lend(DUNE, "ann")
    loan = await session.get_one(Loan, DUNE)
    assert loan.reader == "ann"
    book = await session.get_one(Book, DUNE)
    await session.refresh(book)  # the test has made it, and not changed it
    assert book.times_lent == 1


async def test_a_book_is_lent_once(
    session: AsyncSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_session_ctx():
        await services.lend(DUNE, "ann")
    with pytest.raises(IntegrityError):
        async with new_db_session_ctx():
            await services.lend(DUNE, "bob")
    assert caplog.messages == ["'ann': Enjoy Dune"]


async def test_a_duplicate_is_refused_by_name(
    session: AsyncSession,
) -> None:
    with pytest.raises(services.AlreadyThereError, match=DUNE):
        async with new_db_session_ctx():
            await services.add_book(DUNE, "Dune Messiah")


async def test_a_reader_is_reminded_once(
    session: AsyncSession, caplog: pytest.LogCaptureFixture
) -> None:
    session.add(Loan(isbn=DUNE, reader="ann"))
    await session.commit()
    for _ in range(2):
        async with new_db_session_ctx():
            await services.remind_readers()
    assert caplog.messages == [f"'ann': Please return {DUNE}"]


async def test_what_is_not_there_is_not_taken_back(
    session: AsyncSession,
) -> None:
    with pytest.raises(services.NotFoundError):
        async with new_db_session_ctx():
            await services.take_back(DUNE)
