"""One pass over a loader: what happens to each of its batches between reading and handing out, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaloader.lookups.batches import Batch
from adaloader.planning.random_ids import Stream, batch_begins, pass_ends

if TYPE_CHECKING:
    from adaloader.reading.feed import Feed
    from adaloader.reading.following import Following
    from adaloader.reading.lookahead import Place

# A loop that was handed more batches than this and has looked up none reads them for something else than training.
_MOST_AHEAD_UNSEEN = 2
# So many batches after the one handed out are planned, and this share of those that are read ahead.
_ALWAYS_PLANNED = 2
_SHARE_PLANNED = 0.75


class Iteration:
    """Follows the batches of one iterator; a loader may have several at a time.

    `ahead` is how many batches the loop holds beyond the one that it works on (None: not known yet), `steps_of_a_batch`
    how many steps the batch before the last one took.

    Args:
        feed: of the loader.
        weight_of: called with (number, batch): this rank's weight and the sum of all (None: unknown).
        start: number of the first batch.
        following: what to do at the end where ranks may have different numbers of batches.
        stream: of the random ids that the loop draws in this pass.
        end: the number after the last batch, if no rank has more; None if it is not known now. Then `place` may tell
            it later, if it is set.
        loader: its number, if ranks share each of its batches.
    """

    def __init__(
        self,
        feed: Feed,
        weight_of: Callable[[int, Any], tuple[float, float | None]],
        start: int,
        following: Following | None,
        stream: Stream,
        end: int | None = None,
        loader: int | None = None,
    ):
        self.feed = feed
        self.following = following
        self.stream = stream
        self.loader = loader
        self.trains = feed.steps_expected
        self.ended = False
        self.ahead: int | None = None
        self.steps_of_a_batch: int | None = None
        self._model = feed.model
        self._weight_of = weight_of
        self._read: dict[int, Batch] = {}
        self._start = self._next_handed = start
        self._first_unplanned: int | None = None
        self._newest_read: int | None = None
        self._last_used: tuple[int, int] | None = None
        self._steps_when_handed: int | None = None
        self._used_since_step = 0
        self._steps_after_taking: int | None = None
        self._steps_at_once = 1
        self._sums_when_used = 0
        self._end = end
        self.place: Place | None = None
        self._model.watch.iterations.add(self)

    # Called by the loader's iterator

    def on_read(self, number: int, data: Any) -> None:
        batch = Batch(number, self, self._weight_of(number, data), data, self._expected_version(number))
        self.feed.plan(batch)
        self._read[number] = batch
        self._first_unplanned = number if self._first_unplanned is None else self._first_unplanned

    def on_yield(self, number: int, data: Any) -> None:
        batch, model = self._read[number], self._model
        self._plan_when_near(number)
        model.watch.end_if_used()
        self._wait_for_keys(batch)
        if batch.error is not None:
            raise batch.error
        if self.feed.derives:
            model.watch.handed_out(batch, model.batches.active)
        if self.feed.intends:
            model.coverage.batch_begins(model)
        del self._read[number]
        self._steps_when_handed = self._steps_since_use()
        self._next_handed = number + 1
        model.batches.handed_out(batch)
        self._loop_has_asked()
        batch_begins(self.stream, number, model.watch)

    def on_end(self, reason: str) -> None:
        if self.ended:  # found out before
            return
        if reason == "left" and self._is_over():
            reason = "exhausted"
        model = self._model
        self._loop_has_asked()
        self.ended = True
        self.stream.is_over = reason == "exhausted"
        has_work_left = reason == "exhausted" and self._has_work_left()
        if not has_work_left:
            pass_ends(self.stream)
        if reason == "exhausted":
            model.watch.exhausted()
            if not has_work_left:
                model.watch.left(self)
            model.batches.drop([batch for batch in model.batches.of(self) if batch.used_at is not None])
        else:
            self.leave()
        if self.following is not None:
            self.following.iteration_is_worked_off = self._is_worked_off
            self.following.gradient_was_not_stepped = self._gradient_was_not_stepped
            handed_out = self._next_handed > self._start
            self.following.ended(reason, handed_out=handed_out, later=has_work_left)
        if reason == "exhausted" and self.trains:
            model.epoch_ended(later=has_work_left)

    def end_if_over(self) -> None:
        """The loader is iterated again, or closed: a loop that has worked on its last batch need not have asked for
        another."""
        if not self.ended and self._is_over():
            self.on_end("exhausted")

    # Called by whoever sees what the loop does with the batches

    def first_used(self, batch: Batch) -> None:
        steps = self._model.manager.steps
        self.ahead = max(0, self._next_handed - 1 - batch.number)
        if self._last_used is not None and batch.number > self._last_used[0]:
            taken = steps - self._last_used[1]
            self.steps_of_a_batch = taken
            self.feed.steps_measured(taken / (batch.number - self._last_used[0]))
            if taken:
                self._note_when_stepped(taken)
        self._last_used = (batch.number, steps)
        self._used_since_step += 1
        if self.following is not None:
            self._sums_when_used = self._model.reducer.backwards
            self.following.batch_begun()

    def plan_again(self) -> None:
        """More is known now of what batches look up: plan those that are read, and those handed out and not yet
        used."""
        waiting = [b for b in self._model.batches.unused(self) if b.data is not None and not b.tables]
        for batch in [*self._read.values(), *waiting]:
            self.feed.await_planned(batch)
            for plan in batch.plans():
                self._model.manager.release(plan)
            batch.tables, batch.error = {}, None
            batch.planned.clear()
            batch.expected = self._expected_version(batch.number)
            self.feed.plan(batch)
        self.feed.begin()
        for batch in waiting:
            self._wait_for_keys(batch)

    def leave(self) -> None:
        """The loop is over before its end: forget what was read for it."""
        self._model.watch.left(self)
        for batch in self._read.values():
            self.feed.await_planned(batch)
        read, self._read = list(self._read.values()), {}
        self._model.batches.drop(read + self._model.batches.of(self))

    def unused_at_the_end(self) -> int:
        """Return how many of the batches handed out last the loop has not worked on."""
        last_used = self._start - 1 if self._last_used is None else self._last_used[0]
        return sum(batch.number > last_used for batch in self._model.batches.unused(self))

    # Within

    def _loop_has_asked(self) -> None:
        if self._model.joint_writes is not None:
            self._model.joint_writes.batch_asked_for()

    def _plan_when_near(self, number: int) -> None:
        """Batch `number` is handed out: have those planned that wait for it, once the first of them comes near.

        So they are planned several in a row (see `planner.py`), and yet most of what is read is planned. Of several
        ranks, which wait for each other in each step, each plans as it reads: steps are to take them equally long.
        """
        newest = next(reversed(self._read))
        was_read, self._newest_read = newest != self._newest_read, newest
        if self._first_unplanned is not None:
            ahead = self._first_unplanned - number
            near = max(_ALWAYS_PLANNED, _SHARE_PLANNED * (newest - number))
            if not was_read or ahead <= near or self._model.ranks > 1:
                self._first_unplanned = None
                self.feed.begin()

    def _steps_since_use(self) -> int | None:
        """Return the steps since the batch that was taken up last was first looked up; None if there was none."""
        return None if self._last_used is None else self._model.manager.steps - self._last_used[1]

    def _note_when_stepped(self, taken: int) -> None:
        """The loop has taken steps for the batches used since the step before: was that after it took the next?

        `_steps_after_taking` is how many batches it accumulates then, None if it steps first.
        """
        after = self.ahead == 0 and self._steps_when_handed is not None and self._steps_when_handed < taken
        self._steps_after_taking = self._used_since_step if after else None
        self._steps_at_once = taken
        self._used_since_step = 0

    def _has_work_left(self) -> bool:
        """Whether the loop, which has taken the end, will still work on a batch that it has."""
        if self.ahead is None and self._next_handed - self._start > _MOST_AHEAD_UNSEEN:
            return False
        if self.ahead != 0 and self._model.batches.unused(self):
            return True
        # It may take the next batch before it steps: so it was with the one before, or, in a loop that accumulates,
        # with as many as it has worked on since its last step.
        taken = self._steps_since_use()
        if taken is None or taken != self._steps_when_handed:
            return False
        accumulated = taken == 0 and self._used_since_step == self._steps_after_taking
        return accumulated or taken < (self.steps_of_a_batch or 0)

    def _is_over(self) -> bool:
        """Whether the loop has had all batches, and has stepped for the last."""
        end = self._end if self.place is None or self._end is not None else self.place.end
        return end is not None and self._next_handed >= end and self._is_worked_off()

    def _is_worked_off(self) -> bool:
        """Whether the loop has taken as many steps for the last batch as for the one before it (if it accumulates: as
        when it last stepped).
        """
        if self._model.batches.unused(self) or self._last_used is None:
            return False
        return self._model.manager.steps - self._last_used[1] >= (self.steps_of_a_batch or self._steps_at_once)

    def _gradient_was_not_stepped(self) -> bool:
        """Whether the last batch has had a backward and no step: the loop accumulates, and leaves some at the end."""
        if self._model.batches.unused(self) or self._last_used is None:
            return False
        return self._steps_since_use() == 0 and self._model.reducer.backwards > self._sums_when_used

    def _expected_version(self, number: int) -> int:
        used, steps = self._last_used or (self._next_handed, self._model.manager.steps)
        return steps + int((number - used) * self.feed.steps_per_batch)

    def _wait_for_keys(self, batch: Batch) -> None:
        if not batch.planned.is_set():
            started = time.perf_counter()
            self.feed.await_planned(batch)
            waited = time.perf_counter() - started
            self._model.manager.traffic.wait_seconds += waited
            self._model.manager.traffic.seconds["waiting"] += waited
