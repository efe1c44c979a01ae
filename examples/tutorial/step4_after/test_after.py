"""Mail is sent for what is committed, and for nothing else."""

import httpx
import pytest

from .conftest import DUNE
from .test_library import LOAN

pytestmark = pytest.mark.usefixtures("book")


async def test_a_reader_is_told_of_a_loan(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(LOAN, params={"reader": "ann"})
    assert caplog.messages == ["'ann': Enjoy Dune"]


async def test_nobody_is_told_of_a_loan_that_is_refused(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(LOAN, params={"reader": "ann"})
    caplog.clear()
    response = await client.post(LOAN, params={"reader": "bob"})
    assert response.status_code == 409
    assert caplog.messages == []


async def test_a_reader_is_reminded_once(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(LOAN, params={"reader": "ann"})
    caplog.clear()
    assert (await client.post("/reminders")).status_code == 202
    assert (await client.post("/reminders")).status_code == 202
    assert caplog.messages == [f"'ann': Please return {DUNE}"]
