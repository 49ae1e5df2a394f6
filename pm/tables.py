"""What the manager knows of a table, and the gradients that a step hands it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

import cuda_ops
from pm.history import History
from pm.keys import make_keys
from pm.rules import Rule
from pm.storage.store import RecordClass, RecordStore


@dataclass(frozen=True)
class TableSpec:
    """A table as its user declares it.

    Args:
        name: the parameter's first name in the model.
        rows: number of rows declared.
        dim: values per row.
        dtype: "float32" or "float64".
        rule: how steps update its rows.
        group: the optimizer's parameter group, whose hyperparameters the initial state follows.
        fill: called with (rows int64 `[n]`, out `[n, dim]`): writes the initial values of rows touched first.
        fill_states: the same for their optimizer state, out `[n, state_words]`; None: what the rule and group say.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    rule: Rule
    group: Mapping[str, object]
    fill: Callable[[np.ndarray, np.ndarray], None]
    fill_states: Callable[[np.ndarray, np.ndarray], None] | None = None

    @property
    def record_class(self) -> RecordClass:
        words = self.rule.state_words(self.dim)
        return RecordClass(self.dim, self.dtype, self.rule.name, words, self.rule.catches_up)


@dataclass
class Table:
    """A table that the manager holds: its spec, number, store, and the steps in which it had a gradient.

    Where its rule moves every row at every such step, `history` has them, and a record is caught up when it is needed;
    the table then has a store of its own. `begun` says whether plain PyTorch would hold optimizer state for it by now,
    `changed_at` is the version of the last such step, `swept` the slot up to which rows were caught up in turn.
    """

    spec: TableSpec
    number: int
    store: RecordStore
    gradient_steps: int = 0
    history: History | None = None
    begun: bool = False
    changed_at: int = 0
    swept: int = 0

    def begin_history(self) -> None:
        """The table's records are new, or under another rule: what it does from now on counts."""
        rule = self.spec.rule
        self.history = History(rule.kind, self.spec.dtype) if rule.catches_up else None
        self.begun, self.swept = False, 0

    def advance(
        self,
        store: RecordStore,
        slots: np.ndarray,
        grads: np.ndarray | None = None,
        scale: float = 1.0,
        version: int = 0,
        *,
        states: bool = True,
    ) -> None:
        """Bring the records at `slots` of `store` to the table's last step, which has the gradient `grads` if given.

        Without `states` only their values: see `Manager.catch_up`.
        """
        store.keep(slots)
        cuda_ops.advance(
            self.history.kind,
            store.words,
            store.stride,
            self.spec.dim,
            store.steps,
            slots,
            grads,
            self.history.steps,
            self.history.bounds,
            scale,
            version,
            states,
        )

    def keys(self, rows: np.ndarray) -> np.ndarray:
        return make_keys(self.number, rows)


@dataclass(frozen=True)
class Stretch:
    """The slots (int64 `[U]`, in `store`) of the rows of several plans, one after the other: see `pm.together`.

    Of a store that ranks share, `keys` (int64 `[U]`) are theirs in it.
    """

    slots: np.ndarray
    store: RecordStore
    keys: np.ndarray | None = None


@dataclass(slots=True)
class RowPlan:
    """The rows of one table that one batch needs: an intent, and where each row is to be found.

    `rows` (int64 `[U]`) are distinct. With one rank `slots` (int64 `[U]`) are theirs, in `store`. With several, `own`
    holds the positions in `rows` of those that are here, and `slots` their slots. The others have tickets, 0 to T - 1:
    `order[t]` is the position of ticket t, `where[t]` the rank that serves it, this one if its record has come here, -1
    while nobody has said that it does; `slots_there[t]` its slot there, if it is to be read from that rank's memory, -1
    if not; `staging[t]` then its value (there is no staging before there is such a value). `arrived` are (positions,
    slots) of the records that have come, of which `own` has the first `arrivals`.

    `asked` are the ranks that were sent tickets at first, `unplaced` is the number of tickets that nobody serves,
    `promised` has the ranks that took some over and are not ready since, `late` those that did while others were asked
    for values, `answered` those that have sent them. Of a plan that is `in_place` (see `InPlace`) owners know nothing;
    `unknown` is its number of tickets whose slots nobody has said yet. The plan is `complete` once all its rows were
    read: from then on until it is released no row of it moves.

    Of a plan that was made together with others, `slots` are those of its `stretch` from `first` on.
    """

    number: int
    table: Table
    rows: np.ndarray
    expected: int
    slots: np.ndarray
    store: RecordStore
    own: np.ndarray | None = None
    order: np.ndarray | None = None
    where: np.ndarray | None = None
    slots_there: np.ndarray | None = None
    staging: np.ndarray | None = None
    asked: list[int] = field(default_factory=list)
    arrived: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    arrivals: int = 0
    unplaced: int = 0
    promised: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)
    complete: bool = False
    released: bool = False
    in_place: bool = False
    unknown: int = 0
    stretch: Stretch | None = None
    first: int = 0


@dataclass(slots=True)
class TableGradient:
    """A step's gradient of one table on one rank.

    Args:
        table: the table.
        rows: distinct row ids, int64 `[U]`.
        values: gradient `[U, dim]`, already summed per row on this rank; of a table that is cached on a device
            (`CachedManager`) a tensor there.
        scale: factor still to be applied to `values`.
        plan: the plan whose `rows` these are, if any: then keys need not travel.
        ordinal: gradients of different ordinals are divided by their own counts before they are summed.
        counts: how often each row was looked up on this rank (int64 `[U]`), where gradients are divided by the
            frequency over all ranks; None otherwise.
        sums: the gradients of all plans that were made together with `plan`, one after the other (`[*, dim]`), of which
            `values` is the memory of this one's; None if it is by itself.
    """

    table: Table
    rows: np.ndarray
    values: np.ndarray
    scale: float = 1.0
    plan: RowPlan | None = None
    ordinal: int = 0
    counts: np.ndarray | None = None
    sums: np.ndarray | None = None
