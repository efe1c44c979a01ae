"""The pools of connects as metrics of OpenTelemetry, under the names of its semantic conventions.

https://opentelemetry.io/docs/specs/semconv/database/database-metrics/#connection-pools
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter

from context_async_sqlalchemy._engine.border import sync_engine_of
from context_async_sqlalchemy._engine.observed import Kind, Observer, Step, observe_everywhere
from context_async_sqlalchemy._engine.pool import PoolStatus
from context_async_sqlalchemy.connect import DBConnect

_POOL = "db.client.connection.pool.name"
_STATE = "db.client.connection.state"
# For seconds; the default of the SDK is for milliseconds.
_BUCKETS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10]


def measure_pools(
    connects: Mapping[str, DBConnect[Any]], meter_provider: MeterProvider | None = None
) -> None:
    """Measure the pools of connects for as long as the process lives.

        measure_pools({"shop": connect})

    `db.client.connection.count` (by state: idle, used), `.max` (if there is a limit) and
    `.pending_requests` (of a pool that `from_url` made) are read from `DBConnect.pool_status` when
    they are exported. `.wait_time` and `.use_time` are histograms in seconds.

    Args:
        connects: By the names that the pools get. Call this once for all of them.
        meter_provider: Default None: the global one, be it set later.
    """
    meter = get_meter("context_async_sqlalchemy", meter_provider=meter_provider)

    def reader(
        read: Callable[[PoolStatus], Mapping[str, int | None]],
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observations(_: CallbackOptions) -> Iterable[Observation]:
            for name, connect in connects.items():
                for state, number in read(connect.pool_status()).items():
                    if number is not None:
                        attributes = {_POOL: name} | ({_STATE: state} if state else {})
                        yield Observation(number, attributes)

        return observations

    meter.create_observable_up_down_counter(
        "db.client.connection.count",
        [reader(lambda status: {"idle": status.checked_in, "used": status.checked_out})],
        "{connection}",
        "The number of connections in a state",
    )
    meter.create_observable_up_down_counter(
        "db.client.connection.max",
        [reader(lambda status: {"": status.capacity})],
        "{connection}",
        "The most connections that may be open",
    )
    meter.create_observable_up_down_counter(
        "db.client.connection.pending_requests",
        [reader(lambda status: {"": status.waiting})],
        "{request}",
        "How many wait for a connection",
    )
    histogram = partial(meter.create_histogram, explicit_bucket_boundaries_advisory=_BUCKETS)
    wait = histogram("db.client.connection.wait_time", "s", "The time it took to get a connection")
    use = histogram(
        "db.client.connection.use_time", "s", "The time from getting a connection to giving it back"
    )
    observe_everywhere(_Timer(connects, {Kind.WAIT: wait, Kind.USE: use}))


class _Timer(Observer):
    def __init__(
        self, connects: Mapping[str, DBConnect[Any]], histograms: Mapping[Kind, Any]
    ) -> None:
        self._connects = connects
        self._histograms = histograms
        self._names: WeakKeyDictionary[Step, str] = WeakKeyDictionary()

    def began(self, step: Step) -> None:
        # Not when it has ended: the host may be another one by then.
        if step.kind in self._histograms:
            for name, connect in self._connects.items():
                # Copies of an engine, by Engine.execution_options(), share its pool.
                if (engine := connect.engine) and sync_engine_of(engine).pool is step.engine.pool:
                    self._names[step] = name
                    break

    def ended(self, step: Step) -> None:
        if (name := self._names.pop(step, None)) is not None:
            self._histograms[step.kind].record(step.so_far(), {_POOL: name})
