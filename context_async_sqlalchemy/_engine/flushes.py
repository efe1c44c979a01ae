"""A flush leaves alone what other tasks change while it waits for the database.

SQLAlchemy takes for written whatever was changed until it ends.
"""

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import InstanceState, Session, UOWTransaction, attributes

from context_async_sqlalchemy._engine.private_names import modified_states


class Flush:
    """The objects that are being written, as they were before."""

    def __init__(self, session: Session) -> None:
        objects = [*session.new, *session.dirty]
        states: list[InstanceState[Any]] = [*map(attributes.instance_state, objects)]
        self._before = [(s, dict(s.dict), set(s.committed_state)) for s in states]
        self._late: dict[tuple[InstanceState[Any], str], Any] = {}  # with the value before
        self._aside: list[InstanceState[Any]] = []  # changed, and not a part of what is written

    def note_changes(self) -> None:
        """Note what was changed: called when another task comes, which may have done so."""
        for state, before, changed in self._before:
            for key, original in state.committed_state.items():
                is_same = key in changed and state.dict.get(key) is before.get(key)
                if not is_same:
                    self._late.setdefault((state, key), before.get(key, original))

    def set_aside(self, session: Session, flush: UOWTransaction) -> None:
        """Let SQLAlchemy not take for written what was not."""
        modified = modified_states(session)
        for state in list(modified):
            _, is_only_read = flush.states.get(state, (False, True))
            if is_only_read:
                flush.states.pop(state, None)
                modified.discard(state)
                self._aside.append(state)

    def restore(self, session: Session) -> None:
        """Let the next flush write what this one has not."""
        modified_states(session).update(state for state in self._aside if state.modified)
        for (state, key), original in self._late.items():
            if state.persistent and key in state.dict:
                attributes.flag_modified(state.obj(), key)
                state.committed_state[key] = original


def watch_flushes(target: Session | type[Session]) -> None:
    """Let the flushes of a session, or of a class of them, be known, as their `_task_flush`."""
    event.listen(target, "before_flush", _on_flush)
    event.listen(target, "after_flush", _on_executed)
    event.listen(target, "after_flush_postexec", _on_flushed)


def _on_flush(session: Any, *_: object) -> None:
    session._task_flush = Flush(session)


def _on_executed(session: Any, flush: UOWTransaction) -> None:
    session._task_flush.set_aside(session, flush)


def _on_flushed(session: Any, _: UOWTransaction) -> None:
    flush, session._task_flush = session._task_flush, None
    flush.restore(session)
