"""Random numbers that a dataset or `collate_fn` draws: a run that is resumed draws them again for what was read ahead.

Batches are read ahead of the loop, so when a checkpoint is made some have been drawn that nobody has had yet. Before
each read the generators' states are noted; the resumed run reads those batches from these states, and then goes on from
the states that the run had. That is for reads in this process: workers have generators of their own.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adaloader.reading.random_states import host_random_states, set_random_states

# Noting the states takes 0.1 ms a batch: not for datasets that draw nothing.
_MOST_READS_WITHOUT = 32
# A loop may take so many batches before it works on the first of them (see `RecentStates`).
_MOST_BEHIND = 64


class ReadDraws:
    """What the reads of one loader draw from the generators of Python, NumPy and PyTorch."""

    def __init__(self):
        self._again: deque[dict[str, Any] | None] = deque()
        self._is_resumed = False
        self._before: deque[tuple[int, dict[str, Any] | None]] = deque()
        self._draws = False
        self._reads_without = 0
        self._number = 0

    def resume(self, again: Sequence[dict[str, Any] | None] | None) -> None:
        """The next pass is the rest of one: its first reads begin from these states, as `ahead` gave them."""
        self._before.clear()
        self._again = deque(again or ())
        self._is_resumed = again is not None
        self._draws |= self._is_resumed

    def begin(self, iterator, number: int) -> int | None:
        """A pass begins, with an iterator of torchdata's whose next batch has this number. If it is the rest of one,
        whose reads draw, return how many batches are to be read before its first is handed out."""
        is_resumed, self._is_resumed = self._is_resumed, False
        if not is_resumed:
            self._again.clear()  # of a pass that was left before it had read them
        self._before.clear()
        self._number = number
        fetcher = getattr(iterator, "_dataset_fetcher", None)  # none where workers read
        if fetcher is None or not (self._draws or self._reads_without < _MOST_READS_WITHOUT):
            return None
        fetch, this = type(fetcher).fetch, weakref.ref(fetcher)
        fetcher.fetch = lambda indices: self._fetch(fetch, this(), indices)
        return len(self._again) if is_resumed else None

    def _fetch(self, fetch, fetcher, indices):
        if self._again:
            return self._fetch_again(fetch, fetcher, indices)
        if not (self._draws or self._reads_without < _MOST_READS_WITHOUT):
            return fetch(fetcher, indices)
        before = host_random_states()
        batch = fetch(fetcher, indices)
        if self._draws or not _are_same(before, host_random_states()):
            self._draws = True
        else:
            self._reads_without += 1
            before = None
        self._note(before)
        return batch

    def _fetch_again(self, fetch, fetcher, indices):
        now, before = host_random_states(), self._again.popleft()
        if before is not None:
            set_random_states(before, None)
        try:
            batch = fetch(fetcher, indices)
        finally:
            set_random_states(now, None)
        self._note(before)
        return batch

    def _note(self, before: dict[str, Any] | None) -> None:
        self._before.append((self._number, before))
        self._number += 1

    def handed_out(self, number: int) -> None:
        """Batch `number` is handed out: what it was drawn from need not be kept much longer."""
        while self._before and self._before[0][0] < number - _MOST_BEHIND:
            self._before.popleft()

    def ahead(self, number: int) -> list[dict[str, Any] | None] | None:
        """Return the states before each read of batches from `number` on; None if reads draw nothing."""
        return [before for at, before in self._before if at >= number] + [*self._again] if self._draws else None


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"][2] == other["python"][2]
        and np.array_equal(one["python"][1], other["python"][1])
        and all(np.array_equal(mine, theirs) for mine, theirs in zip(one["numpy"], other["numpy"], strict=True))
    )
