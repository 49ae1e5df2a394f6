"""What an owner knows of the rows that one rank has asked for: which plan, which slots, what was sent when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pm.tables import Table


@dataclass
class AskedPlan:
    """One plan of a rank, as far as this owner is concerned.

    `rows` are those of its rows that this owner has and `slots` their slots here; `sent_at[i]` is the version at which
    row i was last sent (-1: never), `due[i]` that from which no known intent touches it before the plan uses it. Rows
    are not sent early before version `next_due`.
    """

    number: int
    table: Table
    rows: np.ndarray
    slots: np.ndarray
    expected: int
    due: np.ndarray
    sent_at: np.ndarray
    next_due: int = 0


@dataclass
class AskedRows:
    """All live plans of one rank. `seen` is the highest plan number received, `horizon` the latest version intended."""

    plans: dict[int, AskedPlan] = field(default_factory=dict)
    seen: int = -1
    horizon: int = -1

    def add(self, plan: AskedPlan) -> None:
        self.plans[plan.number] = plan
        self.seen = max(self.seen, plan.number)
        self.horizon = max(self.horizon, plan.expected)

    def remove(self, numbers: np.ndarray) -> None:
        for number in numbers.tolist():
            self.plans.pop(number, None)

    def due_by(self, version: int) -> Iterator[AskedPlan]:
        """Plans that may be used at `version`: what is stale of them must be sent before READY."""
        return (plan for plan in self.plans.values() if plan.expected <= version)

    def early(self, version: int, horizon: int) -> Iterator[AskedPlan]:
        """Plans for later versions, up to which all ranks' intents are known (`horizon`), with rows that are due.

        Not of tables whose every step moves every row: what is sent early would be stale when it is needed.
        """
        return (
            plan
            for plan in self.plans.values()
            if version < plan.expected <= horizon + 1 and plan.next_due <= version and plan.table.history is None
        )
