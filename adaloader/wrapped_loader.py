"""`AdaLoader.wrap`: the management of tables around batches that come from any loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from adaloader.explain import Explanation
from adaloader.reading.batch_weights import own_weight
from adaloader.reading.loader_iterator import DRAWS, LoaderIterator
from adaloader.reading.lookahead import LookaheadIterator, Place
from adaloader.session import Session
from adaloader.settings import Settings


class WrappedLoader:
    """Any re-iterable of batches with AdaLoader's management; made by `AdaLoader.wrap`."""

    def __init__(self, iterable: Iterable, model: nn.Module, optimizer, settings: Settings):
        if isinstance(iterable, Iterator) or not _is_iterable(iterable):
            raise TypeError(
                f"AdaLoader.wrap needs something that can be iterated again and again, got {type(iterable).__name__}: "
                "pass the loader or list itself"
            )
        self.iterable = iterable
        self._session = Session(model, optimizer, settings, "batches of the rank's own")
        self._position: _Position | None = None
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.iterable)

    def __getattr__(self, name: str):
        """What the wrapped loader offers (`dataset`, `batch_size`, ...) is offered here."""
        if name.startswith("_") or name == "iterable":
            raise AttributeError(name)
        return getattr(self.iterable, name)

    def __iter__(self) -> Iterator:
        session = self._session
        session.begin_iteration()
        resume, self._resume = self._resume, None
        with session.feed.reading():
            inner, start = self._begin(resume)
        lengths = session.lengths_of_ranks(self._certain_length())
        weight_of = own_weight(session.settings.batch_weight, lengths)
        passed = session.iteration(weight_of, start=start, uneven=True, last_weight=1.0 if lengths else None)
        position = _Position(resume is not None and resume["ended"])

        def on_end(reason: str) -> None:
            position.ended = reason == "exhausted"
            passed.on_end(reason)

        iterator = LookaheadIterator(
            session.watched(inner),
            session.lookahead,
            snapshot=self.iterable.state_dict if self._is_stateful else None,
            on_read=passed.on_read,
            on_yield=passed.on_yield,
            on_end=on_end,
            start=start,
        )
        position.place = passed.place = iterator.place
        self._position = position
        return LoaderIterator(self, iterator, passed)

    def _certain_length(self) -> int | None:
        """Return how many batches the source has, None where `len()` may be an estimate."""
        source = self.iterable
        is_map_style = isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset)
        return len(source) if is_map_style or isinstance(source, (list, tuple)) else None

    @property
    def _is_stateful(self) -> bool:
        return hasattr(self.iterable, "state_dict") and hasattr(self.iterable, "load_state_dict")

    def _begin(self, resume: dict[str, Any] | None) -> tuple[Iterator, int]:
        """Return an iterator over the source, and the number of its first batch, where `resume` says."""
        if resume is None:
            return iter(self.iterable), 0
        if self._is_stateful and resume["source"] is not None:
            self.iterable.load_state_dict(resume["source"])
            return iter(self.iterable), 0 if resume["ended"] else resume["yielded"]
        inner = iter(self.iterable)
        start = 0 if resume["ended"] else resume["yielded"]
        for _ in range(start):
            next(inner, None)
        return inner, start

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the last batch handed out: their number, whether the end was reached, and the source's
        own state where it has one.
        """
        if self._position is not None:
            state = self._position.state_dict()
        else:
            state = {"yielded": 0, "ended": False, "source": None} if self._resume is None else dict(self._resume)
        draws = self._session.draws.state()
        return state if draws is None else {**state, DRAWS: draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the next iteration begin where `state_dict` was taken; a source without a state is read up to there.

        Raises:
            ValueError: if it is no state of a wrapped loader.
        """
        if set(state_dict) - {DRAWS} != {"yielded", "ended", "source"}:
            raise ValueError(f"not a state of a wrapped loader: it has the entries {sorted(state_dict)}")
        self._position = None
        self._resume = dict(state_dict)
        self._session.draws.load_state(self._resume.pop(DRAWS, None))

    def no_sync(self) -> AbstractContextManager[None]:
        """As `AdaLoader.no_sync`; here, where ranks have batches of their own, it mostly has no effect."""
        return self._session.no_sync()

    def checkpoint(self, folder: str | os.PathLike | None = None, **options) -> None:
        """As `AdaLoader.checkpoint` (collective)."""
        self._session.begin_checkpoints(self, folder, **options)

    def stats(self) -> dict[str, Any]:
        """Return what the model's tables have cost so far; see `adaloader.stats.stats`."""
        return self._session.stats()

    def explain(self) -> Explanation:
        """Return what is known of each table: print it, or take its `tables`, or its `to_json()`."""
        return self._session.explain()

    def close(self) -> None:
        """End this loader (and, with the last one of its model, this rank's part in the manager)."""
        self._session.close()


@dataclass
class _Position:
    """Where an iteration over a wrapped source is."""

    ended: bool
    place: Place | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"yielded": self.place.yielded, "ended": self.ended, "source": self.place.state}


def _is_iterable(given) -> bool:
    return hasattr(given, "__iter__") or hasattr(given, "__getitem__")
