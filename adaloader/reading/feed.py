"""What the iterations of one loader share: whether and how keys are planned, and how often its loop steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adaloader.lookups.batches import Batch
from adaloader.planning import random_ids
from adaloader.planning.planner import Planner
from adaloader.tables.managed_table import ManagedTable

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel

_RATE_SMOOTHING = 0.5


class Feed:
    """Connects a loader's batches with the planner of their keys.

    Args:
        model: the managed model.
        keys: "auto", None (no intents), or functions batch -> ids by table; tables not named are derived.
        steps_expected: whether loops over this loader take optimizer steps (it was given an optimizer).
    """

    def __init__(
        self,
        model: ManagedModel,
        keys: str | None | Mapping[ManagedTable, Callable[[Any], Any]],
        steps_expected: bool,
    ):
        self.model = model
        self.steps_expected = steps_expected
        self.steps_per_batch = 1.0 if steps_expected else 0.0
        self.intends = keys is not None
        self._key_functions = keys if isinstance(keys, Mapping) else {}
        self.planner = Planner(model, self._key_functions)

    @property
    def derives(self) -> bool:
        """Whether the keys of any table are derived."""
        functions = self._key_functions
        return self.intends and not (functions and all(table in functions for table in self.model.tables))

    @property
    def given_tables(self) -> frozenset[str]:
        """Names of the tables whose keys a function of the user's gives."""
        return frozenset(table.name for table in self._key_functions)

    def plan(self, batch: Batch) -> None:
        """Have the rows of `batch` brought here, after the next `begin`; `batch.planned` is set when its keys are
        known."""
        if self.intends:
            self.planner.plan(batch)
        else:
            batch.data = None
            batch.planned.set()

    def begin(self) -> None:
        """Have all batches planned that were given to `plan`."""
        self.planner.begin()

    def await_planned(self, batch: Batch) -> None:
        """Wait until the keys of `batch` are known."""
        if not batch.planned.is_set():
            if self.planner.waits_for_begin(batch):
                self.begin()
            batch.planned.wait()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The loader's own code runs inside; the recorder does not watch it."""
        with self.model.watch.paused(), random_ids.reading():
            yield

    def steps_measured(self, steps_per_batch: float) -> None:
        self.steps_per_batch += _RATE_SMOOTHING * (steps_per_batch - self.steps_per_batch)

    def close(self) -> None:
        """End the planner's thread, and a recording that watches for batches of this loader."""
        self.planner.close()
        self.model.watch.closed(self)
