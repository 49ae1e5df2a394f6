"""The iterator that loaders hand out, and what their saved positions have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from adaloader.reading.iteration import Iteration
from adaloader.reading.lookahead import LookaheadIterator
from adaloader.reading.sampling import EpochIterator

DRAWS = "_random_ids"
"""Entry of saved positions: which pass `adaloader.random_ids` drew for."""


class RecentStates:
    """The positions of the last batches handed out, for loops that take batches before they work on those they have."""

    _MOST = 32

    def __init__(self):
        self._states: deque[tuple[int, Any]] = deque(maxlen=self._MOST)

    def add(self, yielded: int, state: Any) -> None:
        if not self._states or self._states[-1][0] != yielded:
            self._states.append((yielded, state))

    def before(self, yielded: int) -> tuple[int, Any] | None:
        """Return (batches handed out, state) when `yielded` were; None if that is too long ago."""
        return next((each for each in self._states if each[0] == yielded), None)


class LoaderIterator(Iterator):
    """Keeps its loader alive; tells the sample order how often the loop has asked, so that random draws come when a
    plain loader makes them.

    Args:
        read_first: how many batches are read before the first is handed out, if this pass is the rest of one.
    """

    def __init__(
        self,
        loader,
        iterator: LookaheadIterator,
        iteration: Iteration,
        epoch: EpochIterator | None = None,
        read_first: int | None = None,
    ):
        self._loader, self._iterator, self._epoch = loader, iterator, epoch
        self._read_first = read_first
        self._resumed = loader._session.take_resumption()
        self.iteration = iteration
        self._recent = RecentStates()

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self):
        periodic = self._loader._session.periodic
        if periodic is not None and not self.iteration.ended:
            place = self._iterator.place
            self._recent.add(place.yielded, place.state)
            periodic.before_batch(self)
        if self._epoch is not None:
            self._epoch.keep_up(self._iterator.place.yielded + 1)
        if self._resumed is None:
            return next(self._iterator)
        resumed, self._resumed = self._resumed, None
        if self._read_first is not None:  # these reads were drawn for before the run was saved, and no more
            self._iterator.read_ahead(self._read_first)
            resumed()
            return next(self._iterator)
        try:
            return next(self._iterator)
        finally:
            resumed()

    def state_before_unused(self) -> tuple[int, Any] | None:
        """Return (batches handed out, the source's state) before those that the loop has and has not worked on; None if
        there are none such, or their places are not known."""
        unused = self.iteration.unused_at_the_end()
        return self._recent.before(self._iterator.place.yielded - unused) if unused else None

    def close(self) -> None:
        """Drop what was read ahead; no more batches come."""
        self._iterator.close()
