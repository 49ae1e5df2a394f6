"""Checkpoints that a loader makes by itself: every so many steps or minutes, and when a signal asks the run to end.

They are made where the loop asks for its next batch: all that it does with the batch before, schedules included, is
done then. Ranks come to that place apart: `meeting.py` brings them together.
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

from adaloader.checkpoint.layout import INDEX, STEP_NAME, complete_in, remove_checkpoint, step_folder
from adaloader.checkpoint.meeting import FOLLOWING, Meeting
from adaloader.checkpoint.saving import save_at
from adaloader.checkpoint.signals import Signals
from adaloader.errors import CheckpointError

if TYPE_CHECKING:
    from adaloader.checkpoint.writing import Saving
    from adaloader.reading.iteration import Iteration
    from adaloader.reading.loader_iterator import LoaderIterator

log = logging.getLogger("adaloader")

# A loop that takes its next batch before it has stepped for the last one always has a gradient that is not saved.
_MOST_PUT_OFF = 1000


class Periodic:
    """Makes the checkpoints of one loader (construction is collective).

    Args:
        loader: the loader.
        folder: in which each checkpoint is a folder `step-...`.
        every_steps: optimizer steps from one to the next; None: not by steps.
        every_minutes: minutes from one to the next, by rank 0's clock; None: not by time.
        keep: how many complete ones stay.
        extra: what to keep beside, or a function that returns it when a checkpoint is made.
        signals: whether SIGTERM, SIGUSR1 and Ctrl-C end the run with a checkpoint.
        asynchronous: whether the run goes on while one is written.
    """

    def __init__(
        self,
        loader,
        folder: Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        signals: bool = True,
        asynchronous: bool = False,
    ):
        _check(every_steps, every_minutes, keep)
        self._loader = weakref.ref(loader)
        self._managed = loader._session.managed
        self._rank = self._managed.manager.rank
        self._folder, self._keep, self._extra, self._asynchronous = folder, keep, extra, asynchronous
        self._saving: Saving | None = None
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._last_steps, self._last_time = self._managed.optimizer_steps, time.monotonic()
        self._put_off = 0
        self._iteration: weakref.ref[Iteration] | None = None
        self._others_ended = False
        self.meeting = Meeting(self._managed.manager) if self._managed.ranks > 1 else None
        self._signals = Signals() if signals else None
        if self._signals is not None:
            # A loader that nobody holds any more makes none. At exit `managing.py` ends by a signal that waits.
            weakref.finalize(loader, self._signals.close).atexit = False

    def close(self) -> None:
        """Wait for what is being written, and give the signals back."""
        self._finish()
        if self._signals is not None:
            self._signals.close()

    def hand_signal_on(self) -> None:
        """Closed, and the loader too: a signal that came after the last batch does what it did before."""
        if self._signals is not None:
            self._signals.hand_on()

    # Where the loop asks for its next batch

    def before_batch(self, iterator: LoaderIterator) -> None:
        """Make a checkpoint if one is due; end the process with code 0 if a signal has asked for that.

        Raises:
            CheckpointError: if the one that a signal has asked for cannot be made.
        """
        if self._saving is not None and self._saving.done:
            self._finish()
        if not iterator.iteration.trains:
            return
        if self._iteration is None or self._iteration() is not iterator.iteration:
            self._iteration, self._others_ended = weakref.ref(iterator.iteration), False
            if self.meeting is not None:
                self.meeting.pass_begins()
        at_meeting = self.meeting is not None and self.meeting.is_at_next_place()
        by_steps = self._is_due_by_steps() and not self._others_ended
        if self.meeting is not None and not at_meeting and not self._others_ended and self._is_due_here():
            self.meeting.ask()
        if not (at_meeting or by_steps or (self.meeting is None and self._is_due_here())):
            return
        ready, ending = self._is_at_rest(), self._is_asked_to_end
        if self.meeting is not None:
            words, endings = self.meeting.meet(int(ready), int(ending))
            self._others_ended = bool((words == FOLLOWING).any())
            ready, ending = bool((words == 1).all()), bool(endings.any())
        if ready:
            self._put_off = 0
            self._save(iterator, ending)
        else:
            self._say_put_off()

    def _is_due_by_steps(self) -> bool:
        """Whether a checkpoint is due, as all ranks find at the same place."""
        return self._every_steps is not None and self._managed.optimizer_steps - self._last_steps >= self._every_steps

    def _is_due_here(self) -> bool:
        """Whether one is due for a reason that this rank alone may know of."""
        if self._is_asked_to_end:
            return True
        if self._every_minutes is None or self._rank:
            return False
        return time.monotonic() - self._last_time >= 60.0 * self._every_minutes

    @property
    def _is_asked_to_end(self) -> bool:
        return self._signals is not None and self._signals.received is not None

    def _is_at_rest(self) -> bool:
        """Whether no gradient waits for a step."""
        reducer = self._managed.reducer
        if reducer is not None and reducer.is_deferred:
            return False
        return not any(table.has_gradient and not table.is_stepped for table in self._managed.tables)

    def _say_put_off(self) -> None:
        self._put_off += 1
        if self._put_off == _MOST_PUT_OFF:
            log.warning(
                "no checkpoint was made for %d batches: whenever the loop asks for its next batch, it has a "
                "gradient with which it has not stepped; call adaloader.save after optimizer.step()",
                _MOST_PUT_OFF,
            )

    # Saving

    def _save(self, iterator: LoaderIterator, is_ending: bool) -> None:
        if is_ending and self._signals is not None:
            self._signals.acted_on()
        steps = self._managed.optimizer_steps
        path = step_folder(self._folder, steps)
        extra = self._extra() if callable(self._extra) else self._extra
        self._last_steps, self._last_time = steps, time.monotonic()
        self._finish()
        if not (path / INDEX).exists() or self.meeting is not None:
            goes_on = self._asynchronous and not is_ending
            try:
                before = iterator.state_before_unused()
                self._saving = save_at(path, self._loader(), extra, before, asynchronous=goes_on)
            except CheckpointError as error:
                self._not_made(path, error, is_ending)
                return
            if not goes_on:
                self._finish(is_ending)
        if is_ending:
            if self._rank == 0:
                name = "another rank's signal" if self._signals is None else self._signals.name
                print(f"adaloader: {name}: saved {path} after step {steps}, and ended", file=sys.stderr, flush=True)
            raise SystemExit(0)

    def _finish(self, is_ending: bool = False) -> None:
        """Wait for what is being written; what it replaces is removed then."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saved = saving.wait()
        except CheckpointError as error:
            self._not_made(saving.path, error, is_ending)
            return
        said = "checkpoint %s: %d bytes in %.2f s, of which training stood still for %.2f s"
        log.info(said, saved.path, saved.bytes, saved.seconds, saved.stall_seconds)
        if self._rank == 0:
            self._remove_old(saved.path)

    def _not_made(self, path: Path, error: CheckpointError, is_ending: bool) -> None:
        if is_ending:
            raise error
        if self._rank == 0:
            print(f"adaloader: no checkpoint {path.name}, and the run goes on: {error}", file=sys.stderr)

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
