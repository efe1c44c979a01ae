"""Money is moved by SERIALIZABLE transactions while the server ends connections."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from sqlalchemy import URL

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    retry_on_transient_error,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.database import Database, assert_clean, make_connect
from tests.helpers.models import Account, Transfer
from tests.helpers.serving import http_client

ACCOUNTS, CLIENTS, TRANSFERS = 10, 8, 20
TOO_LITTLE, FAILED, UNKNOWN = "not enough money", "failed", "unknown outcome"

Move = Callable[[str, int, int, int], Awaitable[str]]
"""Moves an amount from one account to another; returns the key, or what became of it."""


@pytest_asyncio.fixture
async def bank(database_url: URL, database: Database) -> AsyncGenerator[DBConnect]:
    """Return a connect to a database with ten accounts, whose transactions are SERIALIZABLE."""
    await database.execute(
        f"INSERT INTO purse SELECT n, 100 FROM generate_series(1, {ACCOUNTS}) AS n"
    )
    connect = make_connect(database_url, isolation_level="SERIALIZABLE", pool_size=CLIENTS)
    yield connect
    await assert_clean(connect, database)
    await connect.close()


class NotEnoughError(Exception):
    """There is not enough money on an account."""


async def transfer(connect: DBConnect, key: str, source: int, target: int, amount: int) -> str:
    """Move money, and enter it in the ledger."""
    session = await db_session(connect)
    accounts = [await session.get_one(Account, number) for number in (source, target)]
    if accounts[0].balance < amount:
        raise NotEnoughError
    accounts[0].balance -= amount
    accounts[1].balance += amount
    session.add(Transfer(key=key, source=source, target=target, amount=amount))
    return key


def make_app(connect: DBConnect, attempts: int) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app, attempts=attempts)

    @app.post("/transfer", status_code=201)
    async def endpoint(key: str, source: int, target: int, amount: int) -> str:
        try:
            return await transfer(connect, key, source, target, amount)
        except NotEnoughError:
            raise HTTPException(402) from None

    @app.exception_handler(CommitOutcomeUnknownError)
    async def unknown(_: Any, __: Exception) -> PlainTextResponse:
        return PlainTextResponse("look first", 502)

    return app


@asynccontextmanager
async def over_http(connect: DBConnect, attempts: int) -> AsyncGenerator[Move]:
    app = make_app(connect, attempts)
    async with http_client(app, log_level="critical") as client:

        async def move(key: str, source: int, target: int, amount: int) -> str:
            path = f"/transfer?key={key}&source={source}&target={target}&amount={amount}"
            response = await client.post(path)
            if response.status_code == 402:
                return TOO_LITTLE
            if response.status_code == 502:
                return UNKNOWN
            return key if response.is_success else FAILED

        yield move


@asynccontextmanager
async def by_decorator(connect: DBConnect, attempts: int) -> AsyncGenerator[Move]:
    retrying = retry_on_transient_error(attempts)(transfer)

    async def move(key: str, source: int, target: int, amount: int) -> str:
        try:
            if attempts == 1:
                return await run_in_new_ctx(transfer, connect, key, source, target, amount)
            return await retrying(connect, key, source, target, amount)
        except CommitOutcomeUnknownError:
            return UNKNOWN
        except NotEnoughError:
            return TOO_LITTLE
        except Exception:
            return FAILED

    yield move


async def run_load(move: Move, database: Database) -> dict[str, str]:
    """Let the clients move money while backends are terminated; return what each was told."""
    told: dict[str, str] = {}

    async def be_a_client(number: int) -> None:
        for count in range(TRANSFERS):
            key = f"{number}/{count}"
            source, target = random.sample(range(1, ACCOUNTS + 1), 2)
            told[key] = await move(key, source, target, random.randint(1, 30))

    async def terminate() -> None:
        while True:
            await database.terminate_any()
            done = len(told)
            while len(told) < done + 5:  # not by the clock: a slow machine would lose more
                await asyncio.sleep(0.005)

    terminating = asyncio.create_task(terminate())
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(be_a_client(number) for number in range(CLIENTS)))
    finally:
        terminating.cancel()
        await asyncio.wait([terminating])
    assert terminating.cancelled(), terminating.exception()
    return told


@pytest.mark.parametrize("way", [over_http, by_decorator])
@pytest.mark.parametrize("attempts", [1, 5])
async def test_every_success_is_in_the_ledger_once_and_nothing_that_was_refused(
    bank: DBConnect, database: Database, way: Any, attempts: int
) -> None:
    async with way(bank, attempts) as move:
        told = await run_load(move, database)

    ledger = await database.fetch("SELECT key, source, target, amount FROM ledger")
    entries = Counter(key for key, *_ in ledger)
    for key, answer in told.items():
        if answer == key:
            assert entries[key] == 1, "told 2xx, and it is not there once"
        elif answer == UNKNOWN:
            assert entries[key] <= 1, "done twice"
        else:
            assert entries[key] == 0, "refused, and it is there"

    balances = dict(await database.fetch("SELECT id, balance FROM purse"))
    assert sum(balances.values()) == ACCOUNTS * 100
    moved: Counter[int] = Counter()
    for _, source, target, amount in ledger:
        moved[source] -= amount
        moved[target] += amount
    assert balances == {number: 100 + moved[number] for number in balances}

    answers = Counter(told.values())
    if attempts == 1:
        # Or else the load shows nothing.
        assert answers[FAILED] > 10
    else:
        # On a slow machine more of them are cut in the middle. Without retries it is a third.
        assert answers[FAILED] < CLIENTS * TRANSFERS / 6
