"""Endpoints of FastCRUD, and its methods, in the transaction of the request."""

import os
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastcrud import FastCRUD, crud_router
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.works_with.commits_later import commits_later

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///articles.db")
)


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "works_with_article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class ArticleCreate(BaseModel):
    title: str


class ArticleRead(ArticleCreate):
    id: int


Session = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]


async def get_session(session: Session) -> AsyncSession:
    return commits_later(session)


articles: Any = FastCRUD(Article)
router = crud_router(
    session=get_session,
    model=Article,
    create_schema=ArticleCreate,
    update_schema=ArticleCreate,
    select_schema=ArticleRead,
    path="/articles",
)
app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
app.include_router(router)
add_fastapi_http_db_session_middleware(app)


@app.post("/drafts", status_code=201)
async def add_drafts(titles: list[str]) -> None:
    session = await db_session(connect)
    for title in titles:
        await articles.create(session, ArticleCreate(title=title), commit=False)
