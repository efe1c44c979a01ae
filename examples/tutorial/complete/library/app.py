"""The library over HTTP: what clients send, and what they are told."""

from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
    database_health,
    database_lifespan,
)

from . import services
from .database import connect
from .models import Book

app = FastAPI(lifespan=database_lifespan(connect, wait=True))
add_fastapi_http_db_session_middleware(app)
add_database_exception_handlers(app)
app.add_api_route("/health", database_health(connect))


class NewBook(BaseModel):
    isbn: str
    title: str


class StoredBook(NewBook, from_attributes=True):
    times_lent: int


@app.exception_handler(services.NotFoundError)
async def not_found(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.exception_handler(services.AlreadyThereError)
async def already_there(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=409)


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "conflict"}, status_code=409)


@app.post("/books", status_code=201)
async def add_book(book: NewBook) -> None:
    await services.add_book(book.isbn, book.title)


@app.get("/books", response_model=list[StoredBook])
async def list_books() -> list[Book]:
    return await services.list_books()


@app.post("/books/{isbn}/loan", status_code=201)
async def lend(isbn: str, reader: str) -> None:
    await services.lend(isbn, reader)


@app.delete("/books/{isbn}/loan", status_code=204)
async def take_back(isbn: str) -> None:
    await services.take_back(isbn)


@app.post("/reminders", status_code=202)
async def remind(background: BackgroundTasks) -> None:
    background.add_task(services.remind_readers)
