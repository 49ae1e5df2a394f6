"""What one batch needs of one table: its rows, and which of them each expected lookup takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
import pm
from adaloader.lookups.slabs import Slab
from cuda_ops import same_ids

if TYPE_CHECKING:
    from adaloader.lookups.blocks import Block


@dataclass(slots=True)
class BatchRows:
    """The rows of one table that one batch needs.

    Args:
        rows: distinct row ids, int64 `[U]`.
        sites: per expected lookup, its ids (int64 `[n]`) and their positions in `rows` (int64 `[n]`).
        plan: the intent for them.
        slab: made at the first lookup, and anew when rows have changed since (`slab_version`).
        used: places in `sites` of the lookups that have happened.
        block: of the batch, if these rows are looked up with those of other tables: they are its rows from `first_row`
            on, which positions in `sites` count from its first, and their lookups its from `first_site` on.
    """

    rows: np.ndarray
    sites: list[tuple[np.ndarray, np.ndarray]]
    plan: pm.RowPlan
    slab: Slab | None = None
    slab_version: tuple[int, int] | None = None
    next_site: int = 0
    index: cuda_ops.KeyIndex | None = None
    used: set[int] = field(default_factory=set)
    block: Block | None = None
    first_site: int = 0
    first_row: int = 0
    _ids_foreseen: int = -1

    @property
    def ids_foreseen(self) -> int:
        """How many ids all expected lookups have together."""
        if self._ids_foreseen < 0:
            self._ids_foreseen = sum(len(ids) for ids, _ in self.sites)
        return self._ids_foreseen

    def place_of(self, ids: np.ndarray) -> int | None:
        """Return the place in `sites` of a lookup that was expected and has these ids (int64 `[n]`); else None."""
        sites, first = self.sites, self.next_site
        for at in chain(range(first, len(sites)), range(first)):  # most often the first of them
            if same_ids(sites[at][0], ids):
                self.next_site = at + 1
                self.used.add(at)
                return at
        return None

    def positions_of(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the positions in `rows` (int64 `[n]`) of ids of a lookup that was expected; None if none was."""
        place = self.place_of(ids)
        if place is None:
            return None
        positions = self.sites[place][1]
        return positions - self.first_row if self.first_row else positions

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions (int64 `[n]`) of distinct `rows` (int64 `[n]`), -1 where the batch did not intend
        them."""
        if self.index is None:
            self.index = cuda_ops.KeyIndex()
            self.index.add(self.rows, np.arange(len(self.rows), dtype=np.int64))
        return self.index.find(rows)
