"""What a program is made of before its integers are explained: the same for every recording of the same code."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from .batch import sibling_groups
from .dims import Observation, Scope, Symbol
from .entries import Ref, Slot
from .operators import Operator
from .sites import Site


@dataclass(frozen=True)
class RecipeStep:
    """One operation; values are numbered over the recipe: leaves, then constants, then what steps make."""

    operator: Operator
    arguments: tuple[tuple[str, bool, Any], ...]
    outputs: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def inputs(self) -> list[int]:
        return [node.value for node in self._nodes() if isinstance(node, Ref)]

    @property
    def slots(self) -> list[Slot]:
        return [node for node in self._nodes() if isinstance(node, Slot)]

    def _nodes(self) -> list[Any]:
        found: list[Any] = []
        pending = [node for _, _, node in reversed(self.arguments)]
        while pending:
            node = pending.pop()
            if isinstance(node, tuple):
                pending.extend(reversed(node))
            else:
                found.append(node)
        return found


@dataclass(frozen=True)
class RecipeLookup:
    """A derivable lookup: ``value`` as it is after ``time`` steps, which needs ``steps``.

    ``copied`` where the memory of the ids belongs to the user or changes later.
    """

    table: str
    operation: str
    value: int
    time: int
    steps: frozenset[int]
    copied: bool


@dataclass
class Recipe:
    """The steps that lead from one batch to its lookups.

    ``private`` are leaves that a step overwrites, ``scratch`` constants of which a step overwrites every
    element before any is read. ``found`` gives, for each value whose size or number only the data decides,
    the steps that it needs; ``listed`` the same for values whose elements were used as integers.
    """

    structure: Hashable
    paths: list[str]
    steps: list[RecipeStep]
    lookups: list[RecipeLookup]
    private: set[int]
    scratch: set[int]
    found: dict[int, frozenset[int]]
    implied: set[int] = field(default_factory=set)
    listed: dict[int, frozenset[int]] = field(default_factory=dict)

    def same_operations(self, other: Recipe) -> bool:
        """Whether both came from the same code running the same way: all but integers and constants are equal.

        Which lists were used is told by their integers, so that one recording may show more of them, by chance.
        """
        return (
            self.structure == other.structure
            and self.steps == other.steps
            and self.lookups == other.lookups
            and self.private == other.private
            and self.scratch == other.scratch
            and self.found == other.found
            and self.implied == other.implied
        )

    def joined(self, other: Recipe) -> Recipe:
        """What both, of the same operations, may refer to."""
        return self if self.listed == other.listed else replace(self, listed=self.listed | other.listed)

    @cached_property
    def makers(self) -> dict[int, int]:
        """The step that makes each value."""
        return {value: index for index, step in enumerate(self.steps) for _, value in step.outputs}

    def scope(self, step: int, observation: Observation) -> Scope:
        """What the integers of ``step`` may refer to."""
        symbols = []
        for value in self.found:
            if self.makers[value] < step:
                dims = [None] if value in observation.numbers else range(len(observation.shapes[value]))
                symbols += [Symbol(value, dim) for dim in dims]
        own = self.steps[step].inputs
        from_batch = bool(own) and own[0] in self._from_batch
        read = [symbol for symbol in symbols if symbol.dim is None and symbol.value not in self.implied]
        leaves = list(range(len(self.paths)))
        lists = [value for value in leaves if value in observation.elements]
        lists += [value for value in self.listed if self.makers[value] < step and value in observation.elements]
        selected = self._selected(own[0], observation) if own else None
        return Scope(own, leaves, symbols, read, from_batch, lists, self.siblings, selected)

    def needed_by(self, value: int) -> Iterable[int]:
        """The steps behind a number, a size or a list that formulas may name."""
        return self.found.get(value) or self.listed.get(value, ())

    @cached_property
    def siblings(self) -> list[list[int]]:
        """The leaves of each list of tensors in the batch."""
        groups = sibling_groups(self.paths)
        return [group for group in groups if len({self.structure[leaf][1:] for leaf in group}) == 1]

    def _selected(self, value: int, observation: Observation) -> int | None:
        """Of which place a value was selected, as in ``padded[i]``."""
        maker = self.makers.get(value)
        if maker is None or self.steps[maker].operator.base != "select":
            return None
        return observation.slots[maker][self.steps[maker].slots[-1].index]

    @cached_property
    def _from_batch(self) -> set[int]:
        known = set(range(len(self.paths)))
        for step in self.steps:
            if known.intersection(step.inputs):
                known.update(value for _, value in step.outputs)
        return known


@dataclass
class Evidence:
    """What one recording adds to a recipe: sizes and integers, constants by reference, and the sites in order."""

    observation: Observation
    constants: dict[int, Tensor]
    sites: list[Site]
    wheres: list[str]
