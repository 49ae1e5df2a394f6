"""Choosing, for a recipe and all recordings of it, what each integer follows, and what then cannot be derived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dims import Formula, Symbol, explain
from .recipe import Evidence, Recipe, RecipeLookup


@dataclass
class Explanation:
    """Formulas per step, in the order of its slots; and what the recordings contradict each other about, with why."""

    formulas: list[list[Formula | None]]
    broken_steps: dict[int, str]
    broken_constants: dict[int, str]

    def steps_of(self, lookup: RecipeLookup, recipe: Recipe) -> set[int]:
        """The steps that ``lookup`` needs: for its ids, and for the sizes that their formulas name."""
        needed: set[int] = set()
        pending = list(lookup.steps)
        while pending:
            step = pending.pop()
            if step not in needed:
                needed.add(step)
                for symbol in self.symbols(step):
                    pending.extend(recipe.needed_by(symbol.value))
        return needed

    def symbols(self, step: int) -> set[Symbol]:
        """The sizes that the integers of ``step`` follow."""
        return {symbol for formula in self.formulas[step] if formula is not None for symbol in formula.symbols}

    def reason(self, lookup: RecipeLookup, recipe: Recipe) -> str | None:
        """Why the recordings contradict each other about ``lookup``, or None."""
        steps = sorted(self.steps_of(lookup, recipe))
        broken = [self.broken_steps[step] for step in steps if step in self.broken_steps]
        read = {value for step in steps for value in recipe.steps[step].inputs} | {lookup.value}
        broken += [self.broken_constants[value] for value in sorted(read) if value in self.broken_constants]
        return broken[0] if broken else None


def explain_recipe(recipe: Recipe, evidence: list[Evidence]) -> Explanation:
    """Explain every integer of ``recipe`` by all of ``evidence``, the newest last."""
    observations = [each.observation for each in evidence]
    formulas = []
    broken_steps = {}
    for index, step in enumerate(recipe.steps):
        slots = step.slots
        chosen = explain(slots, index, recipe.scope(index, observations[0]), observations) if slots else []
        formulas.append(chosen)
        for slot, formula in zip(slots, chosen, strict=True):
            if formula is None:
                seen = " then ".join(str(each.slots[index][slot.index]) for each in observations)
                place = f"{step.operator.name} ({evidence[-1].wheres[index]})"
                broken_steps[index] = f"depend on a size that follows none of the batch: {seen} in {place}"
    broken_constants = {
        value: "use a tensor made anew for each step, not from the batch (made by numpy or Python?)"
        for value in evidence[-1].constants
        if value not in recipe.scratch and not _same([each.constants[value] for each in evidence])
    }
    return Explanation(formulas, broken_steps, broken_constants)


def _same(constants: list[Tensor]) -> bool:
    last = constants[-1]
    return all(each is last or (each.shape == last.shape and torch.equal(each, last)) for each in constants)
