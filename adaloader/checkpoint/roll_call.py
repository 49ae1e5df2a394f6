"""Before ranks save together: whether all of them can, or some have run out of batches and follow the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adaloader.errors import CheckpointError
from pm.messages import Kind, Message

if TYPE_CHECKING:
    from pm import SynchronousManager

_HERE, _FOLLOWS = 0, 1


class RollCall:
    """Has every rank say whether it is in its loop; made with the first loader, before others can save (collective).

    A rank that follows the others, and would never come to their save, hears that they wait, and answers.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._calls = self._calls_of_others = 0
        self._passed_on = manager.on_control
        manager.on_control = self._receive

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.CHECKPOINT_ROLL:
            self._calls_of_others = max(self._calls_of_others, message.numbers[0])
        elif self._passed_on is not None:
            self._passed_on(source, message)

    @property
    def others_wait(self) -> bool:
        """Whether others have come to a save to which this rank has not."""
        return self._calls_of_others > self._calls

    def answer(self) -> None:
        """This rank has run out of batches: let the others, who wait, know (collective)."""
        self._call(_FOLLOWS)

    def check(self) -> None:
        """Wait until all ranks have answered (collective).

        Raises:
            CheckpointError: on all that are in their loops, if some have run out of batches.
        """
        follows = np.flatnonzero(self._call(_HERE) == _FOLLOWS)
        if len(follows):
            raise CheckpointError(
                f"nothing was saved: rank {', '.join(map(str, follows))} has run out of batches in this pass, and its "
                "loop does not come here; save after a step that all ranks have a batch for, or after the pass"
            )

    def _call(self, answer: int) -> np.ndarray:
        self._calls += 1
        for peer in self._manager.peers:
            self._manager.transport.send(peer, Message(Kind.CHECKPOINT_ROLL, (self._calls,)))
        self._manager.transport.wake()
        mine, everyones = np.array([answer], np.int64), np.empty(self._manager.ranks, np.int64)
        self._manager.transport.collective(lambda comm: comm.Iallgather(mine, everyones), self._manager.timeout_seconds)
        return everyones
