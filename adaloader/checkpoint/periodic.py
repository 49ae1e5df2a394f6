"""Checkpoints that a loader makes by itself: every so many steps or minutes, and when a signal asks the run to end.

They are made where the loop asks for its next batch: all that it does with the batch before, schedules included, is
done then. Ranks come to that place apart, so whoever wants a checkpoint tells the others, and they meet when all have
taken as many steps.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaloader.checkpoint.layout import INDEX, STEP_NAME, complete_in, remove_checkpoint, step_folder
from adaloader.checkpoint.saving import save_at
from adaloader.checkpoint.signals import Signals
from adaloader.errors import CheckpointError
from pm.messages import Kind, Message

if TYPE_CHECKING:
    from adaloader.iteration import Iteration
    from adaloader.loader_iterator import LoaderIterator

log = logging.getLogger("adaloader")

_FOLLOWING = -1
# A loop that takes its next batch before it has stepped for the last one always has a gradient that is not saved.
_MOST_PUT_OFF = 1000


class Periodic:
    """Makes the checkpoints of one loader (construction is collective).

    Invariant: `_met` exchanges have taken place, on all ranks alike; another is due once `_asked`, the highest number
    that a rank has asked for, is above it.

    Args:
        loader: the loader.
        folder: in which each checkpoint is a folder `step-...`.
        every_steps: optimizer steps from one to the next; None: not by steps.
        every_minutes: minutes from one to the next, by rank 0's clock; None: not by time.
        keep: how many complete ones stay.
        extra: what to keep beside, or a function that returns it when a checkpoint is made.
        signals: whether SIGTERM, SIGUSR1 and Ctrl-C end the run with a checkpoint.
    """

    def __init__(
        self,
        loader,
        folder: Path,
        every_steps: int | None,
        every_minutes: float | None,
        keep: int,
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None,
        signals: bool,
    ):
        _check(every_steps, every_minutes, keep)
        self._loader = weakref.ref(loader)
        self._managed = loader._session.managed
        self._manager = manager = self._managed.manager
        self._folder, self._keep, self._extra = folder, keep, extra
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._last_steps, self._last_time = self._managed.optimizer_steps, time.monotonic()
        self._asked = self._met = 0
        self._put_off = 0
        self._others_ended: weakref.ref | None = None
        self._signals = Signals() if signals else None
        if manager.ranks > 1:
            self._passed_on = manager.on_control
            manager.on_control = self._receive
            manager.barrier()  # nobody asks a rank that does not listen yet

    def close(self) -> None:
        """Give the signals back."""
        if self._signals is not None:
            self._signals.close()

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.CHECKPOINT:
            self._asked = max(self._asked, message.numbers[0])
        elif self._passed_on is not None:
            self._passed_on(source, message)

    # Where the loop asks for its next batch

    def before_batch(self, iterator: LoaderIterator) -> None:
        """Make a checkpoint if one is due; end the process with code 0 if a signal has asked for that.

        Raises:
            CheckpointError: if the one that a signal has asked for cannot be made.
        """
        iteration = iterator.iteration
        if not iteration.trains or not (self._asked > self._met or self._is_due()):
            return
        if self._others_ended is not None and self._others_ended() is iteration:
            return  # ranks have run out of batches: after this pass
        if not self._is_at_rest():
            self._put_off += 1
            if self._put_off == _MOST_PUT_OFF:
                log.warning(
                    "no checkpoint was made for %d batches: whenever the loop asks for its next batch, it has a "
                    "gradient with which it has not stepped; call adaloader.save after optimizer.step()",
                    _MOST_PUT_OFF,
                )
            return
        self._put_off = 0
        is_ending = self._meet(iteration)
        if is_ending is not None:
            self._save(iterator, is_ending)

    def _is_due(self) -> bool:
        if self._signals is not None and self._signals.received is not None:
            return True
        if self._every_steps is not None and self._managed.optimizer_steps - self._last_steps >= self._every_steps:
            return True
        if self._every_minutes is None or self._manager.rank:
            return False
        return time.monotonic() - self._last_time >= 60.0 * self._every_minutes

    def _is_at_rest(self) -> bool:
        """Whether no gradient waits for a step."""
        reducer = self._managed.reducer
        if reducer is not None and reducer.is_deferred:
            return False
        return not any(table.has_gradient and not table.is_stepped for table in self._managed.tables)

    def _meet(self, iteration: Iteration) -> bool | None:
        """Wait until all ranks have come here with as many steps; return whether the run is to end.

        None where they have not: others are further, or have run out of batches.
        """
        ending = self._signals is not None and self._signals.received is not None
        if self._manager.ranks == 1:
            return ending
        number = self._met + 1
        for peer in self._manager.peers:
            self._manager.transport.send(peer, Message(Kind.CHECKPOINT, (number,)))
        self._manager.transport.wake()
        while True:
            steps, endings = self._exchange(self._manager.steps, ending)
            if (steps == _FOLLOWING).any():
                self._met, self._others_ended = number, weakref.ref(iteration)
                return None
            if (steps == steps[0]).all():
                self._met = number
                return bool(endings.any())
            if self._manager.steps < steps.max():
                return None  # come again after the next step; whoever is further waits

    def _exchange(self, steps: int, ending: bool) -> tuple[np.ndarray, np.ndarray]:
        mine, everyones = np.array([steps, ending], np.int64), np.empty((self._manager.ranks, 2), np.int64)
        self._manager.transport.collective(lambda comm: comm.Iallgather(mine, everyones), self._manager.timeout_seconds)
        return everyones[:, 0], everyones[:, 1]

    # What a rank does that follows others, as it has run out of batches

    @property
    def is_asked(self) -> bool:
        """Whether another rank waits for this one to come."""
        return self._asked > self._met

    def decline(self) -> None:
        """Tell the others that this rank has left its loop (collective)."""
        self._exchange(_FOLLOWING, False)
        self._met += 1

    # Saving

    def _save(self, iterator: LoaderIterator, is_ending: bool) -> None:
        steps = self._managed.optimizer_steps
        path = step_folder(self._folder, steps)
        extra = self._extra() if callable(self._extra) else self._extra
        self._last_steps, self._last_time = steps, time.monotonic()
        if not (path / INDEX).exists() or self._manager.ranks > 1:
            try:
                saved = save_at(path, self._loader(), extra, iterator.state_before_unused())
                log.info("checkpoint %s: %d bytes in %.2f s", saved.path, saved.bytes, saved.seconds)
            except CheckpointError as error:
                if is_ending:
                    raise
                if self._manager.rank == 0:
                    print(f"adaloader: no checkpoint at step {steps}, and the run goes on: {error}", file=sys.stderr)
                return
            if self._manager.rank == 0:
                self._remove_old(path)
        if is_ending:
            if self._manager.rank == 0:
                name = "another rank's signal" if self._signals is None else self._signals.name
                print(f"adaloader: {name}: saved {path} after step {steps}, and ended", file=sys.stderr, flush=True)
            raise SystemExit(0)

    def _remove_old(self, newest: Path) -> None:
        complete = complete_in(self._folder)
        for old in complete[: max(0, len(complete) - self._keep)]:
            remove_checkpoint(old)
        for each in self._folder.iterdir():
            if STEP_NAME.fullmatch(each.name) and each != newest and not (each / INDEX).exists():
                remove_checkpoint(each)  # of a save that did not end


def _check(every_steps: int | None, every_minutes: float | None, keep: int) -> None:
    if every_steps is not None and (not isinstance(every_steps, int) or every_steps < 1):
        raise ValueError(f"every_steps must be a number of steps, 1 or more; got {every_steps!r}")
    if every_minutes is not None and not every_minutes > 0:
        raise ValueError(f"every_minutes must be positive; got {every_minutes!r}")
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be a number of checkpoints, 1 or more; got {keep!r}")


def default_folder() -> Path:
    """Return where checkpoints go if nothing is said: into the run folder of `python -m adaloader run`, or here."""
    return Path(os.environ.get("ADALOADER_RUN_FOLDER", ".")) / "checkpoints"
