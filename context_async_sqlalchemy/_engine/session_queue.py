"""Tasks that use one session at the same time queue: each of its methods waits for its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy._engine import private_names
from context_async_sqlalchemy._engine.flushes import watch_flushes
from context_async_sqlalchemy._engine.private_names import replace_class
from context_async_sqlalchemy._engine.streams import QueuedCursor
from context_async_sqlalchemy._engine.turns import (
    Scope,
    add_later,
    begin_block,
    enter,
    has_turn,
    here,
    is_open,
    leave,
    open_here,
    push,
)

# What may wait for a database.
CALLS = (
    private_names.EXECUTE,
    *("bulk_insert_mappings", "bulk_save_objects", "bulk_update_mappings", "close", "commit"),
    *("connection", "delete", "delete_all", "flush", "get", "get_one", "merge", "merge_all"),
    *("prepare", "refresh", "reset", "rollback"),
)


def queue_tasks(session: Any) -> None:
    """Let tasks that use `session` at the same time queue from now on."""
    if type(session) in _classes.values():
        return  # it was made so
    if "dispatch" in vars(session):  # the listeners of its class until now
        watch_flushes(session)
    replace_class(session, _queued(type(session)))
    _begin_queue(session)


def methods_in_turn(cls: type[AsyncSession], methods: dict[str, Any]) -> dict[str, Any]:
    """Return `methods`, which a subclass of `cls` will have, and those that need another way."""
    run_sync, stream = (methods.get(n, getattr(cls, n)) for n in ("run_sync", "stream"))
    methods |= {"run_sync": _run_sync(run_sync), "stream": _stream(stream)}
    if isinstance(cls.sync_session_class, type):
        methods["sync_session_class"] = _queued(cls.sync_session_class)
    return methods


def subclass(cls: type[Any], attributes: dict[str, Any]) -> type[Any]:
    """Return a subclass that looks like `cls`."""
    # One that adds neither slots nor a second base has the layout of its class, so that an object
    # may change from one to the other.
    names = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), names | attributes)


def _begin_queue(self: Any) -> None:
    # Not of the class: Python stores an attribute that its class has, too, in a slow way.
    self._task_turn = None  # the innermost one that is open
    self._task_queue = None  # while there is anything in it
    self._task_flush = None  # that is under way


def _queued(cls: type[Session]) -> type[Session]:
    if cls not in _classes:
        _classes[cls] = _with_turns(cls)
    return _classes[cls]


def _with_turns(cls: type[Session]) -> type[Session]:
    methods = {name: _in_turn(cls, name) for name in CALLS if hasattr(cls, name)}
    methods |= {"add": _add(cls), "add_all": _add_all(cls), "begin": _begin(cls)}
    queued = subclass(cls, methods | {"__init__": _init(cls)})
    watch_flushes(queued)
    return queued


def _init(cls: type[Session]) -> Callable[..., None]:
    @wraps(cls.__init__)
    def init(session: Any, /, *args: Any, **kwargs: Any) -> None:
        _begin_queue(session)
        cls.__init__(session, *args, **kwargs)

    return init


def _in_turn(cls: type[Any], name: str) -> Callable[..., Any]:
    # Each statement of a request comes through here: calls of functions are spared.
    @wraps(getattr(cls, name))
    def call(session: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(cls, name)  # what a test has put there by now
        outer = here.get()
        while outer is not None and outer.has_ended:
            outer = outer.outer
        turn = session._task_turn
        if turn is None and session._task_queue is None:
            scope = session._task_turn = Scope(outer)
        elif outer is not None and outer is turn and not outer.is_block:
            return method(session, *args, **kwargs)  # a part of the call that is under way
        else:
            scope = Scope(outer)
            enter(session, scope)
        here.set(scope)
        try:
            return method(session, *args, **kwargs)
        finally:
            if scope.below is None and session._task_turn is scope and session._task_queue is None:
                session._task_turn, scope.has_ended = None, True
            else:
                leave(session, scope)

    return call


class _Call:
    @staticmethod
    def call(session: Session, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(session, *args, **kwargs)


_call = _in_turn(_Call, "call")


def _run_sync(run_sync: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run_sync)
    async def run_in_turn(self: AsyncSession, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return await run_sync(self, _call, fn, *args, **kwargs)

    return run_in_turn


def _stream(stream: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stream)
    async def stream_in_turn(self: AsyncSession, *args: Any, **kwargs: Any) -> Any:
        result = await stream(self, *args, **kwargs)
        private_names.wrap_cursor(result, partial(QueuedCursor, self.sync_session))
        return result

    return stream_in_turn


def _add(cls: type[Session]) -> Callable[..., None]:
    add = cls.add

    @wraps(add)
    def add_in_turn(session: Any, instance: object, *, _warn: bool = True) -> None:
        if has_turn(session) or inspect(instance, raiseerr=False) is None:
            add(session, instance, _warn=_warn)
        else:
            # Nothing can wait here, and another task's rollback would take it away again.
            add_later(session, instance)

    return add_in_turn


def _add_all(cls: type[Session]) -> Callable[..., None]:
    add_all = cls.add_all

    @wraps(add_all)
    def add_all_in_turn(session: Any, instances: Iterable[object]) -> None:
        if has_turn(session):
            add_all(session, instances)
        else:
            for instance in instances:
                session.add(instance)

    return add_all_in_turn


def _begin(cls: type[Session]) -> Callable[..., SessionTransaction]:
    begin = _in_turn(cls, "begin")

    @wraps(cls.begin)
    def begin_in_turn(session: Session, nested: bool = False) -> SessionTransaction:
        transaction: SessionTransaction = begin(session, nested)
        if type(transaction) is SessionTransaction:
            replace_class(transaction, _Transaction)
        return transaction

    return begin_in_turn


class _Transaction(SessionTransaction):
    __slots__ = ()
    _task_block: Scope | None = None

    def commit(self, _to_root: bool = False) -> None:
        _call(self.session, lambda _: SessionTransaction.commit(self, _to_root))

    def rollback(self, _capture_exception: bool = False, _to_root: bool = False) -> None:
        _call(
            self.session, lambda _: SessionTransaction.rollback(self, _capture_exception, _to_root)
        )

    def __enter__(self) -> _Transaction:
        if self.nested:
            self._task_block = begin_block(self.session)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        session: Any = self.session
        scope, failure = Scope(open_here()), None
        try:
            enter(session, scope, is_shielded=True)
        except BaseException as raised:
            # What the block has done must not be committed with the transaction around it.
            failure, error = raised, (type(raised), raised, raised.__traceback__)
            if not is_open(session, scope):
                push(session, scope)
        here.set(scope)
        try:
            super().__exit__(*error)
            if failure is not None:
                raise failure
        finally:
            leave(session, scope)
            if self._task_block is not None:
                leave(session, self._task_block)


_classes: dict[type[Session], type[Session]] = {}
