"""Steps at staleness 0 of tables in memory that all ranks share: nobody waits for messages.

A rank leaves its gradients of step v, by owner of the rows, and says so in a word that all see. Once every rank has,
each owner sums what there is for its rows, ranks in ascending order, applies it and says that; once every rank has,
rows are at version v + 1. Whoever gets there first does its rank's part: the trainer's thread, on its way to the next
lookup, or the background thread, when the STEP messages are here. (These go round as ever, for ranks that have run out
of batches.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.pieces import Piece, Summing
from pm.same_step import Stepped, check_same_step
from pm.tables import Table, TableGradient
from pm.together import runs

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager
    from pm.storage.shared_memory import MappedBlock, SharedBlock
    from pm.storage.shared_store import SharedStore

Groups = Mapping[int, dict[str, object]]

_LINE_WORDS = 8
_PUBLISHED, _APPLIED, _HEADERS = 0, 1, 2
_HALF_BYTES = 1 << 32  # of address space
_ALIGNED_BYTES = 64
_STEP_NUMBERS = 6  # at the beginning of a header: what `Stepped` has, and where its vector is
# Looks at the others' words before a rank waits for messages to wake it: how many in all, how many of these with no
# more between them than letting others have the processor, and the pauses between the rest: some ten milliseconds.
_LOOKS, _LOOKS_AT_ONCE = 50, 10
_SHORTEST_PAUSE_SECONDS, _BACK_OFF = 2e-5, 1.1


@dataclass(frozen=True)
class _Given:
    """What a rank gives an owner for rows of `tables`, which share a store, at slots there."""

    tables: tuple[int, ...]
    piece: Piece


class SharedSteps:
    """The steps of one rank.

    Invariant: memory of step v is used for another when every rank has applied v. A rank publishes v + 1 when it has
    read all that it reads at version v + 1, so that no record is written which another is reading.

    Args:
        manager: whose steps these are.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._memory: np.ndarray | None = None
        self._words = np.zeros((0, _LINE_WORDS), np.int64)
        self._groups: dict[int, Groups] = {}
        self._summing = Summing(alike=True)
        self._applying = threading.Lock()
        self._used = 0

    @property
    def is_used(self) -> bool:
        """Whether there are such tables."""
        return self._memory is not None

    def begin(self, block: SharedBlock | MappedBlock) -> None:
        """Use a block of `block_bytes`, zeros (collective, before the first step)."""
        ranks = self._manager.ranks
        self._words = np.frombuffer(block.memory, np.int64, ranks * _LINE_WORDS).reshape(ranks, _LINE_WORDS)
        self._memory = np.frombuffer(block.memory, np.uint8)
        self._words[self._manager.rank, : _APPLIED + 1] = self._manager.steps

    @staticmethod
    def block_bytes(ranks: int) -> int:
        """Return how much memory steps of so many ranks take at most; nearly all of it is never touched."""
        return ranks * (2 * _HALF_BYTES + _LINE_WORDS * 8)

    # Handing over: the trainer's thread

    def publish(self, gradients: Sequence[TableGradient], groups: Groups, stepped: Stepped) -> None:
        """Leave this rank's gradients of the step that it takes now, for all to apply.

        Raises:
            MemoryError: if they take more than there is room for.
        """
        manager, step = self._manager, self._manager.steps
        self._wait_until_applied(step - 1)  # the memory has that step's gradients
        self._used = 0
        header = [*stepped.numbers, self._leave(stepped.vector), len(stepped.vector)]
        for run in self._runs(gradients, groups):
            header += self._leave_run(run)
        self._groups[step] = groups
        words = self._words[manager.rank]
        words[_HEADERS + 2 * (step % 2)] = self._leave(np.array(header, np.int64))
        words[_HEADERS + 2 * (step % 2) + 1] = len(header)
        self._say(_PUBLISHED, step + 1)

    def _runs(self, gradients: Sequence[TableGradient], groups: Groups) -> list[list[TableGradient]]:
        times: dict[int, int] = {}
        for gradient in gradients:
            times[gradient.table.number] = times.get(gradient.table.number, 0) + 1
        alone = [[each] for each in gradients if times[each.table.number] > 1 or each.counts is not None]
        others = [each for each in gradients if times[each.table.number] == 1 and each.counts is None]
        return alone + list(runs(others, groups))

    def _leave_run(self, run: Sequence[TableGradient]) -> list[int]:
        """Leave the gradients of tables that follow each other in memory; return what the header says of them."""
        first, manager = run[0], self._manager
        store: SharedStore = first.table.store
        if len(run) > 1:
            part = slice(first.plan.first, run[-1].plan.first + len(run[-1].rows))
            stretch = first.plan.stretch
            slots, keys, values = stretch.slots[part], stretch.keys[part], first.sums[part]
        else:
            plan, values = first.plan, first.values
            slots = manager.touch(first.table, first.rows) if plan is None else plan.slots
            keys = manager.shared.keys(first.table, first.rows)
        order, counts = cuda_ops.partition(store.owners(keys), manager.ranks)
        flat, dim = np.ascontiguousarray(values).reshape(-1), first.table.spec.dim
        left = self._room(len(order) * dim * flat.itemsize).view(flat.dtype).reshape(len(order), dim)
        cuda_ops.gather(flat, dim, order, left)
        at_values = self._offset_of(left)
        at_slots = self._leave(slots[order])
        at_counts = -1 if first.counts is None else self._leave(first.counts[order])
        scale = int(np.float64(first.scale).view(np.int64))
        tables = [gradient.table.number for gradient in run]
        return [len(tables), *tables, scale, first.ordinal, at_values, at_slots, at_counts, *counts.tolist()]

    def _leave(self, array: np.ndarray) -> int:
        """Copy an array of 8-byte words to this rank's memory of the step; return where it is."""
        room = self._room(array.nbytes)
        room.view(array.dtype)[...] = array
        return self._offset_of(room)

    def _room(self, size: int) -> np.ndarray:
        manager = self._manager
        if self._used + size > _HALF_BYTES:
            raise MemoryError(
                f"the gradients of step {manager.steps} for rows take more than {_HALF_BYTES:,} bytes on rank "
                f"{manager.rank}; make batches smaller, or give shared_memory=False"
            )
        begin = self._half_of(manager.rank, manager.steps) + self._used
        self._used += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return self._memory[begin : begin + size]

    def _half_of(self, rank: int, step: int) -> int:
        return self._words.nbytes + (2 * rank + step % 2) * _HALF_BYTES

    def _offset_of(self, array: np.ndarray) -> int:
        return array.ctypes.data - self._memory.ctypes.data

    def _say(self, what: int, step: int) -> None:
        cuda_ops.store_word(self._words, self._manager.rank * _LINE_WORDS + what, step)

    # Applying: any thread

    def apply(self, end: int) -> None:
        """Apply the steps before `end` that are not, which all ranks have published."""
        with self._applying:
            for step in range(int(self._words[self._manager.rank, _APPLIED]), end):
                self._apply(step)
                self._say(_APPLIED, step + 1)

    def go_on(self) -> None:
        """Apply the steps that this rank has handed over, if all ranks have."""
        steps = self._manager.steps
        if self.is_used and cuda_ops.all_reached(self._words, _PUBLISHED, steps):
            self.apply(steps)

    def _apply(self, step: int) -> None:
        manager = self._manager
        started = time.perf_counter()
        stepped, given = {}, []
        for rank in range(manager.ranks):
            stepped[rank], of_rank = self._given_by(rank, step)
            given += of_rank
        check_same_step(step, manager.rank, stepped, manager.describe_hyperparameter())
        groups = self._groups.pop(step)
        by_store: dict[SharedStore, list[_Given]] = {}
        for each in given:
            by_store.setdefault(manager.tables[each.tables[0]].store, []).append(each)
        for store, of_store in by_store.items():
            self._apply_to(store, of_store, groups, step + 1)
        manager.traffic.seconds["update"] += time.perf_counter() - started

    def _given_by(self, rank: int, step: int) -> tuple[Stepped, list[_Given]]:
        """Return what a rank says of a step, and what it gives for rows of this one."""
        manager = self._manager
        at, length = self._words[rank, _HEADERS + 2 * (step % 2) :][:2].tolist()
        header = self._at(at, length, np.int64).tolist()
        *numbers, at_vector, vector_length = header[:_STEP_NUMBERS]
        given, place, ranks = [], _STEP_NUMBERS, manager.ranks
        while place < len(header):
            tables = tuple(header[place + 1 : place + 1 + header[place]])
            place += 1 + len(tables)
            scale, ordinal, at_values, at_slots, at_counts, *counts = header[place : place + 5 + ranks]
            place += 5 + ranks
            spec, before, count = manager.tables[tables[0]].spec, sum(counts[: manager.rank]), counts[manager.rank]
            itemsize = np.dtype(spec.dtype).itemsize
            values = self._at(at_values + before * spec.dim * itemsize, count * spec.dim, spec.dtype)
            piece = Piece(
                self._at(at_slots + 8 * before, count, np.int64),
                values.reshape(count, spec.dim),
                float(np.int64(scale).view(np.float64)),
                ordinal,
                None if at_counts < 0 else self._at(at_counts + 8 * before, count, np.int64),
            )
            given.append(_Given(tables, piece))
        vector = self._at(at_vector, vector_length, np.float64).copy()
        return Stepped.received(*numbers, vector=vector), given

    def _at(self, offset: int, count: int, dtype) -> np.ndarray:
        return self._memory[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    def _apply_to(self, store: SharedStore, given: Sequence[_Given], groups: Groups, version: int) -> None:
        """Apply what all ranks give for one store: of all tables together, where that gives the same."""
        manager = self._manager
        tables = [manager.tables[number] for number in sorted({number for each in given for number in each.tables})]
        if _are_alike(tables, groups) and len({each.piece.scale for each in given}) == 1:
            self._update(tables, [each.piece for each in given], groups, version)
            return
        for table in tables:
            pieces = [self._part_of(each, table) for each in given if table.number in each.tables]
            self._update([table], pieces, groups, version)

    def _part_of(self, given: _Given, table: Table) -> Piece:
        """Return the part of what is given for several tables that is for one."""
        if len(given.tables) == 1:
            return given.piece
        piece = given.piece
        at = self._manager.shared.positions_of(table, piece.slots)
        return Piece(piece.slots[at], piece.values[at], piece.scale, piece.ordinal, None)

    def _update(self, tables: Sequence[Table], pieces: list[Piece], groups: Groups, version: int) -> None:
        first = tables[0]
        slots, grads, scale = self._summing.combine(pieces, first.spec.dim)
        for table in tables:
            table.gradient_steps += 1
            table.begun = True
        if len(slots):
            first.store.keep(slots)
            rule, group = first.spec.rule, groups[first.number]
            rule.apply(first.store, slots, grads, scale, group, first.gradient_steps, version)

    # Waiting: the trainer's thread

    def settle(self) -> None:
        """Have all steps that this rank has handed over applied, by all ranks."""
        if self.is_used:
            self._wait_until_applied(self._manager.steps)

    def _wait_until_applied(self, steps: int) -> None:
        """Wait until all ranks have applied so many steps; this one's part is done here."""
        if cuda_ops.all_reached(self._words, _APPLIED, steps):
            return
        if self._words[self._manager.rank, _APPLIED] < steps:
            self._wait(_PUBLISHED, steps)
            self.apply(steps)
        self._wait(_APPLIED, steps)

    def _wait(self, what: int, steps: int) -> None:
        words, manager = self._words, self._manager
        if cuda_ops.all_reached(words, what, steps):
            return
        started = time.perf_counter()
        pause = _SHORTEST_PAUSE_SECONDS
        for look in range(_LOOKS):
            if look < _LOOKS_AT_ONCE:
                time.sleep(0)
            else:
                time.sleep(pause)
                pause *= _BACK_OFF
            if cuda_ops.all_reached(words, what, steps):
                manager.count_wait(time.perf_counter() - started)
                return
        manager.count_wait(time.perf_counter() - started)
        others = manager.others
        manager.wait_for_words(
            lambda: np.flatnonzero(words[:, what] < steps).tolist(),
            steps - 1,
            others.ended if what == _PUBLISHED else others.gone,  # one that has closed goes on applying
        )
        cuda_ops.all_reached(words, what, steps)  # what they have written before is seen from here on


def _are_alike(tables: Sequence[Table], groups: Groups) -> bool:
    """Whether one step updates the records of tables of one store alike."""
    first = tables[0]
    return all(
        table.gradient_steps == first.gradient_steps
        and groups[table.number] is groups[first.number]
        and type(table.spec.rule) is type(first.spec.rule)
        for table in tables[1:]
    )
