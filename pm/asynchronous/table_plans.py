"""Plans for rows of tables, whose keys several of them intend together: see `eventual.py`."""

from __future__ import annotations

import numpy as np

from pm.asynchronous.claims import Claims, Clock, Intent
from pm.asynchronous.table_groups import Span
from pm.tables import RowPlan


class TablePlan(RowPlan):
    """A `RowPlan` with the keys of its rows (int64 `[n]`), and the part of an intent that stands for it.

    `joint` is None until the plans of a batch are intended together, and for a plan that was over by then.
    """

    def __init__(self, *args, span: Span):
        super().__init__(*args)
        self.group, self.keys = span.group, span.keys(self.rows)
        self.joint: _Joint | None = None
        self.part = slice(0)

    @property
    def places(self) -> np.ndarray | None:
        """Where the keys were when last seen (`Holdings.places`), a view; None if the intent was not acted on."""
        places = None if self.joint is None else self.joint.intent.places
        return None if places is None else places[self.part]


class _Joint:
    """An intent for the keys of several plans; `count` of them are not released."""

    def __init__(self, intent: Intent, count: int):
        self.intent, self.count = intent, count


class JointIntents:
    """Intends the keys of plans for the same clock together. Its caller holds the lock of the manager's structure."""

    def __init__(self, claims: Claims, clock: Clock):
        self._claims, self._clock = claims, clock
        self._gathered: list[TablePlan] = []

    def add(self, plan: TablePlan) -> None:
        """Intend the keys of a plan with the next `flush`."""
        self._gathered.append(plan)

    def flush(self) -> None:
        """Intend the keys of what was added; tables are in one intent each time that their plans are for one clock."""
        gathered, self._gathered = self._gathered, []
        alike: dict[tuple[int, int, int], list[TablePlan]] = {}
        times: dict[tuple[int, int], int] = {}
        for plan in gathered:
            if not plan.released:
                # Keys of one intent are distinct: plans for the same table are in different ones.
                of_table = plan.table.number, plan.expected
                times[of_table] = times.get(of_table, 0) + 1
                alike.setdefault((plan.group, plan.expected, times[of_table]), []).append(plan)
        for (group, expected, _), plans in alike.items():
            keys = plans[0].keys if len(plans) == 1 else np.concatenate([plan.keys for plan in plans])
            joint = _Joint(self._claims.intend(self._clock, group, keys, expected, None), len(plans))
            end = 0
            for plan in plans:
                plan.joint, plan.part = joint, slice(end, end + len(plan.keys))
                end += len(plan.keys)

    def release(self, plan: TablePlan) -> None:
        """A plan is over; the intent is when all of its plans are."""
        plan.released = True
        if plan.joint is not None:
            plan.joint.count -= 1
            if plan.joint.count == 0:
                self._claims.finish(plan.joint.intent)
