"""The iterator that loaders hand out, and what their saved positions have in common."""

from __future__ import annotations

from collections.abc import Iterator

from adaloader.lookahead import LookaheadIterator
from adaloader.sampling import EpochIterator

DRAWS = "_random_ids"
"""Entry of saved positions: which pass `adaloader.random_ids` drew for."""


class LoaderIterator(Iterator):
    """Keeps its loader alive; tells the sample order how often the loop has asked, so that random draws come when a
    plain loader makes them.
    """

    def __init__(self, loader, iterator: LookaheadIterator, epoch: EpochIterator | None = None):
        self._loader, self._iterator, self._epoch = loader, iterator, epoch
        self._resumed = loader._session.take_resumption()

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self):
        if self._epoch is not None:
            self._epoch.keep_up(self._iterator.place.yielded + 1)
        if self._resumed is None:
            return next(self._iterator)
        resumed, self._resumed = self._resumed, None
        try:
            return next(self._iterator)
        finally:
            resumed()

    def close(self) -> None:
        """Drop what was read ahead; no more batches come."""
        self._iterator.close()
