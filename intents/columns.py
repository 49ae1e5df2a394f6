"""Columns of one matrix of a batch, each looked up by itself (`table(ids[:, field])`): taken out together in a replay.

A replay of some dozens of selections spends more on their calls, at each of which another thread may take over the
interpreter, than on the ids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .entries import Ref, Slot
from .explain import Explanation
from .recipe import Recipe, RecipeLookup

# So many columns are taken together.
_FEWEST = 4


def columns_of(
    recipe: Recipe, explanation: Explanation, steps: list[int], lookups: list[RecipeLookup]
) -> dict[int, list[tuple[int, int]]]:
    """Return, by leaf, the (value, column) of the lookups that can be taken out of it together.

    Their values are columns, at places that do not depend on the batch, of a matrix of integers on the host. Nothing of
    that kind is returned of a program that writes to anything, for then it would matter when each is taken.
    """
    if any(argument.written for step in steps for argument in recipe.steps[step].operator.arguments):
        return {}
    found: dict[int, list[tuple[int, int]]] = {}
    for value in dict.fromkeys(lookup.value for lookup in lookups):
        column = _column(recipe, explanation, value)
        if column is not None:
            leaf, place = column
            found.setdefault(leaf, []).append((value, place))
    return {leaf: columns for leaf, columns in found.items() if len(columns) >= _FEWEST}


def _column(recipe: Recipe, explanation: Explanation, value: int) -> tuple[int, int] | None:
    """Return the leaf and the column in it that `value` is; None if it is none."""
    maker = recipe.makers.get(value)
    if maker is None or recipe.steps[maker].operator.func is not torch.ops.aten.select.int:
        return None
    (_, _, source), (_, _, dim), (_, _, index) = recipe.steps[maker].arguments
    if not isinstance(source, Ref) or source.value >= len(recipe.paths) or source.value in recipe.private:
        return None
    _, dtype, dimensions, device = recipe.structure[source.value]
    if dtype not in (torch.int64, torch.int32) or dimensions != 2 or device != "cpu" or dim not in (1, -1):
        return None
    if not isinstance(index, Slot):
        return source.value, index
    formula = explanation.formulas[maker][index.index]
    return None if formula is None or formula.symbols else (source.value, formula.addend // formula.divisor)


def columns(matrix: Tensor, places: list[int]) -> np.ndarray:
    """Return columns of `matrix` `[n, k]`, one after the other, as a copy: int64 `[len(places), n]`.

    Raises:
        IndexError: if there is no such column.
    """
    array = matrix.numpy().T
    if places == list(range(len(array))):
        return np.array(array, dtype=np.int64, order="C")
    return np.array(array[places], dtype=np.int64, order="C")
