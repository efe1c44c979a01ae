"""Tables and services of advanced-alchemy, which stay as they are."""

from advanced_alchemy.base import DefaultBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from sqlalchemy.orm import Mapped, mapped_column


class Loan(DefaultBase):
    __tablename__ = "loan"

    book: Mapped[str] = mapped_column(primary_key=True)
    reader: Mapped[str]


class Entry(DefaultBase):
    __tablename__ = "diary_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class LoanService(SQLAlchemyAsyncRepositoryService[Loan]):
    class Repository(SQLAlchemyAsyncRepository[Loan]):
        model_type = Loan
        id_attribute = "book"

    repository_type = Repository


class DiaryService(SQLAlchemyAsyncRepositoryService[Entry]):
    class Repository(SQLAlchemyAsyncRepository[Entry]):
        model_type = Entry

    repository_type = Repository
