"""How ranks meet to write to a table: all run the same line, but for those that follow (see `reading/following.py`).

A rank that has run out of batches does not run the line with which the others write (a constraint after each step,
say). So before each write every rank says that it is here, and how: one that follows is told by the others' messages
what is written, and takes its part in it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Container
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from adaloader.errors import ManagedTableError
from pm.messages import Kind, Message

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel


class Write(IntEnum):
    """What a write sets, in the words of an error."""

    ALL_VALUES = 0
    SOME_ROWS = 1
    EVERY_ROW_ALIKE = 2
    OPTIMIZER_STATE = 3


class JointWrites:
    """The writes of one model's ranks, in order.

    Messages arrive on the manager's background thread, and are kept by number of the write; everything else happens on
    the trainer's.

    `after_a_step` is how many there were, on this rank, after the last step that the loop took before it asked for
    another batch: as many may follow its next step.
    """

    def __init__(self, model: ManagedModel):
        self._model = weakref.ref(model)
        self._manager = model.manager
        self._number = 0
        self._since_step: int | None = None
        self.after_a_step = 0
        self._said: dict[int, dict[int, Message]] = defaultdict(dict)
        self._passed_on = self._manager.on_control
        self._manager.on_control = self._receive

    def meet(self, write: Write, name: str) -> list[int]:
        """Wait until all ranks are at a write to the table of this name; return those that run its line themselves
        (collective).

        Raises:
            ManagedTableError: if another rank writes something else, or to another table.
        """
        writers = self._meet(write, name, following=False)
        if self._since_step is not None:
            self._since_step += 1
        return writers

    # What this rank's loop does

    def step_taken(self) -> None:
        """This rank has taken a step of its own."""
        self._since_step = 0

    def batch_asked_for(self) -> None:
        """Its loop asks for a batch, and gets one or the end."""
        if self._since_step is not None:
            self.after_a_step, self._since_step = self._since_step, None

    # What a rank that follows does

    def begun_by(self, among: Container[int], *, after_step: int | None = None) -> bool:
        """Whether one of the ranks `among` writes, at the step and sum of gradients at which this rank is.

        They are to be those that are in the loop still: what a rank writes after it, this one will write itself.

        Args:
            after_step: ask only for what is written between this step and the batch that the writer takes next.
        """
        here = self._here()
        said = list(self._said.get(self._number + 1, {}).items())
        return any(
            source in among
            and message.numbers[1:3] == here
            and not message.numbers[4]
            and (after_step is None or message.numbers[5] and here[1] == after_step)
            for source, message in said
        )

    def join(self) -> tuple[Write, str, list[int]]:
        """Say that this rank takes its part; return what is written, the table's name, and the ranks that write
        (collective)."""
        said = list(self._said[self._number + 1].values())
        first = next(message for message in said if not message.numbers[4])
        write, name = Write(first.numbers[3]), first.arrays[0].tobytes().decode()
        return write, name, self._meet(write, name, following=True)

    # Within

    def _here(self) -> tuple[int, int]:
        return self._model().reducer.reductions, self._manager.steps

    def _meet(self, write: Write, name: str, *, following: bool) -> list[int]:
        manager = self._manager
        self._number += 1
        number = self._number
        after_step = not following and self._since_step is not None
        numbers = (number, *self._here(), int(write), int(following), int(after_step))
        mine = Message(Kind.WRITE, numbers, (np.frombuffer(name.encode(), np.uint8),))
        for peer in manager.peers:
            manager.transport.send(peer, mine)
        manager.transport.wake()
        said = self._said[number]
        manager.wait_for_others(
            lambda: [p for p in manager.peers if p not in said], f"write to table {name!r} with this rank"
        )
        del self._said[number]
        said[manager.rank] = mine
        for peer in manager.peers:
            other, their_name = Write(said[peer].numbers[3]), said[peer].arrays[0].tobytes().decode()
            if (other, their_name) != (write, name):
                raise ManagedTableError(
                    f"rank {manager.rank} writes to table {name!r} ({_in_words(write)}) where rank {peer} writes to "
                    f"{their_name!r} ({_in_words(other)}): all ranks must run the same line"
                )
        return [rank for rank in range(manager.ranks) if not said[rank].numbers[4]]

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.WRITE:
            self._said[message.numbers[0]][source] = message
        elif self._passed_on is not None:
            self._passed_on(source, message)


def refused_while_following(name: str, loading: list[int]) -> ManagedTableError:
    """Return the error of ranks some of which load an optimizer's state and some follow: those do not have it."""
    return ManagedTableError(
        f"optimizer.load_state_dict() with state of table {name!r} on rank {', '.join(map(str, loading))} alone: the "
        "others have run out of batches and wait for the end of the pass; load it when the pass is over on all ranks"
    )


def _in_words(write: Write) -> str:
    return write.name.lower().replace("_", " ")
