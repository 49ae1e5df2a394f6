"""A recipe as Python source: one line per operation, to run and to read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import as_tensor
from .columns import columns, columns_of
from .dims import Formula, Symbol
from .entries import Ref, Slot
from .explain import Explanation
from .operators import Operator
from .recipe import Recipe, RecipeLookup, RecipeStep

# On the host there is nothing to pin and nothing to wait for.
_DROPPED = {"pin_memory", "non_blocking"}
_HOST = torch.device("cpu")


class Writer:
    """Writes the lines of a recipe. What an argument is called is decided by ``name`` (values) and ``spell``
    (literals)."""

    def __init__(
        self,
        recipe: Recipe,
        explanation: Explanation,
        name: Callable[[int], str],
        spell: Callable[[Any], str],
    ) -> None:
        self._recipe = recipe
        self._explanation = explanation
        self._name = name
        self._spell = spell

    def call(self, index: int) -> str:
        """The call of one step, as an expression."""
        step = self._recipe.steps[index]
        formulas = self._explanation.formulas[index]
        parts = []
        for name, keyword_only, node in _replayed_arguments(step):
            text = self._tree(node, formulas)
            parts.append(f"{name}={text}" if keyword_only else text)
        return f"{self._spell(_replayed_operator(step.operator))}({', '.join(parts)})"

    def _tree(self, node: Any, formulas: list[Formula | None]) -> str:
        if isinstance(node, Ref):
            return self._name(node.value)
        if isinstance(node, Slot):
            return formulas[node.index].source(self._symbol)
        if isinstance(node, tuple):
            return f"[{', '.join(self._tree(child, formulas) for child in node)}]"
        return self._spell(node)

    def _symbol(self, symbol: Symbol) -> str:
        name = self._name(symbol.value)
        if symbol.element is not None:
            return f"int({name}[{symbol.element}])"
        return name if symbol.dim is None else f"{name}.shape[{symbol.dim}]"


def outputs_used(recipe: Recipe, explanation: Explanation, steps: list[int], lookups: list[RecipeLookup]) -> set[int]:
    """The values that anything later refers to."""
    return used_by_steps(recipe, explanation, steps) | {lookup.value for lookup in lookups}


def used_by_steps(recipe: Recipe, explanation: Explanation, steps: list[int]) -> set[int]:
    """The values that steps refer to."""
    used: set[int] = set()
    for step in steps:
        used.update(recipe.steps[step].inputs)
        used.update(symbol.value for symbol in explanation.symbols(step))
    return used


def compile_recipe(
    recipe: Recipe,
    explanation: Explanation,
    constants: dict[int, Tensor],
    lookups: list[RecipeLookup],
) -> Callable[[list[Tensor]], list[np.ndarray]]:
    """A function from the leaves of a batch to the ids of ``lookups``, int64 and flat, in their order."""
    names = _Names(recipe)
    writer = Writer(recipe, explanation, names.value, names.bind)
    steps = sorted(set().union(*(explanation.steps_of(lookup, recipe) for lookup in lookups)))
    used = outputs_used(recipe, explanation, steps, lookups)
    lines = list(_prologue(recipe, constants, used, names))
    together = columns_of(recipe, explanation, steps, lookups)
    places: dict[int, str] = {}
    for leaf, found in together.items():
        taken = f"columns{leaf}"
        lines.append(f"{taken} = {names.bind(columns)}({names.value(leaf)}, {[place for _, place in found]})")
        places |= {value: f"{taken}[{row}]" for row, (value, _) in enumerate(found)}
    left_out = {recipe.makers[value] for value in places.keys() - used_by_steps(recipe, explanation, steps)}
    results: dict[tuple[int, int], str] = {}
    captured: list[str] = []
    waiting = list(enumerate(lookups))
    for step in [*steps, len(recipe.steps)]:
        while waiting and waiting[0][1].time <= step:
            lookup = waiting.pop(0)[1]
            key = (lookup.value, bisect_left(steps, lookup.time))
            if key not in results:
                results[key] = f"r{len(results)}"
                flatten = names.bind(_copied_ids if lookup.copied else _ids)
                ids = places.get(lookup.value) or f"{flatten}({names.value(lookup.value)})"
                lines.append(f"{results[key]} = {ids}")
            captured.append(results[key])
        if step < len(recipe.steps) and step not in left_out:
            lines.extend(_assignments(recipe.steps[step], writer.call(step), used, names))
    body = "\n    ".join([*lines, f"return [{', '.join(captured)}]"])
    exec(compile(f"def replay(leaves):\n    {body}\n", "<program of intents>", "exec"), names.bound)
    return names.bound["replay"]


def _prologue(recipe: Recipe, constants: dict[int, Tensor], used: set[int], names: _Names) -> Iterator[str]:
    device_types = [leaf[3] for leaf in recipe.structure]
    is_tensor = [isinstance(leaf[1], torch.dtype) for leaf in recipe.structure]
    private = [leaf for leaf in sorted(recipe.private) if leaf in used]
    for leaf in sorted(used):
        if leaf < len(recipe.paths):
            to_host = ".cpu()" if device_types[leaf] != "cpu" else ""
            given = f"leaves[{leaf}]" if is_tensor[leaf] else f"{names.bind(as_tensor)}(leaves[{leaf}])"
            yield f"{names.value(leaf)} = {given}{to_host}"
    if private:
        targets = ", ".join(map(names.value, private))
        yield f"{targets}, = {names.bind(private_copies)}({targets})"
    for value in sorted(used.intersection(constants)):
        constant = constants[value]
        if value in recipe.scratch:
            fresh = f"{names.bind(torch.empty_like)}({names.bind(constant)}, device='cpu')"
            yield f"{names.value(value)} = {fresh}"
        elif constant.device.type != "cpu":
            yield f"{names.value(value)} = {names.bind(HostCopy(constant))}()"
        else:
            yield f"{names.value(value)} = {names.bind(constant)}"


def _assignments(step: RecipeStep, call: str, used: set[int], names: _Names) -> Iterator[str]:
    wanted = [(place, value) for place, value in step.outputs if value in used]
    if [place for place, _ in wanted] == [()]:
        yield f"{names.value(wanted[0][1])} = {call}"
        return
    yield f"made = {call}" if wanted else call
    for place, value in wanted:
        yield f"{names.value(value)} = made{''.join(f'[{position}]' for position in place)}"


class _Names:
    """Names in generated source. Everything but plain literals is bound in ``bound``, the globals of the source."""

    def __init__(self, recipe: Recipe) -> None:
        self.bound: dict[str, Any] = {}
        self._leaf_count = len(recipe.paths)

    def value(self, value: int) -> str:
        return f"leaf{value}" if value < self._leaf_count else f"v{value}"

    def bind(self, thing: Any) -> str:
        if thing is None or isinstance(thing, (bool, int, str)):
            return repr(thing)
        name = f"b{len(self.bound)}"
        self.bound[name] = thing
        return name


class HostCopy:
    """A constant that lies on a device, copied to the host again only when it was changed in place."""

    def __init__(self, constant: Tensor) -> None:
        self._constant = constant
        self._version: int | None = None
        self._copy = constant

    def __call__(self) -> Tensor:
        version = None if self._constant.is_inference() else self._constant._version
        if version is None or version != self._version:
            self._version = version
            self._copy = self._constant.detach().cpu()
        return self._copy


def private_copies(*leaves: Tensor) -> list[Tensor]:
    """Copies of strided ``leaves`` that share memory among themselves as the originals do, and with nothing else."""
    groups: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        groups.setdefault(leaf.untyped_storage()._cdata, []).append(position)
    copies: list[Tensor] = list(leaves)
    for positions in groups.values():
        spans = [_reach(leaves[position]) for position in positions]
        low = min(span[0] for span in spans) // 16 * 16  # no element is wider: offsets stay whole numbers
        high = max(span[1] for span in spans)
        storage = leaves[positions[0]].untyped_storage()
        reached = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (max(high - low, 0),))
        copied = reached.clone().untyped_storage()
        for position in positions:
            leaf = leaves[position]
            offset = leaf.storage_offset() - low // leaf.itemsize if leaf.numel() else 0
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            copies[position] = empty.set_(copied, offset, leaf.shape, leaf.stride())
    return copies


def _reach(leaf: Tensor) -> tuple[int, int]:
    if leaf.numel() == 0:
        return (0, 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    low = leaf.storage_offset() * leaf.itemsize
    return (low, low + extent * leaf.itemsize)


def _replayed_operator(operator: Operator) -> Any:
    if operator.is_view:
        # The batch of a replay may be laid out otherwise than the recorded one: reshape copies where view
        # would refuse.
        return torch.ops.aten.reshape.default
    if operator.base in ("_pin_memory", "pin_memory"):
        return torch.ops.aten.clone.default
    return operator.func


def _replayed_arguments(step: RecipeStep) -> Iterator[tuple[str, bool, Any]]:
    arguments = step.arguments
    if step.operator.is_view:
        arguments = arguments[:2]  # the input and its sizes; strides follow from them
    if step.operator.base in ("_pin_memory", "pin_memory"):
        arguments = arguments[:1]
    for name, keyword_only, node in arguments:
        if name in _DROPPED and keyword_only:
            continue
        yield name, keyword_only, _HOST if isinstance(node, torch.device) else node


def _ids(ids: Tensor) -> np.ndarray:
    return np.ascontiguousarray(ids.numpy().reshape(-1), dtype=np.int64)


def _copied_ids(ids: Tensor) -> np.ndarray:
    return np.array(ids.numpy(), dtype=np.int64, order="C").reshape(-1)
