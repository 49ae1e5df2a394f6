"""Gradients as they arrive at the owner, in pieces of one rank and lookup each, and their sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cuda_ops


@dataclass(frozen=True)
class Piece:
    """One rank's part of a table's gradient, at slots of this rank's store.

    Args:
        slots: int64 `[n]`, distinct.
        values: `[n, dim]`.
        scale: factor still to be applied to `values`.
        ordinal: which lookup of its step it belongs to, where gradients are divided by frequency.
        counts: how often each row was looked up on that rank (int64 `[n]`); None where that does not matter.
    """

    slots: np.ndarray
    values: np.ndarray
    scale: float
    ordinal: int
    counts: np.ndarray | None


class Summing:
    """Sums pieces in the order in which they are given, in memory that it keeps. For one thread at a time.

    Args:
        alike: whether what a row sums to must not depend, to the bit, on which other rows are in the pieces: where rows
            move, different rows are together in each run. The pieces must then be those of all ranks, empty ones too.
    """

    def __init__(self, *, alike: bool = False):
        self._alike = alike
        self._scratch = cuda_ops.DedupScratch()
        self._sums: dict[np.dtype, np.ndarray] = {}

    def combine(self, pieces: list[Piece], dim: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return (distinct slots int64 `[U]`, gradient `[U, dim]`, factor still to apply) of one or more pieces.

        Pieces that have counts are summed per ordinal and divided by their rows' counts together. The arrays are good
        until the next call.
        """
        plain = [piece for piece in pieces if piece.counts is None]
        by_ordinal: dict[int, list[Piece]] = {}
        for piece in pieces:
            if piece.counts is not None:
                by_ordinal.setdefault(piece.ordinal, []).append(piece)
        plain += [self._divided_by_frequency(group, dim) for group in by_ordinal.values()]
        return self._sum(plain, dim)

    def sums(self, pieces: list[Piece], dim: int) -> list[Piece]:
        """Sum pieces that are to be combined with others later: one piece for each of `kinds_of` them, in their order,
        with how often the ranks together looked its rows up. The arrays have their own memory.
        """
        summed = []
        for group in kinds_of(pieces):
            slots, values, scale = self._sum([Piece(p.slots, p.values, p.scale, 0, None) for p in group], dim)
            counts = None if group[0].counts is None else self._counts(group)[1].astype(np.int64)
            summed.append(Piece(slots, values.copy(), scale, group[0].ordinal, counts))
        return summed

    def slots_of(self, pieces: list[Piece]) -> list[Piece]:
        """Return what `sums` does, for pieces whose values and counts are elsewhere: it has those of no row."""
        summed = []
        for group in kinds_of(pieces):
            slots, _ = cuda_ops.dedup(np.concatenate([piece.slots for piece in group]), self._scratch)
            scale = group[0].scale if all(piece.scale == group[0].scale for piece in group) else 1.0
            summed.append(Piece(slots, group[0].values, scale, group[0].ordinal, group[0].counts))
        return summed

    def _counts(self, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Return (distinct slots in the order in which they first occur, how often they were looked up: float64)."""
        slots, inverse = cuda_ops.dedup(np.concatenate([piece.slots for piece in pieces]), self._scratch)
        return slots, np.bincount(inverse, np.concatenate([piece.counts for piece in pieces]), minlength=len(slots))

    def _sum(self, pieces: list[Piece], dim: int) -> tuple[np.ndarray, np.ndarray, float]:
        one_scale = all(piece.scale == pieces[0].scale for piece in pieces)
        pieces = [piece for piece in pieces if len(piece.slots)] or pieces[:1]
        first = pieces[0]
        one_scale = one_scale or (not self._alike and all(piece.scale == first.scale for piece in pieces))
        if len(pieces) == 1 and not self._alike:
            return first.slots, first.values, first.scale
        if len(pieces) == 1 and one_scale:
            return first.slots, first.values + 0, first.scale  # as in a sum, no zero is negative
        scale = first.scale
        if not one_scale:
            pieces = [Piece(p.slots, p.values * p.values.dtype.type(p.scale), 1.0, 0, None) for p in pieces]
            scale = 1.0
        slots, inverse = cuda_ops.dedup(np.concatenate([piece.slots for piece in pieces]), self._scratch)
        total = self._zeroed(len(slots), dim, first.values.dtype)
        start = 0
        for piece in pieces:
            end = start + len(piece.slots)
            cuda_ops.merge(total.reshape(-1), dim, inverse[start:end], piece.values)
            start = end
        return slots, total, scale

    def _zeroed(self, rows: int, dim: int, dtype: np.dtype) -> np.ndarray:
        kept = self._sums.get(dtype)
        if kept is None or kept.size < rows * dim:
            kept = self._sums[dtype] = np.empty(rows * dim + rows * dim // 4, dtype)
        total = kept[: rows * dim].reshape(rows, dim)
        total[...] = 0
        return total

    def _divided_by_frequency(self, pieces: list[Piece], dim: int) -> Piece:
        """Sum pieces of one lookup over ranks and divide each row by how often all ranks looked it up together."""
        slots, counts = self._counts(pieces)
        counts = np.maximum(counts, 1)  # rows that only came along with those looked up have no gradient to divide
        _, values, scale = self._sum([Piece(p.slots, p.values, p.scale, 0, None) for p in pieces], dim)
        return Piece(slots, values / counts[:, None].astype(values.dtype), scale, 0, None)


def kinds_of(pieces: list[Piece]) -> list[list[Piece]]:
    """Return the pieces without counts, if any, then those of each ordinal that have counts: what is summed alike."""
    kinds: dict[int, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(kind_of(piece), []).append(piece)
    return [kinds[kind] for kind in sorted(kinds)]


def kind_of(piece: Piece) -> int:
    """Return the ordinal of a piece that has counts, -1 for one that has none."""
    return -1 if piece.counts is None else piece.ordinal
