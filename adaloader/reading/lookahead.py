"""Reading ahead of the training loop, on its own thread, with the position *handed out* kept apart from it.

A reader that runs ahead and saves the position of its source loses, on resume, the batches that it had read
and not handed out. Here each batch carries the state of the source as it was just after that batch was read.
"""

from __future__ import annotations

import collections
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# More than one, or the buffer would never fill; not more than two, or the first batches would come late.
READS_PER_NEXT = 2


@dataclass
class Place:
    """How far an iterator is; apart from it, so that one may keep the place and not the iterator.

    `read` and `yielded` are the numbers of the next batch to read and of the next one to hand out. `state` is
    the state of the source that belongs to the last batch handed out or, once it was reached, to the end. `end` is
    the number after the last batch, once that is known.
    """

    read: int
    yielded: int
    state: Any
    end: int | None = None


@dataclass(frozen=True)
class _Reading:
    """What one read gave: a batch, or the end, or an error; and the state of the source after it."""

    batch: Any = None
    state: Any = None
    is_end: bool = False
    error: Exception | None = None


class LookaheadIterator(Iterator):
    """Hands out the batches of `inner`, unchanged and in order, while it holds up to `lookahead` later ones.

    `inner` advances only inside `__next__`, on the caller's thread. The buffer fills gradually: a call reads
    at most two batches, and one once `lookahead` are held. With ``lookahead=0`` it reads, then hands out.

    What `inner` or `snapshot` raises is raised here after the batches before it were handed out; then, as
    after the end, there are no more. KeyboardInterrupt and the like, and what the other callbacks raise, pass
    at once.

    Args:
        inner: any iterator.
        lookahead: batches held after one was handed out, 0 or more; or a function that says how many, asked once per
            batch handed out.
        snapshot: returns the state of the source (``state_dict``) after what was read last; called at the
            start, after each read and after the end, and its result is copied. None: states are not kept.
        on_read: called with number and batch after a read.
        on_yield: called with number and batch before the batch is handed out.
        on_end: called once: with "exhausted" before StopIteration is raised (it may work or wait), "error"
            before the error is raised, "left" at `close` or when nobody holds the iterator any more (not at
            interpreter exit). No callback may hold the iterator, or a ``break`` would not release it; `place`
            may be held.
        start: the number of the first batch.

    Invariant: ``place.read - place.yielded`` batches are held, and `place.state` is older than all of them.
    """

    def __init__(
        self,
        inner: Iterator,
        lookahead: int | Callable[[], int],
        *,
        snapshot: Callable[[], Any] | None,
        on_read: Callable[[int, Any], None],
        on_yield: Callable[[int, Any], None],
        on_end: Callable[[str], None],
        start: int = 0,
    ) -> None:
        if not callable(lookahead) and lookahead < 0:
            raise ValueError(f"lookahead must be 0 or more batches, got {lookahead}")
        self.place = Place(start, start, _state_of(snapshot))
        self._inner: Iterator | None = inner  # None once it ended
        self._lookahead = lookahead if callable(lookahead) else lambda: lookahead
        self._snapshot = snapshot
        self._on_read = on_read
        self._on_yield = on_yield
        self._on_end: Callable[[str], None] | None = on_end  # None once it was called
        self._held: collections.deque[_Reading] = collections.deque()  # batches that were read, oldest first
        self._final = _Reading(is_end=True)  # what comes after them, once `_inner` is None

    @property
    def yielded_state(self) -> Any:
        """The snapshot of the last batch handed out; before the first that of the start, at the end its."""
        return self.place.state

    def __iter__(self) -> LookaheadIterator:
        return self

    def __next__(self) -> Any:
        # An error that waits for its turn keeps, by its traceback, each frame that ran when it was raised.
        # This one must let go of `self`, or the iterator would hold itself and survive a `break`.
        try:
            for _ in range(min(READS_PER_NEXT, self._lookahead() + 1 - len(self._held))):
                if self._inner is not None:
                    self._keep(_read(self._inner, self._snapshot))
            return self._hand_out() if self._held else self._finish()
        finally:
            del self

    def read_ahead(self, batches: int) -> None:
        """Read so many batches, if there are as many, before more are handed out."""
        for _ in range(batches):
            if self._inner is not None:
                self._keep(_read(self._inner, self._snapshot))

    def close(self) -> None:
        """Drop what is held, and the source; no more batches come. Without effect after the end."""
        self._inner = None
        self._final = _Reading(is_end=True)
        self._held.clear()
        self.place.read = self.place.yielded
        self._call_on_end("left")

    def __del__(self) -> None:
        if getattr(self, "_on_end", None) is not None and not sys.is_finalizing():
            self.close()

    def _keep(self, reading: _Reading) -> None:
        if reading.is_end:
            self._inner = None
            self._final = reading
            if reading.error is None:
                self.place.end = self.place.read
            return
        number = self.place.read
        self._held.append(reading)
        self.place.read += 1
        self._on_read(number, reading.batch)

    def _hand_out(self) -> Any:
        reading = self._held[0]
        self._on_yield(self.place.yielded, reading.batch)
        self._held.popleft()
        self.place.yielded += 1
        self.place.state = reading.state
        return reading.batch

    def _finish(self) -> None:
        """Raise the source's error, once, or else StopIteration."""
        error = self._final.error
        if error is None:
            if self._on_end is not None:
                self.place.state = self._final.state
            self._call_on_end("exhausted")
            raise StopIteration
        self._final = _Reading(is_end=True)
        try:
            self._call_on_end("error")
        finally:
            try:
                raise error
            finally:
                del error, self  # the traceback holds this frame

    def _call_on_end(self, reason: str) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(reason)


def copy_state(state: Any) -> Any:
    """A copy of `state` that shares nothing which can be written to, so that it stays what it was.

    torchdata passes on what ``state_dict`` of a dataset or sampler returns, which often is a live object.
    Tensors and arrays keep dtype and shape; types unknown here are copied by ``copy.deepcopy``.
    """
    kind = type(state)
    if kind in (int, str, bool, float, bytes, type(None)):
        return state
    if kind is dict:
        return {key: copy_state(value) for key, value in state.items()}
    if kind in (list, tuple):
        return kind(copy_state(value) for value in state)
    if kind is torch.Tensor:
        return state.detach().clone()
    if kind is np.ndarray and not state.dtype.hasobject:
        return state.copy()
    return copy.deepcopy(state)


def _read(inner: Iterator, snapshot: Callable[[], Any] | None) -> _Reading:
    """Advance `inner` once. Apart from the class, so that an error's traceback does not hold the iterator."""
    try:
        try:
            batch = next(inner)
        except StopIteration:
            return _Reading(state=_state_of(snapshot), is_end=True)
        return _Reading(batch, _state_of(snapshot))
    except Exception as error:
        return _Reading(is_end=True, error=error)


def _state_of(snapshot: Callable[[], Any] | None) -> Any:
    return None if snapshot is None else copy_state(snapshot())
