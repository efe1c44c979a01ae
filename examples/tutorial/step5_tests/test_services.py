"""The services, without HTTP."""

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import new_db_session_ctx

from . import services
from .conftest import DUNE
from .models import Book, Loan

pytestmark = pytest.mark.usefixtures("book")


async def test_a_loan_is_stored_and_counted(db_context: AsyncSession) -> None:
    await services.lend(DUNE, "ann")
    await db_context.flush()
    assert (await db_context.get_one(Loan, DUNE)).reader == "ann"
    assert (await db_context.get_one(Book, DUNE)).times_lent == 1


async def test_a_book_is_lent_once(caplog: pytest.LogCaptureFixture) -> None:
    async with new_db_session_ctx():
        await services.lend(DUNE, "ann")
    with pytest.raises(IntegrityError):
        async with new_db_session_ctx():
            await services.lend(DUNE, "bob")
    assert caplog.messages == ["'ann': Enjoy Dune"]


@pytest.mark.usefixtures("db_context")
async def test_a_duplicate_is_refused_by_name() -> None:
    with pytest.raises(services.AlreadyThereError, match=DUNE):
        await services.add_book(DUNE, "Dune Messiah")


async def test_a_reader_is_reminded_once(
    shared_session: AsyncSession, caplog: pytest.LogCaptureFixture
) -> None:
    shared_session.add(Loan(isbn=DUNE, reader="ann"))
    await shared_session.commit()
    for _ in range(2):
        async with new_db_session_ctx():
            await services.remind_readers()
    assert caplog.messages == [f"'ann': Please return {DUNE}"]


@pytest.mark.usefixtures("db_context")
async def test_what_is_not_there_is_not_taken_back() -> None:
    with pytest.raises(services.NotFoundError):
        await services.take_back(DUNE)
