"""Rows that are in no plan: read wherever they are, or found so that a gradient can be sent there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.exact.requests import ask
from pm.messages import Kind, Message, widen
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager


@dataclass
class _Search:
    """Rows that were asked for: ticket t is position `order[t]`; `missing` tickets are still without an answer."""

    number: int
    order: np.ndarray
    missing: int
    answers: list[tuple[int, np.ndarray, np.ndarray | None]] = field(default_factory=list)


class OnDemand:
    """Asks for rows and waits for the answers: on the trainer's thread, one search at a time.

    Args:
        manager: whose rows these are.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._numbers = 0
        self._searches: dict[int, _Search] = {}

    @property
    def under_way(self) -> bool:
        return bool(self._searches)

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> None:
        """Write distinct `rows` at the current version to `out` `[n, dim]`, from their owners."""
        manager = self._manager
        manager.settle()
        with manager.structure:  # a row that is here now must not leave before it is read
            slots = manager.slots_here(table, rows)
            own = np.flatnonzero(slots >= 0)
            manager.gather_own(table, slots[own], out, own)
            search, asked = self._begin(Kind.PULL, table, rows, np.flatnonzero(slots < 0))
        self._receive(search, asked, out)

    def pull_states(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the optimizer state `[n, state_words]` of distinct `rows` at the current version."""
        manager = self._manager
        manager.settle()
        out = np.empty((len(rows), table.spec.record_class.state_words), table.spec.dtype)
        with manager.structure:
            slots = manager.slots_here(table, rows)
            own = np.flatnonzero(slots >= 0)
            manager.catch_up(table, slots[own])
            out[own] = table.store.states(slots[own])
            search, asked = self._begin(Kind.PULL_STATES, table, rows, np.flatnonzero(slots < 0))
        self._receive(search, asked, out)
        return out

    def _receive(self, search: _Search, asked: set[int], out: np.ndarray) -> None:
        """Write what a search finds to its rows of `out` `[n, width]`."""
        for _, tickets, found in self._await([search], asked)[0]:
            cuda_ops.scatter(out.reshape(-1), out.shape[1], search.order[tickets], found)

    def locate(self, wanted: Sequence[tuple[Table, np.ndarray]]) -> list[np.ndarray]:
        """Return the owners (int64 `[n]`) of each table's distinct `rows` (int64 `[n]`).

        Every row stays with its owner until that has applied the step that this rank hands over next.
        """
        manager = self._manager
        owners = [manager.directory.home_of(table.keys(rows)) for table, rows in wanted]
        if not manager.techniques.moves:
            return owners
        searched, searches, asked = [], [], set()
        for at, (table, rows) in enumerate(wanted):
            if manager.neighbours.have_all(table):
                continue
            with manager.structure:
                slots = manager.slots_here(table, rows)
                pinned = manager.serving.pin(table, slots[slots >= 0])
                absent = np.flatnonzero(slots < 0)
                search, more = self._begin(Kind.LOCATE, table, rows, absent)
            manager.transport.post(lambda step=manager.steps, pin=pinned: manager.serving.unpin_after(step, *pin))
            owners[at] = np.full(len(rows), manager.rank, np.int64)
            searched.append(owners[at])
            searches.append(search)
            asked |= more
        for found, search, answers in zip(searched, searches, self._await(searches, asked), strict=True):
            for source, tickets, _ in answers:
                found[search.order[tickets]] = source
        return owners

    def _begin(self, what: Kind, table: Table, rows: np.ndarray, absent: np.ndarray) -> tuple[_Search, set[int]]:
        """Ask for `rows[absent]`; return the search and who was asked."""
        manager = self._manager
        ranks = manager.directory.ask_at(table.keys(rows[absent]))
        order, counts = cuda_ops.partition(ranks, manager.ranks)
        self._numbers += 1
        search = self._searches[self._numbers] = _Search(self._numbers, absent[order], len(absent))
        first = 0
        for peer, count in enumerate(counts.tolist()):
            if count:
                part = rows[search.order[first : first + count]]
                ask(manager, what, peer, search.number, table, manager.steps, first, part)
            first += count
        return search, set(np.flatnonzero(counts).tolist())

    def _await(self, searches: Sequence[_Search], asked: set[int]) -> list[list]:
        self._manager.transport.wake()
        self._manager.wait_for_rows(lambda: not any(search.missing for search in searches), sorted(asked))
        for search in searches:
            del self._searches[search.number]
        return [search.answers for search in searches]

    # On the background thread

    def on_pulled(self, source: int, message: Message) -> None:
        """PULLED(number; tickets, values): rows of a PULL, or their states of a PULL_STATES."""
        self._found(source, message, message.arrays[1])

    def on_located(self, source: int, message: Message) -> None:
        """LOCATED(number; tickets): `source` has rows of a LOCATE, and keeps them for this rank's next step."""
        self._found(source, message, None)

    def _found(self, source: int, message: Message, values: np.ndarray | None) -> None:
        search = self._searches.get(message.numbers[0])
        if search is not None:  # else nobody waits any more
            tickets = widen(message.arrays[0])
            search.answers.append((source, tickets, values))
            search.missing -= len(tickets)
