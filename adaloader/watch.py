"""Learning what batches look up: a recorder watches a step now and then, and the programs that it gives are kept."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from adaloader.batches import Batch
from intents import Program, Recorder, Recording, Site

if TYPE_CHECKING:
    from adaloader.feed import Feed
    from adaloader.iteration import Iteration

log = logging.getLogger("adaloader")

# Batches of one structure are watched at most this often, however often a lookup was not foreseen.
_MOST_RECORDINGS = 4
# A step without a lookup teaches nothing; after so many only a lookup starts another recording.
_MOST_FRUITLESS = 3
# Steps without a lookup in one recording: a loop may take its next batch just before it steps.
_MOST_IDLE_STEPS = 1
# Batches handed out while a recording waits for its first lookup.
_MOST_WATCHED_BATCHES = 16


class Watch:
    """Watches steps of one model, for all its loaders.

    Invariant: `recorder` is None, or watches the trainer's thread and knows the batches `_watched`; it is told of
    lookups until the step, or the handing out, that follows the first of them.
    """

    def __init__(self):
        self.programs: list[Program] = []
        self.recorder: Recorder | None = None
        self.iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()
        self._watched: dict[int, Batch] = {}
        self._lookups = 0
        self._idle_steps = 0
        self._recordings: Counter[Hashable] = Counter()
        self._wanted: set[Hashable] = set()
        self._fruitless = 0
        self._said: set[tuple[str, str]] = set()

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

    def lookup(self, table: str, ids: torch.Tensor, operation: str) -> None:
        if self.recorder is not None:
            self._lookups += 1
            self.recorder.lookup(table, ids, operation)

    def not_foreseen(self, batch: Batch, table: str) -> None:
        """A lookup of `table`, probably for `batch`, was not among those that its program had foreseen."""
        if batch.structure is not None and table not in batch.underived:
            self._wanted.add(batch.structure)

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
        if any(batch.iteration is iteration for batch in self._watched.values()):
            self._abandon(fruitless=False)

    def closed(self, feed: Feed) -> None:
        """No loop over the batches of `feed` goes on."""
        if any(batch.iteration.feed is feed for batch in self._watched.values()):
            self._abandon(fruitless=False)

    # Within

    def _is_to_be_watched(self, batch: Batch) -> bool:
        unknown = not batch.foreseen and self._fruitless < _MOST_FRUITLESS
        wanted = unknown or batch.structure in self._wanted
        return wanted and self._recordings[batch.structure] < _MOST_RECORDINGS

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
            self._wanted.discard(structure)
        if recording.abandoned is not None:
            log.info("the watched step gave no keys: %s", recording.abandoned)
            return
        self._fruitless = 0
        learned = [program for number in watched if (program := recording.program(number)).sites]
        sites = [*recording.sites, *(site for program in learned for site in self._keep(program).sites)]
        given = frozenset.intersection(*(batch.iteration.feed.given_tables for batch in watched.values()))
        for site in sites:
            if site.reason is not None and site.table not in given:
                self._say_underived(site)
        for iteration in list(self.iterations):
            iteration.plan_again()

    def _keep(self, program: Program) -> Program:
        """Add a program to those known, or to the one that it is another recording of; return what is kept."""
        for at, known in enumerate(self.programs):
            refined = known.refine(program)
            if refined is not None:
                self.programs[at] = refined
                return refined
        self.programs.insert(0, program)
        return program

    def _say_underived(self, site: Site) -> None:
        said = (site.table, site.where)
        if said not in self._said:
            self._said.add(said)
            log.warning(
                "the keys of table %r at %s (%s) are not derived: %s. They are fetched on demand; to have them ahead "
                "pass AdaLoader(..., keys={%r: function of a batch that returns the ids})",
                site.table,
                site.where,
                site.operation,
                site.reason,
                site.table,
            )
