"""What is added to an error, for who reads of it."""

from sqlalchemy.ext.asyncio import AsyncSession


def note_once(error: BaseException, note: str) -> None:
    """Add a note to an error that may pass here again."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def name_of(session: AsyncSession) -> str:
    """Return the host and the database of a session."""
    url = getattr(getattr(session, "bind", None), "url", None)
    return f"{url.host or ''}/{url.database}" if url is not None else repr(session)
