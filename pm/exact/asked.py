"""What an owner knows of the rows that one rank has asked for: which plan, which slots, what was sent when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

import cuda_ops
from pm.messages import Kind
from pm.tables import Table


@dataclass(frozen=True)
class Request:
    """Rows that `asker` asked for, wherever they are.

    Args:
        what: INTENT, PULL, PULL_STATES or LOCATE.
        asker: the rank.
        number: of its plan, pull or location.
        version: at which it expects to use the rows; LOCATE: the step for which they are to stay.
        tickets: int64 `[n]`, what the asker calls the rows, ascending.
        rows: int64 `[n]`, distinct.
    """

    what: Kind
    asker: int
    number: int
    table: Table
    version: int
    tickets: np.ndarray
    rows: np.ndarray

    def part(self, positions: np.ndarray) -> Request:
        return replace(self, tickets=self.tickets[positions], rows=self.rows[positions])


@dataclass
class AskedPlan:
    """One plan of a rank, as far as this owner is concerned.

    `rows` are those of its rows that this owner has, `slots` their slots here, and `tickets` what the rank calls them
    (ascending; see `RowPlan`). `sent_at[i]` is the version at which row i was last sent (-1: never), `due[i]` that from
    which no known intent touches it before the plan uses it; `copied[i]` says whether the rank has had a copy of it.
    Rows are not sent early before version `next_due`, which is 0 until they were first looked at. `pending` is the last
    step for which the plan has a gradient. The rank of a `direct` plan reads these rows in this rank's memory: it is
    sent none. `held` says whether the rows are kept here for the plan (see `SlotNotes`). `arrived` are (rows, slots) of
    those that have come here since, where the plan is this rank's own.
    """

    number: int
    table: Table
    rows: np.ndarray
    slots: np.ndarray
    tickets: np.ndarray
    expected: int
    due: np.ndarray
    sent_at: np.ndarray
    copied: np.ndarray
    next_due: int = 0
    pending: int = -1
    arrived: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    direct: bool = False
    held: bool = True

    @classmethod
    def of(cls, number, table, rows, slots, tickets, expected, due, direct=False, held=True) -> AskedPlan:
        """Return a plan of which nothing was sent."""
        sent_at, copied = np.full(len(rows), -1, np.int64), np.zeros(len(rows), bool)
        made = cls(number, table, rows, slots, tickets, expected, due, sent_at, copied)
        made.direct, made.held = direct, held
        return made

    _BY_ROW: ClassVar = ("rows", "slots", "tickets", "due", "sent_at", "copied")

    def extend(self, part: AskedPlan) -> None:
        """More rows of the plan are here."""
        order = np.argsort(np.concatenate([self.tickets, part.tickets]), kind="stable")
        for name in self._BY_ROW:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(part, name)])[order])
        self.next_due = 0

    def keep(self, kept: np.ndarray) -> None:
        """Rows but those that are `kept` (bool `[n]`) have left."""
        *columns, copied = (getattr(self, name) for name in self._BY_ROW)
        self.copied, columns = cuda_ops.compress(kept, copied, *columns)
        for name, column in zip(self._BY_ROW[:-1], columns, strict=True):
            setattr(self, name, column)


@dataclass
class AskedRows:
    """All live plans of one rank. `seen` is the highest plan number received, `horizon` the latest version intended.

    `overtaken` has, by plan number, requests for its rows that others sent on before the plan's own INTENT was here.
    """

    plans: dict[int, AskedPlan] = field(default_factory=dict)
    overtaken: dict[int, list[Request]] = field(default_factory=dict)
    seen: int = -1
    horizon: int = -1

    def add(self, plan: AskedPlan) -> None:
        self.plans[plan.number] = plan
        self.seen = max(self.seen, plan.number)
        self.horizon = max(self.horizon, plan.expected)

    def due_by(self, version: int) -> Iterator[AskedPlan]:
        """Plans that may be used at `version`: what is stale of them must be sent before READY."""
        return (plan for plan in self.plans.values() if plan.expected <= version)

    def early(self, version: int, horizon: int) -> Iterator[AskedPlan]:
        """Plans for later versions, up to which all ranks' intents are known (`horizon`), with rows that are due.

        Not of tables whose every step moves every row: what is sent early would be stale when it is needed. A plan is
        looked at when it is new and when it is the next, not at each step between: messages are few and large.
        """
        return (
            plan
            for plan in self.plans.values()
            if version < plan.expected <= horizon + 1
            and plan.next_due <= version
            and (plan.next_due == 0 or plan.expected == version + 1)
            and plan.table.history is None
            and not plan.direct
        )
