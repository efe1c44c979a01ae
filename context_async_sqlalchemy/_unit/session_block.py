"""`async with session:`, SQLAlchemy's own block, around a session that a context closes."""

from types import TracebackType, new_class
from typing import NamedTuple
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import SessionTransaction

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import replace_class
from context_async_sqlalchemy._engine.release import rollback_sessions
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.lost_work import written
from context_async_sqlalchemy._unit.settle import is_success

_BLOCKS = "context_async_sqlalchemy.blocks"
_ENTER, _EXIT = AsyncSession.__aenter__, AsyncSession.__aexit__


def leave_open(session: AsyncSession, context: DBSessionContext) -> None:
    """Let a block `async with session:` leave it open; `context` settles and closes it.

    A block that raises is rolled back. One that began before this call closes the session, and so
    does one that ends after the context.
    """
    cls = type(session)
    if cls not in _classes:
        block = getattr(cls, "__aenter__", None), getattr(cls, "__aexit__", None)
        if block == (_ENTER, _EXIT):
            _classes[cls] = _with_own_block(cls)
        elif block == (_enter, _exit):  # it is in a second context
            _classes[cls] = cls
        else:
            return  # a mock, or whoever has written another block knows what it means
    replace_class(session, _classes[cls])
    session.sync_session.info[_BLOCKS] = _Blocks(ref(context), [])  # a session may outlive it


class _Blocks(NamedTuple):
    """The blocks that have begun around a session since its context has it."""

    context: ref[DBSessionContext]
    after: list[SessionTransaction | None]  # for each, the transaction that had written before it


async def _enter(session: AsyncSession) -> AsyncSession:
    blocks: _Blocks = session.info[_BLOCKS]
    blocks.after.append(session.sync_session.get_transaction() if any(written(session)) else None)
    return session


async def _exit(
    session: AsyncSession,
    type_: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    blocks: _Blocks = session.info[_BLOCKS]
    context = blocks.context()
    if not blocks.after or context is None or session not in context.sessions:
        await _EXIT(session, type_, error, traceback)
        return
    after = blocks.after.pop()
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
    await rollback_sessions([session])


def _with_own_block(cls: type[AsyncSession]) -> type[AsyncSession]:
    # Python looks up the methods of a block on the class. A subclass that adds neither attributes
    # nor a second base has the layout of its class, so that an object may change from one to other.
    names = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__aenter__": _enter,
        "__aexit__": _exit,
    }
    return new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(names))


_classes: dict[type[AsyncSession], type[AsyncSession]] = {}
