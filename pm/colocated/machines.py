"""Which ranks are on which machine, and which rank of a machine deals for it with a rank of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np


class Machines:
    """The machines of all ranks, alike on every rank.

    Args:
        rank: this one.
        groups: the ranks of each machine; together, every rank once.
    """

    def __init__(self, rank: int, groups: Iterable[Sequence[int]]):
        self.groups = sorted(sorted(group) for group in groups)
        """The ranks of each machine, ascending; machines in the order of their lowest ranks."""
        self._of = {each: group for group in self.groups for each in group}
        self._rank = rank
        self.together = self._served_together()
        """The other ranks, as this one sends them rows: those of another machine together, all others each alone."""
        self.add_up = 1 < len(self.groups) < len(self._of)
        """Whether gradients are summed on machines first: there are several, and one of them has several ranks."""

    def _served_together(self) -> list[list[int]]:
        own = self._of[self._rank]
        return sorted([[peer] for peer in own if peer != self._rank] + [g for g in self.groups if g is not own])

    def of(self, rank: int) -> list[int]:
        """Return the ranks of the machine that `rank` is on, ascending, itself included."""
        return self._of[rank]

    def agent(self, machine: Sequence[int], other: int) -> int:
        """Return which rank of a machine deals for it with rank `other` of another: each of them with as many."""
        return machine[other % len(machine)]

    def adds_for(self, owner: int) -> int | None:
        """Return the rank of this machine that sums its gradients for rows of `owner`; None if each sends its own."""
        own = self._of[self._rank]
        return None if len(own) == 1 or owner in own else self.agent(own, owner)

    def elsewhere(self) -> Collection[int]:
        """Return the ranks of other machines."""
        return [rank for rank in self._of if rank not in self._of[self._rank]]


def machines_of(comm, neighbours: Sequence[int]) -> Machines:
    """Learn which ranks are on which machine (collective).

    Args:
        comm: the communicator of all ranks.
        neighbours: the other ranks of this rank's machine.
    """
    lowest = np.array([min(comm.rank, *neighbours)] if neighbours else [comm.rank], np.int64)
    everyones = np.empty(comm.size, np.int64)
    comm.Allgather(lowest, everyones)
    return Machines(comm.rank, [np.flatnonzero(everyones == each).tolist() for each in np.unique(everyones)])
