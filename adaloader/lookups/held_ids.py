"""Whether ids are those of a batch as it was handed out: tells batches apart of which no lookup is foreseen."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch

from intents.batch import contents

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class HeldIds:
    """The whole numbers in a batch, for as long as the loop holds them: it does if it is going to use them again.

    Args:
        data: the batch, as the loader hands it out.
    """

    def __init__(self, data: Any):
        self._leaves = [weakref.ref(leaf) for _, leaf in contents(data).traced if _may_be_ids(leaf)]

    def have(self, ids: np.ndarray) -> bool:
        """Return whether `ids` (int64 `[n]`) are all numbers of an array of the batch, or one column of it."""
        return any(_has(leaf, ids) for ref in self._leaves if (leaf := ref()) is not None)


def _may_be_ids(leaf: Any) -> bool:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype in _INTEGERS and leaf.layout is torch.strided
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu"


def _has(leaf: torch.Tensor | np.ndarray, ids: np.ndarray) -> bool:
    columns = leaf.ndim == 2 and len(leaf) == len(ids)
    if not columns and math.prod(leaf.shape) != len(ids):
        return False
    values = leaf.numpy(force=True) if isinstance(leaf, torch.Tensor) else leaf
    return bool((values.T == ids).all(axis=-1).any() if columns else np.array_equal(values.reshape(-1), ids))
