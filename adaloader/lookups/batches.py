"""The batches of a model that are under way: which of them a lookup and a gradient belong to, and when each is
finished."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import pm
from adaloader.lookups.batch_rows import BatchRows
from adaloader.lookups.held_ids import HeldIds
from pm.same_step import ANY_BATCH, BatchRange

if TYPE_CHECKING:
    from adaloader.reading.iteration import Iteration

# A batch that the loop looks up again after a step is kept for as many steps, up to this many.
_MOST_KEPT_STEPS = 8
# Finished batches remembered, to notice that the loop still uses them.
_REMEMBERED_BATCHES = 2
# Batches of one iteration that may be open at a time; rows of those given up are fetched on demand.
_MOST_UNUSED = 16  # handed out, but not looked up
_MOST_EVALUATED = 2  # looked up without gradient, before the one that is looked up now
_MOST_TRAINED = 64  # looked up with gradient, and no step taken
# Ids that equal some of a batch are taken for its own where they are as many for each of its samples, so many, or so
# large a part of all that it has for the table and not just a few.
_MANY_IDS = 32
_SOME_IDS = 5
_TELLING_PART = 0.5


@dataclass(eq=False)
class Batch:
    """A batch that was read, from then until it is finished.

    Args:
        number: its number within its iteration of the loader.
        iteration: the iteration that it came from.
        weight: what this rank's gradient counts, and what all ranks' count together (None: not known here).
        data: the batch itself; None once the batch is finished.
        expected: the version at which it is expected to be looked up.
        tables: what it needs of each table, by number of table; replaced whole, by the planner.
        structure: see `intents.structure`; None if nothing is derived from it.
        foreseen: whether a program has said what it will look up.
        underived: names of the tables that its programs say they cannot foresee.
        features: what a program is chosen by.
        followed: by number of each program that was chosen, its lookups as (number of table, place in its sites).
        is_example: whether the choice of programs has learned from this batch.
        planned: set when the planner is done with it.
        error: what the planner raised.
        used_at: the step count when it was last looked up; None before.
        trained: whether it was looked up with gradients enabled.
        held: of a finished batch of which nothing is foreseen: what tells whether the loop looks it up again.
    """

    number: int
    iteration: Iteration
    weight: tuple[float, float | None]
    data: Any
    expected: int
    tables: dict[int, BatchRows] = field(default_factory=dict)
    structure: Hashable = None
    foreseen: bool = False
    underived: frozenset[str] = frozenset()
    features: dict[str, Any] = field(default_factory=dict)
    followed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    is_example: bool = False
    planned: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    used_at: int | None = None
    trained: bool = False
    held: HeldIds | None = None

    def was_used(self, table_number: int, place: int) -> bool:
        """Whether the loop has made the lookup that was foreseen as number `place` of a table's."""
        return table_number in self.tables and place in self.tables[table_number].used

    def plans(self) -> Iterator[pm.RowPlan]:
        return (needed.plan for needed in self.tables.values())

    def forget(self) -> None:
        """The batch is finished: keep only what tells whether a lookup is of it."""
        if self.trained and not self.tables and self.data is not None:
            self.held = HeldIds(self.data)
        self.data = None
        for needed in self.tables.values():
            needed.slab = needed.block = None


class Batches:
    """The open batches of one model.

    Invariant: `active` are the batches that were handed out and are not finished, in the order of handing out;
    `current` is the one that was last looked up with gradients enabled, finished or not.
    """

    def __init__(self, manager: pm.Manager):
        self._manager = manager
        self.active: list[Batch] = []
        self.current: Batch | None = None
        self.on_finished: Callable[[Batch], None] = lambda batch: None
        self._finished: deque[Batch] = deque(maxlen=_REMEMBERED_BATCHES)
        self._kept_steps = 0
        self._forward_goes_on = False
        self._again: Batch | None = None  # the finished batch that the forward pass that goes on is of
        self._stepped: Batch | None = None  # the last one that a step was for, and the numbers of the optimizers
        self._stepped_by: set[int] = set()

    def of(self, iteration: Iteration) -> list[Batch]:
        return [batch for batch in self.active if batch.iteration is iteration]

    def unused(self, iteration: Iteration) -> list[Batch]:
        return [batch for batch in self.active if batch.iteration is iteration and batch.used_at is None]

    # Lookups

    def candidates(self, table_number: int) -> list[Batch]:
        """Return the active batches that intend rows of the table, the current one first."""
        active = self.active
        if len(active) == 1:  # as almost always, and once per lookup
            return [active[0]] if table_number in active[0].tables else []
        found = [batch for batch in active if table_number in batch.tables]
        if self.current in found and found[0] is not self.current:
            found.remove(self.current)
            found.insert(0, self.current)
        return found

    def may_be_of(self, batch: Batch, table_number: int, ids: np.ndarray) -> bool:
        """Whether a lookup whose ids equal some that are foreseen for `batch` may be that one.

        Few ids (of a loop that looks up sample by sample) may equal those of another batch by chance, and then its
        gradient would count what that batch counts.
        """
        if len(self.active) == 1 or not torch.is_grad_enabled() or _tells(batch, batch.tables[table_number], ids):
            return True
        goes_on = self._forward_goes_on and self.current in self.active
        expected = self.current if goes_on else self._guess(len(ids))
        if expected is None or batch is expected or batch.iteration is not expected.iteration:
            return True
        return batch.used_at is None and not goes_on

    def used(self, batch: Batch) -> None:
        """A lookup was matched to `batch`."""
        if self.current is batch and self._forward_goes_on and batch.trained and batch.used_at == self._manager.steps:
            return  # as of the lookup before
        if torch.is_grad_enabled():
            self.current, batch.trained = batch, True
            self._forward_goes_on, self._again = True, None
        first = batch.used_at is None
        batch.used_at = self._manager.steps
        if first:
            batch.iteration.first_used(batch)
            self._give_up_before(batch)

    def looked_up_late(self, table_number: int, ids: np.ndarray) -> bool:
        """Return whether these are ids of a batch that is finished; if so, keep batches for longer from now on."""
        if self._forward_goes_on and self.current in self.active:
            return False  # few ids, which this forward looks up unforeseen, may have been another batch's by chance
        due = self._guess(len(ids))
        is_next_due = due in self.active and due.used_at is None
        for batch in self._finished:
            needed = batch.tables.get(table_number)
            if needed is None or is_next_due and not _tells(batch, needed, ids):
                continue
            if needed.positions_of(ids) is not None:
                self._take_up_again(batch)
                return True
        return False

    def _take_up_again(self, batch: Batch) -> None:
        """The loop looks a finished batch up: keep batches for longer from now on."""
        if batch is not self._again:
            self._kept_steps = min(self._kept_steps + 1, _MOST_KEPT_STEPS)
        if torch.is_grad_enabled():
            self.current, self._forward_goes_on, self._again = batch, True, batch

    @property
    def expects_no_lookup(self) -> bool:
        """Whether a lookup that matches no batch is for none: inference between steps, outside of a loader's loop."""
        if torch.is_grad_enabled() or self._forward_goes_on:
            return False
        return all(batch.used_at is not None and batch.iteration.trains for batch in self.active)

    def unmatched(self, ids: np.ndarray, samples: int) -> Batch | None:
        """Return the batch that a lookup probably belongs to though no plan foresaw it; with gradients, it is in use
        now. `samples` is how many samples the lookup is of, or some number for each of them."""
        if not torch.is_grad_enabled():
            return self.active[-1] if self.active else None
        batch = self._guess(samples)
        if not self._goes_on:
            batch = self._holder_of(ids, batch) or batch
        if batch in self.active:
            self.used(batch)
        elif batch is not None and batch.held is not None and not self._goes_on:
            self._take_up_again(batch)
        return batch

    def _holder_of(self, ids: np.ndarray, guess: Batch | None) -> Batch | None:
        """Return the batch of which nothing is foreseen, under way or just finished, that has these very ids where the
        one that was guessed has not."""
        finished = [batch for batch in reversed(self._finished) if batch.held is not None]
        if len(ids) < _SOME_IDS or len(self.active) + len(finished) < 2:
            return None
        under_way = [batch for batch in self.active if not batch.tables]
        if guess in under_way and HeldIds(guess.data).have(ids):
            return None
        others = (batch for batch in finished + under_way if batch is not guess)
        return next((batch for batch in others if (batch.held or HeldIds(batch.data)).have(ids)), None)

    @property
    def _goes_on(self) -> bool:
        """Whether what is looked up now is of the forward pass of the current batch."""
        return self._forward_goes_on and (self.current in self.active or self.current is self._again)

    def _guess(self, samples: int | None) -> Batch | None:
        """Without a match: the current batch until its backward, then the next that the loop has not used yet."""
        if self._goes_on:
            return self.current
        waiting: dict[Iteration, list[Batch]] = {}
        for batch in self.active:
            if batch.used_at is None and batch.iteration.trains:
                waiting.setdefault(batch.iteration, []).append(batch)
        guesses = [guess for iteration, batches in waiting.items() if (guess := _next_of(iteration, batches, samples))]
        fitting = [guess for guess in guesses if _fits(guess, samples)]
        return (fitting or guesses or [self.current])[0]

    def backward_goes_on(self) -> None:
        """What is looked up from now on is of the next forward pass."""
        self._forward_goes_on, self._again = False, None

    def weight(self) -> tuple[float, float | None] | None:
        """A backward begins: return the weight of the batch that it belongs to, None if there was none yet."""
        if not self._forward_goes_on:
            batch = self._guess(None)
            if batch in self.active:
                self.used(batch)
        self._forward_goes_on, self._again = False, None
        return None if self.current is None else self.current.weight

    def weight_in_step(self, optimizer: int) -> tuple[float, float | None] | None:
        """A step begins whose gradients are summed in it: return the weight of the batch that they belong to.

        Where nothing of that batch was looked up, and it had no backward, it is the next one. Not so in the step that a
        further optimizer takes for the same batch: the loop may hold the next, which its lookups will need.
        """
        current = self.current
        if current is not None:
            is_stepped_already = current is self._stepped and optimizer not in self._stepped_by
            if is_stepped_already or current.used_at == self._manager.steps:
                self._forward_goes_on, self._again = False, None
                return current.weight
        return self.weight()

    def of_plan(self, table_number: int, plan: pm.RowPlan | None) -> Batch | None:
        """Return the batch under way that brought rows of a table by `plan`."""
        if plan is None:
            return None
        return next((b for b in self.active if table_number in b.tables and b.tables[table_number].plan is plan), None)

    def of_step(self) -> BatchRange:
        """Return which batches the step that is taken now may be for; nothing (`ANY_BATCH`) where ranks have batches of
        their own, or where no lookup since the step before tells.

        Besides the one looked up last, these are all that the loop holds: which of them a lookup belongs to is found
        by comparing ids, and ranks may find differently.
        """
        current = self.current
        if current is None or current.used_at != self._manager.steps or current.iteration.loader is None:
            return ANY_BATCH
        loader = current.iteration.loader
        numbers = [current.number, *(b.number for b in self.active if b.iteration.loader == loader)]
        return loader, min(numbers), max(numbers)

    # From handing out to the end

    def handed_out(self, batch: Batch) -> None:
        waiting = self.unused(batch.iteration)
        self.drop(waiting[: max(0, len(waiting) + 1 - _MOST_UNUSED)])
        self.active.append(batch)
        if batch.iteration.trains and (self.current is None or self.current not in self.active):
            self.current = batch

    def _give_up_before(self, batch: Batch) -> None:
        """Do not let batches pile up in loops that take no steps."""
        earlier = [b for b in self.of(batch.iteration) if b.used_at is not None and b is not batch]
        evaluated = [b for b in earlier if not b.trained]
        trained = [b for b in earlier if b.trained]
        given_up = evaluated[:-_MOST_EVALUATED] + trained[:-_MOST_TRAINED]
        self._finished.extend(given_up)
        self.drop(given_up)

    def drop(self, batches: list[Batch]) -> None:
        """Finish `batches` without a step."""
        if not batches:
            return
        for batch in batches:
            if batch.used_at is not None:
                self.on_finished(batch)
            batch.forget()
            for plan in batch.plans():
                self._manager.release(plan)
        self.active = [batch for batch in self.active if batch not in batches]

    def finish_used(self, optimizer: int | None = None) -> list[pm.RowPlan]:
        """A step ends: finish the batches that it was for, and return their plans, for the step to release.

        `optimizer` is the number of that which took it, None in a step of the others that this rank takes along.
        """
        steps = self._manager.steps
        if optimizer is not None:
            if self.current is not self._stepped or optimizer in self._stepped_by:
                self._stepped, self._stepped_by = self.current, set()
            self._stepped_by.add(optimizer)
        done = [b for b in self.active if b.used_at is not None and steps - b.used_at >= self._kept_steps]
        last = {batch.iteration: batch.number for batch in done}
        done += [b for b in self.active if b.used_at is None and b.number < last.get(b.iteration, -1)]
        self.active = [batch for batch in self.active if batch not in done]
        self._finished.extend(done)
        for batch in done:
            if batch.used_at is not None:
                self.on_finished(batch)
            batch.forget()
        return [plan for batch in done for plan in batch.plans()]


def _next_of(iteration: Iteration, waiting: list[Batch], samples: int | None) -> Batch | None:
    """Return which of an iteration's `waiting` batches the loop works on next; None if that was not handed out yet."""
    ahead = iteration.ahead
    if ahead is not None and len(waiting) <= ahead and not iteration.ended:
        return None  # the loop always holds so many
    at = 0 if ahead is None else max(0, len(waiting) - 1 - ahead)
    fitting = [batch for batch in waiting if _fits(batch, samples)]
    return waiting[at] if waiting[at] in fitting or not fitting else fitting[-1]


def _fits(batch: Batch, samples: int | None) -> bool:
    """Whether a lookup of so many samples, or with some ids for each, may be of as many as the batch has, where its
    weight is their number."""
    its_own = batch.weight[0]
    return samples is None or (its_own > 0 and samples % its_own == 0)


def _tells(batch: Batch, needed: BatchRows, ids: np.ndarray) -> bool:
    """Whether ids that equal some of what is foreseen for `batch` tell that a lookup is of it."""
    if len(ids) >= _MANY_IDS or batch.weight[0] > 1 and _fits(batch, len(ids)):
        return True
    return len(ids) >= _SOME_IDS and len(ids) >= _TELLING_PART * needed.ids_foreseen
