"""Learning what batches look up: a recorder watches a step now and then, and the programs that it gives are kept."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaloader.lookups.batches import Batch
from adaloader.planning.coverage import remedy
from adaloader.planning.kinds import UNKNOWN, Kinds
from adaloader.planning.random_ids import planning
from intents import Program, Recorder, Recording, ReplayError, Site, remove_leftovers

if TYPE_CHECKING:
    from adaloader.reading.feed import Feed
    from adaloader.reading.iteration import Iteration

log = logging.getLogger("adaloader")

# Batches of one structure are watched at most this often, however often a lookup was not foreseen.
_MOST_RECORDINGS = 8
# And all of them together, if every batch should have a structure of its own.
_MOST_RECORDINGS_IN_ALL = 32
# A step without a lookup teaches nothing; after so many only a lookup starts another recording.
_MOST_FRUITLESS = 3
# Steps without a lookup in one recording: a loop may take its next batch just before it steps.
_MOST_IDLE_STEPS = 1
# Rows of one lookup that were missed and are counted; rows that are intended because they were missed twice.
_MOST_MISSED = 8
_MOST_STANDING = 16
_MOST_COUNTED = 1024
# Batches handed out while a recording waits for its first lookup.
_MOST_WATCHED_BATCHES = 16


class Watch:
    """Watches steps of one model, for all its loaders.

    Invariant: `recorder` is None, or watches the trainer's thread and knows the batches `_watched`; it is told of
    lookups until the step, or the handing out, that follows the first of them.
    """

    def __init__(self):
        self.kinds: dict[Hashable, Kinds] = {}
        self.recorder: Recorder | None = None
        self.iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()
        self._watched: dict[int, Batch] = {}
        self._lookups = 0
        self._idle_steps = 0
        self._recordings: Counter[Hashable] = Counter()
        self._wanted: set[Hashable] = set()
        self._fruitless = 0
        self.underived: dict[tuple[str, str], Site] = {}
        self._missed: dict[str, Counter[int]] = {}
        self.standing: dict[str, np.ndarray] = {}

    @property
    def recordings(self) -> int:
        """Steps that were watched to their end."""
        return self._recordings.total()

    @property
    def programs(self) -> list[Program]:
        """All that was learned and is kept."""
        return [program for kinds in list(self.kinds.values()) for program in list(kinds.programs)]

    # What happens in the loop

    def handed_out(self, batch: Batch, open_batches: list[Batch]) -> None:
        """A batch that keys are derived from is about to be handed out; `open_batches` were before and are not
        finished."""
        if self.recorder is None:
            if not self._is_to_be_watched(batch):
                return
            self.recorder, self._lookups, self._idle_steps = Recorder(), 0, 0
            self.recorder.start()
            for earlier in open_batches:
                self._add(earlier)
        elif len(self._watched) >= _MOST_WATCHED_BATCHES:
            self._abandon()
            return
        self._add(batch)

    def lookup(self, table: str, ids: torch.Tensor, operation: str, on_host: np.ndarray) -> None:
        if self.recorder is not None:
            self._lookups += 1
            self.recorder.lookup(table, ids, operation, on_host)

    def not_foreseen(self, batch: Batch, table: str, ids: np.ndarray) -> None:
        """A lookup of `ids` (int64 `[n]`), probably for `batch`, was not among those that its programs had foreseen.

        If another program foresees it, the batch is an example for that one; if none does, batches like it are watched.
        """
        kinds = self.kinds.get(batch.structure)
        if kinds is None and batch.structure is not None:
            self._wanted.add(batch.structure)
        if kinds is None or table in batch.underived or batch.is_example or batch.data is None:
            return
        batch.is_example = True
        if self._recordings[batch.structure] >= _MOST_RECORDINGS and len(kinds.programs) < 2:
            return
        label = self._followed(kinds, batch, table, ids)
        if label != UNKNOWN or self._may_record(batch.structure):
            kinds.teach(batch.features, label)

    def missed(self, table: str, rows: np.ndarray) -> None:
        """Distinct `rows` (int64 `[n]`) came on demand, beside others that were intended: a padding row, say, or a
        mask's. What comes again is intended from then on, with whatever is guessed for that table."""
        if len(rows) > _MOST_MISSED:
            return
        counts = self._missed.setdefault(table, Counter())
        counts.update(rows.tolist())
        again = [row for row, count in counts.most_common(_MOST_STANDING) if count > 1]
        if len(again) > len(self.standing.get(table, ())):
            self.standing[table] = np.array(sorted(again), np.int64)
        if len(counts) > _MOST_COUNTED:
            self._missed[table] = Counter(dict.fromkeys(again, 2))

    def _followed(self, kinds: Kinds, batch: Batch, table: str, ids: np.ndarray) -> int:
        """Return the program that says that `batch` looks up `ids`, or UNKNOWN."""
        for label, program in enumerate(kinds.programs):
            if label in batch.followed:
                continue
            # A program that fails is not the one.
            with contextlib.suppress(ReplayError), planning(batch.iteration.stream, batch.number):
                for site, foreseen in program.replay(batch.data):
                    if site.table == table and np.array_equal(foreseen, ids):
                        return label
        return UNKNOWN

    def finished(self, batch: Batch) -> None:
        """A batch was looked up, and is over: it is an example of the program that it followed, if that is of use."""
        kinds = self.kinds.get(batch.structure)
        if kinds is None or batch.is_example or not kinds.is_ambiguous:
            return
        done = [label for label, sites in batch.followed.items() if all(batch.was_used(*site) for site in sites)]
        if done:
            kinds.teach(batch.features, max(done, key=lambda label: len(batch.followed[label])))

    def paused(self) -> contextlib.AbstractContextManager:
        """What runs inside is ours: the recorder, if there is one, does not see it."""
        return contextlib.nullcontext() if self.recorder is None else self.recorder.paused()

    def step_begins(self) -> None:
        if torch._C._current_graph_task_id() >= 0:  # in a hook: autograd would put the recorder's mode back afterwards
            return
        self.end_if_used()
        if self.recorder is not None:
            self._idle_steps += 1
            if self._idle_steps > _MOST_IDLE_STEPS:
                self._abandon()

    def end_if_used(self) -> None:
        """End the recording if it has seen a lookup, and learn from it."""
        remove_leftovers()
        if self.recorder is None or not self._lookups:
            return
        recorder, self.recorder = self.recorder, None
        watched, self._watched = self._watched, {}
        self._learn(recorder.stop(), watched)

    def exhausted(self) -> None:
        """A loop has got its last batch: what took steps and looked up nothing until now is not worth waiting for."""
        self.end_if_used()
        if self.recorder is not None and self._idle_steps:
            self._abandon()

    def __del__(self) -> None:
        if self.recorder is not None:  # its model is gone
            self.recorder.abandon()

    def left(self, iteration: Iteration) -> None:
        """The loop over `iteration` was left: a recording of its batches has lost its end."""
        remove_leftovers()
        if any(batch.iteration is iteration for batch in self._watched.values()):
            self._abandon(fruitless=False)

    def closed(self, feed: Feed) -> None:
        """No loop over the batches of `feed` goes on."""
        remove_leftovers()
        if any(batch.iteration.feed is feed for batch in self._watched.values()):
            self._abandon(fruitless=False)

    # Within

    def _is_to_be_watched(self, batch: Batch) -> bool:
        if not self._may_record(batch.structure):
            return False
        if not batch.foreseen:
            return self._fruitless < _MOST_FRUITLESS or batch.structure in self._wanted
        kinds = self.kinds.get(batch.structure)
        return kinds is not None and (kinds.is_unknown(batch.features) or kinds.is_new(batch.features))

    def _may_record(self, structure: Hashable) -> bool:
        all_of_them = self._recordings.total()
        return self._recordings[structure] < _MOST_RECORDINGS and all_of_them < _MOST_RECORDINGS_IN_ALL

    def _add(self, batch: Batch) -> None:
        if batch.data is not None:
            number = len(self._watched)
            self._watched[number] = batch
            self.recorder.add_batch(number, batch.data)

    def _abandon(self, *, fruitless: bool = True) -> None:
        recorder, self.recorder = self.recorder, None
        self._watched = {}
        self._fruitless += fruitless
        recorder.abandon()

    def _learn(self, recording: Recording, watched: dict[int, Batch]) -> None:
        """Keep the programs of the batches that were looked up, and have what was read before they were known
        planned."""
        for structure in {batch.structure for batch in watched.values()}:
            self._recordings[structure] += 1
        if recording.abandoned is not None:
            log.info("the watched step gave no keys: %s", recording.abandoned)
            return
        self._fruitless = 0
        learned = [(recording.program(number), batch) for number, batch in watched.items()]
        kept = [self._keep(program, batch) for program, batch in learned if program.sites]
        sites = [*recording.sites, *(site for program in kept for site in program.sites)]
        given = frozenset.intersection(*(batch.iteration.feed.given_tables for batch in watched.values()))
        for site in sites:
            if site.reason is not None and site.table not in given:
                self._say_underived(site)
        for iteration in list(self.iterations):
            iteration.plan_again()

    def _keep(self, program: Program, batch: Batch) -> Program:
        batch.is_example = True
        return self.kinds.setdefault(program.structure, Kinds()).keep(program, batch.features)

    def _say_underived(self, site: Site) -> None:
        said = (site.table, site.where)
        if said in self.underived:
            return
        self.underived[said] = site
        if site.among is not None:
            log.info(
                "the keys of table %r at %s (%s) are not derived: %s. As they were some of %s, all of that is intended",
                site.table,
                site.where,
                site.operation,
                site.reason,
                site.held_by,
            )
            return
        log.warning(
            "the keys of table %r at %s (%s) are not derived: %s. They are fetched on demand. %s",
            site.table,
            site.where,
            site.operation,
            site.reason,
            remedy(site.table, site.reason),
        )
