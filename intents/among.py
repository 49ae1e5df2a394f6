"""Ids that cannot be derived, and yet are mostly those of the batch: shuffled, masked at random, sorted by numpy.

Their lookups cannot be foreseen, but their rows can: those of the leaf that holds them, or most of them. It is a guess
from one step, and an intent is a hint: where it is wrong, rows come on demand and are counted so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .tape import Lookup, Tape

_FEWEST = 4  # distinct ids: fewer may be in a leaf by chance
_MOST_BESIDES = 4  # times as many rows may be intended as are looked up
_MOST_OF_THEM = 0.7  # share of the ids that the leaf must hold: some may be replaced, as by a mask's token


def find_leaves(tape: Tape, suspects: Iterable[Lookup]) -> None:
    """Set ``among`` of the suspects' sites where the lookups of one table at one line found their ids in one leaf."""
    groups: dict[tuple, list[Lookup]] = {}
    for lookup in suspects:
        groups.setdefault((lookup.site.table, lookup.site.where, lookup.site.batch_number), []).append(lookup)
    held: dict[int, np.ndarray | None] = {}
    for (_, _, number), lookups in groups.items():
        ids = np.unique(np.concatenate([lookup.ids for lookup in lookups]))
        fitting = [(len(found), index) for index, found in _leaves(tape, number, held) if _holds(found, ids)]
        if len(ids) >= _FEWEST and fitting:
            for lookup in lookups:
                lookup.site.among = tape.values[min(fitting)[1]].path


def repeated_by_python(tape: Tape, lookups: Iterable[Lookup]) -> list[Lookup]:
    """Return those of ``lookups``, whose ids Python made, that stand in a loop over ids of the batch.

    Each alone looks like a constant: ``for i in ids: table[int(i)]``.
    """
    groups: dict[tuple, list[Lookup]] = {}
    for lookup in lookups:
        groups.setdefault((lookup.site.table, lookup.site.where), []).append(lookup)
    read = {value.number for value in tape.values if value.kind == "number" and not value.implied}
    looped = []
    for group in groups.values():
        ids = np.unique(np.concatenate([lookup.ids for lookup in group]))
        if len(group) > 1 and len(ids) > 1 and (read.issuperset(ids.tolist()) or len(ids) >= _FEWEST):
            looped += group
    return looped


def _leaves(tape: Tape, number: int | None, held: dict[int, np.ndarray | None]) -> Iterable[tuple[int, np.ndarray]]:
    for index in tape.batches.get(number, ()):
        if index not in held:
            held[index] = _integers(tape.values[index].tensor)
        if held[index] is not None:
            yield index, held[index]


def _integers(leaf: torch.Tensor) -> np.ndarray | None:
    if leaf.layout is not torch.strided or leaf.dtype not in (torch.int64, torch.int32) or leaf.device.type != "cpu":
        return None
    return np.unique(leaf.numpy())


def _holds(found: np.ndarray, ids: np.ndarray) -> bool:
    return len(found) <= _MOST_BESIDES * len(ids) and np.isin(ids, found).mean() >= _MOST_OF_THEM
