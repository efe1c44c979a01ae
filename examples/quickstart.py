from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    body: Mapped[str] = mapped_column(primary_key=True)


connect = DBConnect.from_url("sqlite:///notes.db")
app = FastAPI(
    lifespan=database_lifespan(connect, create_tables=Base.metadata),
)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str) -> None:
    session = await db_session(connect)
    session.add(Note(body=body))
