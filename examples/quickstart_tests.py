import httpx
import pytest
from sqlalchemy.exc import IntegrityError


async def test_a_note_is_stored_once(client: httpx.AsyncClient) -> None:
    assert (await client.post("/notes/bread")).status_code == 201
    with pytest.raises(IntegrityError):
        await client.post("/notes/bread")
