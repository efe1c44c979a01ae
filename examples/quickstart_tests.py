import pytest
from sqlalchemy.exc import IntegrityError
from starlette.testclient import TestClient


def test_a_note_is_stored_once(shared_client: TestClient) -> None:
    assert shared_client.post("/notes/bread").status_code == 201
    with pytest.raises(IntegrityError):
        shared_client.post("/notes/bread")
