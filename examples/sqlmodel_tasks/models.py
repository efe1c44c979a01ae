"""The tables, and what clients send and receive."""

from typing import Annotated
from uuid import UUID, uuid4

from pydantic import StringConstraints
from sqlalchemy import MetaData, UniqueConstraint
from sqlmodel import Field, SQLModel


class Base(SQLModel):
    # Migrations refer to constraints by name.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class User(Base, table=True):
    __tablename__ = "user_account"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    name: str = Field(unique=True, max_length=100)


class Row(Base):
    id: int | None = Field(default=None, primary_key=True)


class Owned(Row):
    user_id: UUID = Field(foreign_key="user_account.id")


class Category(Owned, table=True):
    __table_args__ = (UniqueConstraint("user_id", "name"),)

    name: str = Field(max_length=100)


class Task(Owned, table=True):
    __table_args__ = (UniqueConstraint("user_id", "title"),)

    title: str = Field(max_length=200)
    category_id: int | None = Field(default=None, foreign_key="category.id")
    completed: bool = False
    processed: bool = False
    deliveries_left: int = Field(
        default=0, index=True
    )  # attempts of the worker; 0: not queued


# JSON and URLs may contain NUL, which PostgreSQL refuses.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]


class TaskCreate(SQLModel):
    title: Text = Field(min_length=1, max_length=200)
    category: Text | None = Field(default=None, min_length=1, max_length=100)


class TaskUpdate(SQLModel):
    """Changes the fields that are sent, and leaves the rest; null is not valid."""

    title: Text = Field(default="", min_length=1, max_length=200)
    completed: bool = False


class TaskRead(SQLModel):
    id: int
    title: str
    category_id: int | None
    completed: bool
    processed: bool


class FailedRow(SQLModel):
    row: int
    error: str


class ImportReport(SQLModel):
    imported: int
    failed: list[FailedRow]
