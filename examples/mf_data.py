"""Sparse matrices for the factorisation example: one with planted factors that it makes itself, or one from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draws import Weighted, zipf_weights
from torch.utils.data import Dataset

TEST_SHARE = 0.1


@dataclass(frozen=True)
class Entries(Dataset):
    """Entries of a matrix `shape` = (rows, columns): `row`, `column` int64 [n], `value` float64 [n]."""

    shape: tuple[int, int]
    row: torch.Tensor
    column: torch.Tensor
    value: torch.Tensor

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a whole batch; `runs.as_is` is the collate function that goes with it."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return {"row": self.row[chosen], "column": self.column[chosen], "value": self.value[chosen]}

    def to(self, dtype: torch.dtype) -> Entries:
        """The same entries with values of another floating type."""
        return Entries(self.shape, self.row, self.column, self.value.to(dtype))


def make_synthetic(
    rows: int, columns: int, entries: int, seed: int, *, exponent: float = 1.1, rank: int = 4, noise: float = 0.1
) -> Entries:
    """Make a matrix of low rank, of which `entries` distinct entries or fewer are known.

    As in the AdaPM paper's experiment (arXiv 2206.00470), rows and columns of entries are drawn independently by
    Zipf's law; entries drawn twice count once. Values are dot products of planted factors `[rank]`, scaled to variance
    1, plus noise of standard deviation `noise`, which is the RMSE that no model can beat.
    """
    for name, number in (("rows", rows), ("columns", columns), ("entries", entries)):
        if number < 1:
            raise ValueError(f"a matrix needs at least 1 of its {name}; got {number}")
    rng = np.random.default_rng(seed)
    ends = []
    for count in (rows, columns):
        popularity = Weighted(zipf_weights(count, exponent)).draw(rng.random(entries))
        ends.append(rng.permutation(count)[popularity])  # popular rows are not neighbours in the table
    row, column = np.divmod(np.unique(ends[0] * columns + ends[1]), columns)
    row_factors, column_factors = rng.normal(size=(rows, rank)), rng.normal(size=(columns, rank))
    value = (row_factors[row] * column_factors[column]).sum(1) / rank**0.5
    return _entries((rows, columns), row, column, value + noise * rng.normal(size=len(value)))


def load_matrix(path: str | Path) -> Entries:
    """Read a matrix from an `.npz`: `row`, `column` (integers [n], from 0 up) and `value` (numbers [n]).

    Raises FileNotFoundError, KeyError or ValueError, naming the file.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = {"row", "column", "value"} - set(file.files)
        if missing:
            raise KeyError(f"{path} has no array {sorted(missing)}; it has {sorted(file.files)}")
        row, column, value = (file[name] for name in ("row", "column", "value"))
    shapes = [array.shape for array in (row, column, value)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or not len(value):
        raise ValueError(f"{path}: row, column and value have shapes {shapes}; expected [n] thrice, n at least 1")
    for name, ids in (("row", row), ("column", column)):
        if ids.dtype.kind not in "iu" or ids.min() < 0:
            raise ValueError(f"{path}: {name} has {ids.dtype} from {ids.min()}; expected integers from 0 up")
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: value has entries that are not finite")
    return _entries((int(row.max()) + 1, int(column.max()) + 1), row, column, value)


def split(entries: Entries, seed: int) -> tuple[Entries, Entries]:
    """Return (train, held out): a tenth, chosen by `seed`, is held out."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(entries)))
    held_out = int(len(entries) * TEST_SHARE)

    def part(chosen: torch.Tensor) -> Entries:
        return Entries(entries.shape, entries.row[chosen], entries.column[chosen], entries.value[chosen])

    return part(order[held_out:].sort().values), part(order[:held_out].sort().values)


def _entries(shape: tuple[int, int], row: np.ndarray, column: np.ndarray, value: np.ndarray) -> Entries:
    return Entries(
        shape,
        torch.from_numpy(row.astype(np.int64)),
        torch.from_numpy(column.astype(np.int64)),
        torch.from_numpy(value.astype(np.float64)),
    )
