"""One loader's part in managing a model: its settings, its feed, and the state that it shares with the model's other
loaders."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from adaloader.explain import Explanation, explain
from adaloader.model.managing import manage
from adaloader.planning.given_keys import keys_by_table
from adaloader.planning.random_ids import Passes
from adaloader.ranks.table_values import all_numbers
from adaloader.reading.auto_lookahead import AutoLookahead
from adaloader.reading.data_workers import read_batch
from adaloader.reading.feed import Feed
from adaloader.reading.iteration import Iteration
from adaloader.reading.sampling import random_state, set_random_state
from adaloader.settings import Settings
from adaloader.stats import stats

if TYPE_CHECKING:
    from adaloader.checkpoint.periodic import Periodic


class Session:
    """Connects one loader to its managed model, which is made with the model's first loader (collective)."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        settings: Settings,
        order: str,
    ):
        self.settings = settings
        managed = self.managed = manage(model, optimizer, settings, order)
        traffic = managed.manager.traffic
        is_auto = settings.lookahead == "auto"
        self.lookahead = AutoLookahead(lambda: traffic.wait_seconds) if is_auto else settings.lookahead
        self.feed = Feed(managed, keys_by_table(managed, settings.keys), bool(optimizer))
        managed.sessions += 1
        managed.sessions_made += 1
        self._number = managed.sessions_made
        self.draws = Passes(self.rank, self._number)
        self._uneven_iterations = 0
        self.periodic: Periodic | None = None
        self._resumption: Callable[[], None] | None = None
        self._iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()
        # A loader, or an iterator of its, that nobody holds any more leaves no thread behind.
        self._close_feed = weakref.finalize(self, self.feed.close)

    @property
    def rank(self) -> int:
        return self.managed.manager.rank

    @property
    def ranks(self) -> int:
        return self.managed.manager.ranks

    def begin_iteration(self) -> None:
        """A new iteration of the loader begins: what the loop still held of earlier ones is finished.

        Raises:
            RuntimeError: if the loader was closed.
        """
        if not self._close_feed.alive:
            instead = "close it after the model's last pass" if self.managed.parted else "build another one to go on"
            raise RuntimeError(f"this loader was closed; {instead}")
        for iteration in list(self._iterations):
            iteration.end_if_over()
            if iteration.ended:
                iteration.leave()
        if self.managed.follower is not None:
            self.managed.follower.finish()
        self.managed.pass_begins()

    def when_resumed(self, call: Callable[[], None] | None) -> None:
        """Have `call` called when the next iteration has handed out its first batch: what making it drew from random
        generators, the run that goes on from there drew before it was saved."""
        self._resumption = call

    def begin_checkpoints(self, loader, folder, **options) -> None:
        """See `AdaLoader.checkpoint`."""
        from adaloader.checkpoint.periodic import Periodic, default_folder  # which imports loaders

        if self.managed.periodic is not None:
            raise ValueError("a loader of this model makes checkpoints already: close it, or ask for them once")
        where = default_folder() if folder is None else Path(folder)
        made = Periodic(loader, where, **options)
        self.periodic = self.managed.periodic = made

    def take_resumption(self) -> Callable[[], None] | None:
        call, self._resumption = self._resumption, None
        return call

    def leave_iterations(self) -> None:
        """What loops still hold of this loader's iterations is forgotten: the next one begins elsewhere."""
        for iteration in list(self._iterations):
            iteration.end_if_over()
            if not iteration.ended:
                iteration.leave()

    def iteration(
        self,
        weight_of: Callable[[int, Any], tuple[float, float | None]],
        *,
        start: int,
        uneven: bool,
        last_weight: float | None = None,
        end: int | None = None,
        shares: bool = False,
    ) -> Iteration:
        """Return what goes with one pass over the loader, whose first batch is number `start`.

        Args:
            weight_of: called with (number, batch): this rank's weight and the sum of all (None: unknown).
            uneven: whether ranks may have different numbers of batches.
            last_weight: what the batches count together that some ranks have no share of, if known.
            end: the number after the last batch, if no rank has more; None if it is not known now.
            shares: whether ranks share each batch.
        """
        following = None
        if uneven and self.feed.steps_expected and self.managed.follower is not None:
            self._uneven_iterations += 1
            following = self.managed.follower.begin(self._number, self._uneven_iterations, last_weight)
        loader = self._number if shares and self.feed.steps_expected else None
        made = Iteration(self.feed, weight_of, start, following, self.draws.next_pass(), end, loader)
        self._iterations.add(made)
        return made

    def lengths_of_ranks(self, batches: int | None) -> list[int] | None:
        """Return how many batches each rank has in the iteration that begins, None if a rank does not know
        (collective).

        Asked only where it saves messages: a model of tables alone has no dense gradients, whose sum would tell the
        sum of weights. Loaders that evaluate need none, and one rank may iterate them alone.
        """
        managed = self.managed
        if managed.reducer is None or managed.reducer.has_trained or not self.feed.steps_expected:
            return None
        known = batches is not None and self.settings.batch_weight is None
        lengths = all_numbers(managed.manager, batches if known else -1)
        return lengths if min(lengths) >= 0 else None

    def watched(self, inner: Iterator) -> Iterator:
        """Return `inner` with the recorder looking away while it reads."""
        return _Unwatched(inner, self.feed)

    def share_random_state(self, generator: torch.Generator | None) -> None:
        """Continue, on every rank, from rank 0's random state (collective)."""
        manager = self.managed.manager
        if manager.ranks > 1:
            state = random_state(generator)
            manager.transport.collective(lambda comm: comm.Ibcast(state, 0), manager.timeout_seconds)
            set_random_state(generator, state)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return what the loaders' `no_sync` returns."""
        reducer = self.managed.reducer
        return contextlib.nullcontext() if reducer is None else reducer.no_sync()

    def stats(self) -> dict[str, Any]:
        """See `stats.py`."""
        return stats(self.managed)

    def explain(self) -> Explanation:
        """Return, per table, how its keys are known, and why it is managed or dense."""
        return explain(self.managed, self.feed, self.managed.watch.recordings)

    def close(self) -> None:
        if not self._close_feed.alive:
            return
        periodic = self.periodic
        try:
            if periodic is not None:
                periodic.close()
                self.periodic = self.managed.periodic = None
            if self.managed.saving is not None:
                self._finish_saving()
        finally:
            self._close()
        if periodic is not None:
            periodic.hand_signal_on()

    def _finish_saving(self) -> None:
        from adaloader.checkpoint.saving import finish_saving  # which imports loaders

        finish_saving(self.managed)

    def _close(self) -> None:
        managed = self.managed
        if managed.follower is not None:
            managed.follower.finish()
        for iteration in list(self._iterations):
            iteration.end_if_over()
            iteration.leave()
        self._close_feed()
        managed.sessions -= 1
        if managed.sessions == 0:
            managed.manager.close()


class _Unwatched(Iterator):
    def __init__(self, inner: Iterator, feed: Feed):
        self._inner, self._feed = inner, feed

    def __next__(self):
        with self._feed.reading():
            return read_batch(self._inner)
