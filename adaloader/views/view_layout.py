"""Which rows and columns of a table a view of it reaches, told from sizes and strides alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch


@dataclass(frozen=True)
class Layout:
    """A strided view of a table `[num_rows, dim]`, in elements of the table.

    Args:
        shape, strides: of the view; those of a complex view end with the two parts of a number.
        offset: where its first element lies.
        dim: elements of a row.
        is_complex: whether it shows pairs of elements as complex numbers.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dim: int
    is_complex: bool

    @cached_property
    def row_dims(self) -> list[int]:
        """Dimensions that go from row to row; size 1 goes nowhere."""
        sized = enumerate(zip(self.shape, self.strides, strict=True))
        return [at for at, (size, stride) in sized if size > 1 and stride >= self.dim and stride % self.dim == 0]

    @cached_property
    def crosses_rows(self) -> bool:
        """Whether a dimension runs over the columns of one row into the next, as in `table.view(-1)`."""
        within = [at for at in range(len(self.shape)) if at not in self.row_dims]
        last = self.offset % self.dim + sum(max(self.shape[at] - 1, 0) * self.strides[at] for at in within)
        return last >= self.dim

    @property
    def num_rows(self) -> int:
        """Rows that the view reaches."""
        if self.crosses_rows:
            reach = sum(max(size - 1, 0) * stride for size, stride in zip(self.shape, self.strides, strict=True))
            return (self.offset + reach) // self.dim - self.offset // self.dim + 1
        return prod(self.shape[at] for at in self.row_dims)

    @property
    def is_whole_rows(self) -> bool:
        """Whether it is `[rows, dim]`: some rows as they are, evenly spaced."""
        return (
            len(self.shape) == 2
            and not self.is_complex
            and self.shape[1] == self.dim
            and (self.dim == 1 or self.strides[1] == 1)
            and self.strides[0] % self.dim == 0
            and self.offset % self.dim == 0
        )


def layout_of(form: torch.Tensor, dim: int) -> Layout:
    """Return the layout of `form`, a view (on the meta device) of a contiguous table with rows of `dim` elements."""
    shape, strides, offset = tuple(form.shape), form.stride(), form.storage_offset()
    if form.is_complex():
        shape, strides, offset = (*shape, 2), (*(2 * stride for stride in strides), 1), 2 * offset
    return Layout(shape, tuple(strides), offset, dim, form.is_complex())
