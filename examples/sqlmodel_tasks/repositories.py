"""Queries, each for one user: rows of other users do not exist for it."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from context_async_sqlalchemy import db_session
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.models import Category, Owned, Row, Task

RowT = TypeVar("RowT", bound=Row)
OwnedT = TypeVar("OwnedT", bound=Owned)


class BaseRepository(Generic[RowT]):
    """The rows of a table; commits nothing: who opened the context does."""

    def __init__(self, model: type[RowT]) -> None:
        self.model = model

    def visible(self) -> SelectOfScalar[RowT]:
        """Return the query that all others start from."""
        return select(self.model)

    async def get(self, row_id: int) -> RowT | None:
        session = await db_session(connect)
        return (
            await session.exec(self.visible().where(self.model.id == row_id))
        ).one_or_none()

    async def get_multi(
        self, *where: Any, skip: int = 0, limit: int = 100
    ) -> Sequence[RowT]:
        session = await db_session(connect)
        rows = self.visible().where(*where).order_by(col(self.model.id))
        return (await session.exec(rows.offset(skip).limit(limit))).all()

    async def create(self, row: RowT) -> RowT:
        session = await db_session(connect)
        session.add(row)
        await session.flush()
        return row

    async def update(self, row_id: int, values: dict[str, Any]) -> RowT | None:
        row = await self.get(row_id)
        if row is not None:
            row.sqlmodel_update(values)
            await (await db_session(connect)).flush()
        return row

    async def delete(self, row_id: int) -> bool:
        row = await self.get(row_id)
        if row is not None:
            await (await db_session(connect)).delete(row)
        return row is not None


class OwnedRepository(BaseRepository[OwnedT]):
    """The rows of one user."""

    def __init__(self, model: type[OwnedT], user_id: UUID) -> None:
        super().__init__(model)
        self.user_id = user_id

    def visible(self) -> SelectOfScalar[OwnedT]:
        return super().visible().where(self.model.user_id == self.user_id)


class CategoryRepository(OwnedRepository[Category]):
    def __init__(self, user_id: UUID) -> None:
        super().__init__(Category, user_id)

    async def get_or_create(self, name: str) -> Category:
        """Return the category of this name, created if it is new.

        If two SERIALIZABLE transactions create it at the same time, one gets a transient error, not
        a violated constraint, because both have looked first. That one is tried again.
        """
        found = await self.get_multi(Category.name == name)
        return (
            found[0]
            if found
            else await self.create(Category(user_id=self.user_id, name=name))
        )


class TaskRepository(OwnedRepository[Task]):
    def __init__(self, user_id: UUID) -> None:
        super().__init__(Task, user_id)

    async def get_many(self, task_ids: Sequence[int]) -> Sequence[Task]:
        session = await db_session(connect)
        return (
            await session.exec(self.visible().where(col(Task.id).in_(task_ids)))
        ).all()

    async def get_pending(
        self, skip: int = 0, limit: int = 100
    ) -> Sequence[Task]:
        return await self.get_multi(
            col(Task.completed).is_(False), skip=skip, limit=limit
        )
