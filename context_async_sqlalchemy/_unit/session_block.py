"""`async with session:`, SQLAlchemy's own block, around a session that a context closes."""

from types import TracebackType
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import SessionTransaction

from context_async_sqlalchemy._engine.greenlets import methods_in_greenlets
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.private_names import replace_class
from context_async_sqlalchemy._engine.release_in_turn import rollback_in_turn
from context_async_sqlalchemy._engine.session_queue import methods_in_turn, queue_tasks, subclass
from context_async_sqlalchemy._unit.context import contexts_here
from context_async_sqlalchemy._unit.lost_work import written
from context_async_sqlalchemy._unit.settle import is_success

_AFTER = "context_async_sqlalchemy.after"
"""In the `info` of a session: for each of its blocks, the transaction that had written before."""

_ENTER, _EXIT = AsyncSession.__aenter__, AsyncSession.__aexit__


def make_shared(make: async_sessionmaker[SessionT]) -> SessionT:
    """Make a session to be `share`d, which it is from the start if one like it was."""
    # Python is slower with the attributes of an object that has changed its class.
    if type(make) is async_sessionmaker and "sync_session_class" not in make.kw:
        cls: type[SessionT] = _classes.get(make.class_, make.class_)
        return cls(**make.kw)
    return make()


def share(session: AsyncSession) -> None:
    """Let the tasks of a context share a session: their calls queue, and no block closes it.

    The context settles and closes it. A block `async with session:` that raises is rolled back. One
    that began before this call closes the session, and so does one that ends after the context.
    """
    cls = type(session)
    if _classes.get(cls) is cls or not issubclass(cls, AsyncSession):  # a mock
        return
    if cls not in _classes:
        own = _classes[cls] = _with_block(cls)
        _classes[own] = own
    replace_class(session, _classes[cls])
    queue_tasks(session.sync_session)


async def _enter(session: AsyncSession) -> AsyncSession:
    after = session.sync_session.get_transaction() if any(written(session)) else None
    session.info.setdefault(_AFTER, []).append(after)
    return session


async def _exit(
    session: AsyncSession,
    type_: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    blocks: list[SessionTransaction | None] = session.info.get(_AFTER, [])
    context = next((c for c in contexts_here() if session in c.sessions), None)
    if not blocks or context is None:
        await _EXIT(session, type_, error, traceback)
        return
    after = blocks.pop()
    # An exception that is an answer itself, such as a redirect, goes by its status.
    if error is None or is_success(getattr(error, "status_code", 500)):
        return
    if after is not None and after is session.sync_session.get_transaction():
        logger.warning(
            "A block 'async with session:' has raised %s, which rolls back what its transaction "
            "had written before the block, too (%s). To undo the block alone, use "
            "'async with session.begin_nested():'.",
            type(error).__name__,
            context.name,
        )
    await rollback_in_turn(session)


def _with_block(cls: type[AsyncSession]) -> type[AsyncSession]:
    # Python looks up the methods of a block on the class.
    methods = methods_in_turn(cls, methods_in_greenlets(cls))
    if (cls.__aenter__, cls.__aexit__) == (_ENTER, _EXIT):  # or else its author knows what it means
        methods |= {"__aenter__": _enter, "__aexit__": _exit}
    return subclass(cls, methods)


_classes: dict[type[Any], type[Any]] = {}
