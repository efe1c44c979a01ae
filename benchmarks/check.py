"""Check that all contenders do the same work: the same responses, rows and statements."""

from __future__ import annotations

import re
from unittest.mock import patch

import asyncpg

from benchmarks import work
from benchmarks.contenders import Contender, taking_part
from benchmarks.requests import request
from benchmarks.wire import WARM_UP, calls_of, watched, work_of
from benchmarks.work import INSERT, LOAD, SELECT, UPDATE

REQUESTS = WARM_UP + 2  # per route; the last but one is watched, the last one gives the answer
EXPECTED = {
    "nothing": ("0", []),
    "select": ("5", [SELECT]),
    "insert": ("1", [INSERT]),
    "five": ("17", [SELECT, INSERT, SELECT, INSERT, SELECT]),
    "change": (str(REQUESTS), [LOAD, UPDATE]),
}


async def differences(url: str, connection: asyncpg.Connection) -> list[str]:
    """Return every difference between the work of a contender and what all should do."""
    found = []
    for contender in taking_part(partly=True):
        found += await differences_of(contender, url, connection)
    return found


async def differences_of(
    contender: Contender, url: str, connection: asyncpg.Connection
) -> list[str]:
    """Return what is wrong with the responses, rows and statements of a contender."""
    await connection.execute(work.CREATE)
    found, expected_rows, expected_changes = [], 1, 0
    async with watched(contender, url) as (app, seen):
        for route, (answer, statements) in EXPECTED.items():
            if route not in contender.routes:
                continue
            expected_rows += statements.count(INSERT) * REQUESTS
            expected_changes += statements.count(UPDATE) * REQUESTS
            calls = await calls_of(app, seen, f"/{route}")
            answered = (await request(app, f"/{route}")).decode()
            if answered != answer:
                found.append(f"{contender.key}: /{route} answers {answered}, not {answer}")
            # SQLAlchemy 2.0 adds labels to the columns of a loaded object, and a report a comment.
            sent = [re.sub(r" AS \w+| /\*route=.*", "", statement) for statement in work_of(calls)]
            if sent != statements:
                found.append(f"{contender.key}: /{route} sends {sent}, not {statements}")
            ends = [call.partition(";")[0] for call in calls if call not in work_of(calls)]
            begins = contender.around if statements else ()
            if len(ends) != len(begins) or not all(map(str.startswith, ends, begins)):
                found.append(f"{contender.key}: /{route} sends {ends} around its work")
        if len(await request(app, "/body")) != work.BODY_PARTS * len(work.BODY_PART):
            found.append(f"{contender.key}: /body is not whole")
        with patch.object(work, "BACKGROUND_SECONDS", 0):
            if await request(app, "/background") != b"5":
                found.append(f"{contender.key}: /background has another answer")
    rows = await connection.fetchval("SELECT count(*) FROM bench_entry")
    changes = await connection.fetchval("SELECT value FROM bench_counter")
    if (rows, changes) != (expected_rows, expected_changes):
        found.append(f"{contender.key}: {rows} rows and {changes} changes are committed")
    return found
