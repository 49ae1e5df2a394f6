"""What stands on a tape: the values of a recorded step, the operations that made them, and its lookups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .operators import Operator
from .sites import Site


class Span(NamedTuple):
    """The bytes of a storage that a tensor reaches: ``[low, high)``."""

    storage: int
    low: int
    high: int

    def overlaps(self, other: Span) -> bool:
        return self.storage == other.storage and self.low < other.high and other.low < self.high


@dataclass(frozen=True)
class Ref:
    """In the recorded arguments of a step: the value with this index."""

    value: int


@dataclass(frozen=True)
class Slot:
    """In the recorded arguments of a step: an integer that may follow the batch; ``index`` into the step's numbers.

    ``position`` is the dimension that the integer is about, or its place in a list of sizes.
    """

    index: int
    role: str
    position: int


@dataclass(frozen=True)
class DrawnAfter:
    """In the recorded arguments of a draw: the batch that was handed out last, and None if there was none."""

    batch: int | None


@dataclass(eq=False)
class Value:
    """A tensor, or (``kind`` "number") a Python number read from one. ``shape`` is as recorded: nothing on
    the tape changes it. ``implied`` where nobody was seen to read the number: it may have been, in Python;
    ``elements`` of a short list of whole numbers, which Python reads unseen."""

    index: int
    kind: str  # "leaf", "constant", "result" or "number"
    tensor: Tensor | None = None
    shape: tuple[int, ...] = ()
    span: Span | None = None
    step: int | None = None
    number: int | None = None
    batch: int | None = None
    path: str = ""
    from_python: bool = False
    implied: bool = False
    elements: tuple[int, ...] | None = None


@dataclass(eq=False)
class Step:
    """One operation: arguments as (name, keyword only, tree of Ref, Slot and literals), and what it made and wrote."""

    operator: Operator
    arguments: tuple[tuple[str, bool, Any], ...]
    numbers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], int], ...]
    writes: tuple[Span, ...]
    where: str
    taint: str | None = None


@dataclass(eq=False)
class Lookup:
    """A lookup as it happened: ``time`` counts the steps before it, ``latest_batch`` was the last to be added."""

    site: Site
    value: int | None
    time: int
    taint: str | None
    latest_batch: int | None
    ids: np.ndarray


def span(tensor: Tensor) -> Span | None:
    """The bytes that ``tensor`` reaches, or None if it has no plain storage."""
    if tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        return None
    low = tensor.storage_offset() * tensor.itemsize
    if tensor.numel() == 0:
        return Span(storage, low, low)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(storage, low, low + reach * tensor.itemsize)
