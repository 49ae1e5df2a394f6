"""Gradients that a machine's ranks have for rows of another machine: summed here, sent once, and put in their place.

Each rank leaves them with the rank of its machine that deals with the owner, and tells the owner what they are for: the
GRADIENT that it would have sent, without values. When the STEP of every rank of the machine is there, that rank sums in
the order of ranks, and sends the owner the SUM, which needs not say for which rows: both sides list those of the ranks
in the same order. So owners apply a step when every STEP, and every SUM for rows that were named, is there.

An owner sums what the ranks of its own machine have in the same way before it adds up machines: what a step makes of a
row is the same to the bit wherever the row is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pm.messages import Kind, Message
from pm.pieces import Piece, Summing, kind_of

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

IN_SUM = -2
"""In place of where in shared memory a gradient's values are: they come in a SUM."""
NO_COUNTS = np.empty(0, np.int64)

ByRank = dict[int, list[Piece]]


@dataclass
class ArrivedSums:
    """The sums of other machines for one step at one owner: those that are `awaited`, and those that are `here`, with
    their values and counts, by lowest rank of the machine, table and kind (see `pm.pieces.kind_of`).
    """

    awaited: set[tuple[int, int, int]] = field(default_factory=set)
    here: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def missing(self) -> set[tuple[int, int, int]]:
        return {key for key in tuple(self.awaited) if key not in self.here}  # on any thread


class MachineSums:
    """Sums for ranks of other machines what this machine's ranks have, and takes in what other machines have summed.

    On the background thread alone. Invariant: `_portions` are of steps that not all ranks of this machine have taken.

    Args:
        manager: of which rank.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._portions: dict[int, dict[tuple[int, int], ByRank]] = {}
        self._summing = Summing(alike=True)

    # For the machine's ranks

    def on_portion(self, source: int, message: Message) -> None:
        """PORTION(step, owner, table, ordinal, has counts, place; rows, values, scale, counts): a gradient for rows of
        an owner on another machine; `place` as in GRADIENT.
        """
        step, owner, table, ordinal, counted, place = message.numbers
        rows, values, scale, counts = message.arrays
        if place >= 0:
            gradients = self._manager.neighbours.gradients
            values = gradients.values(source, place, len(rows), values.shape[1], values.dtype)
        piece = Piece(rows, values, float(scale[0]), ordinal, counts if counted else None)  # its slots are rows here
        by_owner = self._portions.setdefault(step, {})
        by_owner.setdefault((owner, table), defaultdict(list))[source].append(piece)

    def send_complete(self, step: int, stepped: Collection[int]) -> None:
        """SUM(step, table, kind; values, counts), where `stepped` says that all ranks of this machine took the step."""
        manager = self._manager
        if step not in self._portions or not all(rank in stepped for rank in manager.machines.of(manager.rank)):
            return
        for (owner, number), by_rank in sorted(self._portions.pop(step).items()):
            pieces = in_rank_order(by_rank, manager.machines.of(manager.rank))
            for piece in self._summing.sums(pieces, manager.tables[number].spec.dim):
                if len(piece.slots):
                    counts = NO_COUNTS if piece.counts is None else piece.counts
                    numbers = step, number, kind_of(piece)
                    manager.transport.send(owner, Message(Kind.SUM, numbers, (piece.values, counts)))

    # For the owner

    def expect(self, sums: ArrivedSums, source: int, table: int, piece: Piece) -> None:
        """The values of a piece of `source`, on another machine, come in a sum."""
        if len(piece.slots):
            sums.awaited.add((self._manager.machines.of(source)[0], table, kind_of(piece)))

    def on_sum(self, source: int, message: Message) -> None:
        """SUM: see `send_complete`."""
        step, table, kind = message.numbers
        sums = self._manager.serving.sums_of(step)
        sums.here[self._manager.machines.of(source)[0], table, kind] = message.arrays
        self._manager.serving.apply_complete()

    def missing_ranks(self, sums: ArrivedSums) -> set[int]:
        """Return the ranks whose sums have not come."""
        machines, rank = self._manager.machines, self._manager.rank
        return {machines.agent(machines.of(lowest), rank) for lowest, _, _ in sums.missing}

    def pieces(self, number: int, by_rank: ByRank, sums: ArrivedSums) -> list[Piece]:
        """Return a table's pieces of a step in the order in which they are added up: of each machine one of a kind."""
        manager, machines = self._manager, self._manager.machines
        if not machines.add_up:
            return in_rank_order(by_rank, sorted(by_rank))
        pieces = []
        for machine in machines.groups:
            given = in_rank_order(by_rank, machine)
            if len(machine) == 1 or not given:
                pieces += given
            elif manager.rank in machine:
                pieces += self._summing.sums(given, manager.tables[number].spec.dim)
            else:
                summed = self._summing.slots_of(given)
                pieces += [self._filled_in(piece, (machine[0], number, kind_of(piece)), sums) for piece in summed]
        return pieces

    def _filled_in(self, piece: Piece, key: tuple[int, int, int], sums: ArrivedSums) -> Piece:
        if not len(piece.slots):
            return piece
        values, counts = sums.here[key]
        if len(values) != len(piece.slots):
            raise RuntimeError(
                f"rank {self._manager.rank} got a sum of {len(values)} rows of table {key[1]} from the machine of rank "
                f"{key[0]}, whose ranks have named {len(piece.slots)}"
            )
        return Piece(piece.slots, values, piece.scale, piece.ordinal, None if piece.counts is None else counts)


def in_rank_order(by_rank: ByRank, ranks: Collection[int]) -> list[Piece]:
    """Return the pieces of `ranks`, which are ascending."""
    return [piece for rank in ranks for piece in by_rank.get(rank, ())]
