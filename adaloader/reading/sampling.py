"""Sample order: one global order for all ranks, equal to that of a plain ``torch.utils.data.DataLoader``.

Global batch t of N ranks with batch size B is batch t of a plain loader with batch size N * B, cut into N
contiguous shares. Every rank draws the whole order from the same random state and keeps its own share, so no
message is needed, and the random state left behind is the plain loader's too.

The draws are made by torch's own ``RandomSampler``, at the moments at which a plain loader makes them:

1. ``iter(loader)`` draws the base seed (torch's loader iterator does that);
2. the first index asked for takes, without a ``generator=``, a seed from the global generator; the
   permutation follows;
3. whoever asks past the last sample makes ``RandomSampler`` draw one more permutation, which nobody uses but
   which advances a ``generator=`` of the user's.

The third is why `EpochIterator.keep_up` exists: a loader that reads ahead would draw it too early.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

STATE_VERSION = 1


@dataclass(frozen=True)
class Shares:
    """How `samples` samples are cut into global batches, and each global batch into one share per rank.

    A share is contiguous. The last, smaller batch of m samples is shared out as evenly as it goes: the first
    ``m % ranks`` ranks get one sample more than the others, some ranks possibly none.

    An epoch that is resumed with batches of another size goes on from its sample `first_sample`, with batch number
    `first_number`.
    """

    samples: int
    global_batch_size: int
    drop_last: bool
    rank: int
    ranks: int
    first_sample: int = 0
    first_number: int = 0

    @property
    def global_batches(self) -> int:
        """Batches of the plain loader, and steps of the epoch."""
        full, rest = divmod(self.samples - self.first_sample, self.global_batch_size)
        return self.first_number + full + int(rest > 0 and not self.drop_last)

    @property
    def reads_to_end(self) -> int:
        """The number of the read, from 1, at which a plain loader asks past the last sample."""
        return self.first_number + (self.samples - self.first_sample) // self.global_batch_size + 1

    @property
    def rank_batches(self) -> int:
        """Batches of this rank: `global_batches`, or one less if its share of the last one is empty."""
        last = self.global_batches - 1
        return last + int(self.share(last)[0] > 0) if last >= self.first_number else self.first_number

    def bounds(self, batch_samples: int) -> tuple[int, int]:
        """First and one past the last position of this rank's share in a batch of `batch_samples`."""
        each, extra = divmod(batch_samples, self.ranks)
        first = self.rank * each + min(self.rank, extra)
        return first, first + each + int(self.rank < extra)

    def share(self, number: int) -> tuple[int, int]:
        """Samples of this rank, and samples of all ranks, in global batch `number`.

        Raises IndexError where the epoch has no such batch.
        """
        if not self.first_number <= number < self.global_batches:
            raise IndexError(
                f"global batch {number} is not in this epoch: it has {self.global_batches} batches "
                f"({self.samples} samples, {self.global_batch_size} a batch, drop_last={self.drop_last})"
            )
        before = self.first_sample + (number - self.first_number) * self.global_batch_size
        in_all = min(self.global_batch_size, self.samples - before)
        first, end = self.bounds(in_all)
        return end - first, in_all


class GlobalBatchSampler(Sampler):
    """This rank's share of each batch that a plain loader with `ranks` times the batch size would draw.

    Give it to a loader as ``batch_sampler=``; with ``batch_size=None`` (no collation) as ``sampler=``: it
    then yields single samples, and a global batch is one sample per rank.

    Args:
        dataset: anything with a length; it is asked anew in each epoch, so it may change between epochs.
        batch_size: samples per rank and batch, or None.
        shuffle: a fresh random permutation per epoch, else ascending order.
        drop_last: leave out a last batch with fewer than ``ranks * batch_size`` samples.
        generator: what a plain loader would get as ``generator=``; None is torch's global generator.
        rank, ranks: which share, of how many. All ranks must start an epoch with equal random states.
        plain_lead: for loaders that read ahead, which then call `EpochIterator.keep_up`: how many batches of
            indices a plain loader takes before its loop asks for them, ``num_workers * prefetch_factor``.
            None: this sampler is asked just when a plain loader would ask.

    Raises ValueError for arguments out of range and, as a plain loader does, for shuffling an empty dataset.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int | None,
        *,
        shuffle: bool,
        drop_last: bool,
        generator: torch.Generator | None,
        rank: int,
        ranks: int,
        plain_lead: int | None = None,
    ) -> None:
        _check_arguments(batch_size, drop_last, rank, ranks)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator
        self.rank = rank
        self.ranks = ranks
        self.plain_lead = plain_lead
        self.sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
        self._epoch: weakref.ref[EpochIterator] | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def shares(self) -> Shares:
        """The cut that an epoch started now would have."""
        global_batch_size = self.ranks * (self.batch_size or 1)
        return Shares(len(self.dataset), global_batch_size, self.drop_last, self.rank, self.ranks)

    @property
    def global_batches(self) -> int:
        """Global batches of an epoch, and with them steps: the length of the plain loader."""
        return self.shares.global_batches

    @property
    def epoch(self) -> EpochIterator | None:
        """The iterator that was made last, if it still lives: that of the epoch under way."""
        return None if self._epoch is None else self._epoch()

    def share(self, number: int) -> tuple[int, int]:
        """Samples of this rank, and of all ranks, in global batch `number`; see `Shares.share`."""
        return self.shares.share(number)

    def __len__(self) -> int:
        return self.shares.rank_batches

    def __iter__(self) -> EpochIterator:
        epoch = EpochIterator(self)
        if self._resume is not None:
            epoch.resume(self._resume)
        self._epoch = weakref.ref(epoch)
        return epoch

    def begins(self, resumed: dict[str, Any]) -> None:
        """The first batch of an epoch is read that goes on from `resumed`: later ones do not.

        Not where it is made: with workers, torch makes two, and reads the second.
        """
        if self._resume is resumed:
            self._resume = None

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Have the next epoch be the rest of the one that a state of an `EpochIterator`, of any number of ranks and
        batch size, was taken in; its batches are numbered from 0.

        Raises:
            ValueError: as `EpochIterator.load_state_dict`.
        """
        EpochIterator(self).check_state(state)
        self._resume = state


class EpochIterator(Iterator):
    """One epoch of a `GlobalBatchSampler`; saves and restores itself by torchdata's ``Stateful`` protocol.

    Invariant: `_samples` samples of the global order lie behind it; nothing is drawn before the first `next`,
    or before a started epoch is loaded. The state depends neither on the rank nor on the number of ranks.
    """

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self._sampler = sampler
        self._resumed: dict[str, Any] | None = None  # what it goes on from, of another loader's
        self._resumed_draws: torch.Tensor | None = None  # the state of the user's generator then
        self._shares: Shares | None = None  # None until the epoch starts
        self._start_state: torch.Tensor | None = None  # of the order's generator, before its first draw
        self._source: Iterator[int] = iter(())  # torch's sampler, asked past its end by `_draw_end_if_due`
        self._order: Iterator[int] = iter(())  # the same samples, ending without a draw
        self._samples = 0
        self._reads = 0  # calls of `next` since the start of the epoch
        self._loop_reads = 0  # of these, those that the loop has asked for
        self._reads_to_end = 0  # the call at which a plain loader asks past the last sample

    @property
    def shares(self) -> Shares:
        """The cut of this epoch; before its first draw, what it would be now."""
        return self._sampler.shares if self._shares is None else self._shares

    def __iter__(self) -> EpochIterator:
        return self

    def __next__(self) -> list[int] | int:
        if self._resumed is not None:
            self._sampler.begins(self._resumed)
            if self._resumed_draws is not None:  # torch's loader has drawn since, as it did before the state was taken
                self._sampler.generator.set_state(self._resumed_draws)
            self._resumed = self._resumed_draws = None
        if self._shares is None:
            self._start(self._draw_start_state())
        self._reads += 1
        batch = list(itertools.islice(self._order, self._shares.global_batch_size))
        self._draw_end_if_due()
        if self._sampler.drop_last and len(batch) < self._shares.global_batch_size:
            batch = []
        self._samples += len(batch)
        first, end = self._shares.bounds(len(batch))
        if first == end:
            raise StopIteration
        return batch[first] if self._sampler.batch_size is None else batch[first:end]

    def resume(self, state: dict[str, Any]) -> None:
        """Be the rest of the epoch that `state` was taken in, with batches that are numbered from 0."""
        self.load_state_dict({**state, "batches": 0})
        self._resumed = state
        if self._sampler.shuffle and self._sampler.generator is not None:
            self._resumed_draws = self._sampler.generator.get_state()

    def keep_up(self, loop_reads: int) -> None:
        """Say how often the loop has asked for a batch of this epoch, the call that ends it included.

        Makes the draw at the end of the epoch once a plain loader would have made it. Needed only where the
        sampler has a `plain_lead`; harmless to repeat.
        """
        self._loop_reads = loop_reads
        self._draw_end_if_due()

    def state_dict(self) -> dict[str, Any]:
        """Position and random start of the order: numbers, and a uint8 tensor that is never written again."""
        started = self._shares is not None
        start_state = self._peek_start_state() if self._start_state is None else self._start_state
        return {
            "version": STATE_VERSION,
            "started": started,
            "ended": started and self._reads >= self._reads_to_end,
            "samples": self._samples,
            "batches": self._reads,
            "length": self.shares.samples,
            "generator_state": start_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; a generator of the user's is left as it was left there.

        Raises ValueError for a state that another version wrote, that was shuffled where this is not, or
        whose shuffled order was of a dataset of another length.
        """
        self.check_state(state)
        self._shares = None
        self._start_state = None if state["generator_state"] is None else state["generator_state"].clone()
        self._samples = self._reads = self._loop_reads = 0
        if not state["started"]:
            if self._start_state is not None and self._sampler.generator is not None:
                self._sampler.generator.set_state(self._start_state)
            return
        self._start(self._start_state)
        self._samples = sum(1 for _ in itertools.islice(self._order, state["samples"]))
        if state["ended"]:
            self._reads = self._reads_to_end
        else:
            self._go_on_from(state.get("batches"))
        self._loop_reads = self._reads
        self._draw_end_if_due()

    def _go_on_from(self, batches: int | None) -> None:
        """Number the batches on from where the state was taken, whatever their size is now."""
        size = self._shares.global_batch_size
        self._reads = self._samples // size if batches is None else batches
        self._shares = replace(self._shares, first_sample=self._samples, first_number=self._reads)
        self._reads_to_end = self._shares.reads_to_end

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"cannot load a sample order of version {state.get('version')}, only {STATE_VERSION}: "
                "load it with the AdaLoader that saved it"
            )
        shuffled = state["generator_state"] is not None
        if shuffled != self._sampler.shuffle:
            raise ValueError(
                f"the saved sample order has shuffle={shuffled}, this loader has {self._sampler.shuffle}: "
                "build the loader as it was built when the state was saved"
            )
        length = len(self._sampler.dataset)
        if shuffled and state["started"] and length != state["length"]:
            raise ValueError(
                f"the saved position is in a random order of {state['length']} samples, the dataset has "
                f"{length}: load with the dataset that the order was drawn for, or start a new epoch"
            )

    def _start(self, start_state: torch.Tensor | None) -> None:
        """Begin the epoch at its first sample, with `start_state` for the generator of the order."""
        self._start_state = start_state
        self._shares = self._sampler.shares
        self._reads_to_end = self._shares.reads_to_end
        source = self._sampler.sampler
        if self._sampler.shuffle:
            generator = torch.Generator() if self._sampler.generator is None else self._sampler.generator
            generator.set_state(start_state)
            source = RandomSampler(self._sampler.dataset, generator=generator)
        self._source = iter(source)
        self._order = itertools.islice(self._source, self._shares.samples)

    def _draw_start_state(self) -> torch.Tensor | None:
        """The generator's state for a new epoch; takes a seed from the global generator where plain would.

        An epoch that was saved before its start keeps the order that it would have had, and still takes the
        seed, so that a user who restores the global generator too is on the path of the run that was saved.
        """
        if not self._sampler.shuffle:
            return None
        if self._sampler.generator is not None:
            return self._sampler.generator.get_state()
        drawn = _seeded_state()
        return drawn if self._start_state is None else self._start_state

    def _peek_start_state(self) -> torch.Tensor | None:
        """What `_draw_start_state` would return now, drawing nothing."""
        if not self._sampler.shuffle:
            return None
        if self._sampler.generator is not None:
            return self._sampler.generator.get_state()
        before = torch.get_rng_state()
        try:
            return _seeded_state()
        finally:
            torch.set_rng_state(before)

    def _draw_end_if_due(self) -> None:
        """Ask torch's sampler past its last sample, if a plain loader would have done so by now."""
        lead = self._sampler.plain_lead
        plain_reads = self._reads if lead is None else min(self._reads, self._loop_reads + lead)
        if self._shares is not None and plain_reads >= self._reads_to_end:
            collections.deque(self._source, maxlen=0)


def random_state(generator: torch.Generator | None) -> np.ndarray:
    """The state of `generator` (None: torch's global CPU generator) as a fresh uint8 array."""
    state = torch.get_rng_state() if generator is None else generator.get_state()
    return state.numpy().copy()


def set_random_state(generator: torch.Generator | None, state: np.ndarray) -> None:
    """Put `generator` (None: torch's global CPU generator) in the uint8 `state` that `random_state` gave.

    Raises TypeError for an array that is not uint8, RuntimeError (torch's) for one that is not such a state.
    """
    if state.dtype != np.uint8:
        raise TypeError(f"a random state is of uint8, got {state.dtype}: pass what random_state() returned")
    tensor = torch.from_numpy(state.copy())
    if generator is None:
        torch.set_rng_state(tensor)
    else:
        generator.set_state(tensor)


def _seeded_state() -> torch.Tensor:
    """State of a generator seeded from the global one, in the way of torch's RandomSampler."""
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
    return torch.Generator().manual_seed(seed).get_state()


def _check_arguments(batch_size: int | None, drop_last: bool, rank: int, ranks: int) -> None:
    is_integer = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size is not None and not (is_integer and batch_size > 0):
        raise ValueError(f"batch_size must be a positive integer, or None for no batches; got {batch_size!r}")
    if batch_size is None and drop_last:
        raise ValueError("drop_last=True needs a batch_size: with batch_size=None there is no batch to drop")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be at least 0 and less than the {ranks} ranks, got {rank}")
