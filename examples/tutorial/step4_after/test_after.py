"""Mail is sent for what is committed, and for nothing else."""

import pytest
from starlette.testclient import TestClient

from .test_library import LOAN


def test_a_reader_is_told_of_a_loan(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.post(LOAN, params={"reader": "ann"})
    assert caplog.messages == ["'ann': Enjoy Dune"]


def test_nobody_is_told_of_a_loan_that_is_refused(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.post(LOAN, params={"reader": "ann"})
    caplog.clear()
    response = client.post(LOAN, params={"reader": "bob"})
    assert response.status_code == 409
    assert caplog.messages == []


def test_a_reader_is_reminded_once(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.post(LOAN, params={"reader": "ann"})
    caplog.clear()
    assert client.post("/reminders").status_code == 202
    assert client.post("/reminders").status_code == 202
    assert caplog.messages == ["'ann': Please return 9780441013593"]
