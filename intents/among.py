"""Ids that cannot be derived, and yet are mostly those of the batch: shuffled, masked at random, sorted by numpy.

Their lookups cannot be foreseen, but their rows can: those of the leaf that holds them, or most of them, or of all the
tensors in one list of the batch. It is a guess from one step, and an intent is a hint: where it is wrong, rows come on
demand and are counted so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .batch import sibling_groups
from .entries import Lookup
from .tape import Tape

_FEWEST = 4  # distinct ids: fewer may be in a leaf by chance
_MOST_BESIDES = 4  # times as many rows may be intended as are looked up
_MOST_OF_THEM = 0.7  # share of the ids that the leaf must hold: some may be replaced, as by a mask's token
_MOST_ADDED = 4  # ids that are not in the leaf, and may be such tokens


def find_leaves(tape: Tape, lookups: Iterable[Lookup]) -> None:
    """Set ``among`` of the lookups' sites where those of one table at one line found their ids in the batch."""
    groups: dict[tuple, list[Lookup]] = {}
    for lookup in lookups:
        groups.setdefault((lookup.site.table, lookup.site.where, lookup.site.batch_number), []).append(lookup)
    known: dict[int, list[tuple[tuple[str, ...], np.ndarray]]] = {}
    for (_, _, number), together in groups.items():
        ids = np.unique(np.concatenate([lookup.ids for lookup in together]))
        if number not in known:
            known[number] = list(_places(tape, number))
        if len(ids) < _FEWEST:
            continue
        fitting = [(len(held), at) for at, (_, held) in enumerate(known[number]) if _holds(held, ids)]
        if fitting:
            paths, held = known[number][min(fitting)[1]]
            added = ids[~np.isin(ids, held)]
            for lookup in together:
                lookup.site.among = paths
                lookup.site.added = tuple(added.tolist()) if len(added) <= _MOST_ADDED else ()


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


def _places(tape: Tape, number: int | None) -> Iterable[tuple[tuple[str, ...], np.ndarray]]:
    """Yield paths of integer leaves of a batch, and the distinct integers there: one by one, then list by list."""
    values = [tape.values[index] for index in tape.batches.get(number, ())]
    held = [_integers(value.tensor) for value in values]
    for value, integers in zip(values, held, strict=True):
        if integers is not None:
            yield (value.path,), integers
    for group in sibling_groups([value.path for value in values]):
        if all(held[place] is not None for place in group):
            yield tuple(values[place].path for place in group), np.unique(np.concatenate([held[at] for at in group]))


def _integers(leaf: torch.Tensor) -> np.ndarray | None:
    if leaf.layout is not torch.strided or leaf.dtype not in (torch.int64, torch.int32) or leaf.device.type != "cpu":
        return None
    return np.unique(leaf.numpy()).astype(np.int64)


def _holds(found: np.ndarray, ids: np.ndarray) -> bool:
    return len(found) <= _MOST_BESIDES * len(ids) and np.isin(ids, found).mean() >= _MOST_OF_THEM
