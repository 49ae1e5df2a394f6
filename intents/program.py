"""Replaying on a later batch what led to the ids of the recorded one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import as_tensor, contents, structure_of
from .explain import explain_recipe
from .operators import DRAW
from .recipe import Evidence, Recipe
from .sites import Site
from .source import Writer, compile_recipe, outputs_used


class ReplayError(RuntimeError):
    """A batch does not go through a program: another structure, or an operation that fails on it."""


class Program:
    """From a batch to the ids of its lookups.

    ``sites`` are all lookups of the recorded batch in order; ``derived`` those whose ids :meth:`replay` gives;
    ``among`` names, for others, the traced leaves that held their ids, by number. Invariant: a program never changes
    after its construction, except for the buffers that it takes by reference.
    """

    def __init__(self, recipe: Recipe, evidence: list[Evidence], sites: list[Site]) -> None:
        self.sites = sites
        self._recipe = recipe
        self._evidence = evidence
        self._explanation = explain_recipe(recipe, evidence)
        self._lookups = []
        self.derived: list[Site] = []
        for lookup, site in zip(recipe.lookups, evidence[-1].sites, strict=True):
            reason = self._explanation.reason(lookup, recipe)
            site.reason = f"the ids {reason}" if reason else None
            if reason is None:
                self._lookups.append(lookup)
                self.derived.append(site)
                site.program = self
                site.constant = self._is_constant(lookup)
        places = {path: place for place, path in enumerate(recipe.paths)}
        held = [site for site in sites if site.among is not None and places.keys() >= set(site.among)]
        self._held = [(site, [places[path] for path in site.among]) for site in held]
        self.among = [(site, leaves) for site, leaves in self._held if site.reason]
        self._run = compile_recipe(recipe, self._explanation, evidence[-1].constants, self._lookups)

    @property
    def structure(self) -> Hashable:
        """The structure of the batches that this program takes."""
        return self._recipe.structure

    def matches(self, structure: Hashable) -> bool:
        """Whether a batch of this :func:`~intents.batch.structure` may be replayed."""
        return structure == self._recipe.structure

    def replay(self, batch: Any) -> list[tuple[Site, np.ndarray]]:
        """The ids that each derived site will look up in ``batch``: int64, flat, contiguous, in the order of lookups.

        Changes nothing in ``batch``, draws no random numbers, sees no modes of the calling thread and may run
        on any thread. Sites that look up the same ids share one array; treat arrays as read-only. Raises
        ReplayError.
        """
        found = contents(batch).traced
        if structure_of(found) != self._recipe.structure:
            raise ReplayError(
                f"the batch has structure {structure_of(found)}, this program takes {self._recipe.structure}: "
                "record a step with a batch of this kind"
            )
        return self.replay_leaves([leaf for _, leaf in found])

    def replay_leaves(self, found: list[Any]) -> list[tuple[Site, np.ndarray]]:
        """As :meth:`replay`, for the traced contents of a batch that is known to have the right structure."""
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                arrays = self._run(found)
        except Exception as error:
            raise ReplayError(f"replaying the operations failed with {type(error).__name__}: {error}") from error
        return list(zip(self.derived, arrays, strict=True))

    def guess_leaves(self, found: list[Any], *, all_sites: bool = False) -> list[tuple[Site, np.ndarray]]:
        """For sites that are not derived, the integers of the leaves that held their ids: int64, flat.

        With ``all_sites`` for those too that are: what to do where the replay fails.
        """
        guesses = []
        for site, places in self._held if all_sites else self.among:
            parts = [as_tensor(found[place]).detach().cpu().numpy().reshape(-1).astype(np.int64) for place in places]
            guesses.append((site, np.concatenate([*parts, np.asarray(site.added, np.int64)])))
        return guesses

    def refine(self, other: Program) -> Program | None:
        """One program for the batches of both recordings, whose sizes differ; None where the operations differ.

        ``other`` is the newer: its sites and constants are kept. Integers that differ between the recordings
        follow sizes of the batch; those that are equal while the size that they followed is not are
        constants. A site for which nothing fits both is no longer derived, and says why.
        """
        if not self._recipe.same_operations(other._recipe):
            return None
        copies = {site: replace(site, program=None) for site in other.sites}
        newest = other._evidence[-1]
        newest = replace(newest, sites=[copies[site] for site in newest.sites])
        evidence = [*self._evidence, *other._evidence[:-1], newest]
        return Program(self._recipe.joined(other._recipe), evidence, list(copies.values()))

    def foretells(self, other: Program) -> bool:
        """Whether this program, as it is, gives what ``other`` was recorded from."""
        if not self._recipe.same_operations(other._recipe):
            return False
        seen = other._evidence[-1]
        for step, formulas in enumerate(self._explanation.formulas):
            for slot, formula in zip(self._recipe.steps[step].slots, formulas, strict=True):
                number = seen.observation.slots[step][slot.index]
                if formula is None or formula.evaluate(seen.observation.size) not in (number, -1):
                    return False
        mine = self._evidence[-1].constants
        return all(
            value in self._recipe.scratch or mine[value] is constant or _equal(mine[value], constant)
            for value, constant in seen.constants.items()
        )

    def describe(self, table: str | None = None) -> list[str]:
        """The program in readable lines: operations, then what each lookup gets of them, then what is not derived.

        With ``table``, only what concerns lookups of that one.
        """
        writer = Writer(self._recipe, self._explanation, self._readable_name, _readable_literal)
        shown = [(s, lookup) for s, lookup in zip(self.derived, self._lookups, strict=True) if table in (None, s.table)]
        lookups = [lookup for _, lookup in shown]
        steps = set().union(*(self._explanation.steps_of(each, self._recipe) for each in lookups))
        used = outputs_used(self._recipe, self._explanation, sorted(steps), lookups)
        lines = []
        for index in sorted(steps):
            made = [self._readable_name(value) for _, value in self._recipe.steps[index].outputs if value in used]
            lines.append(f"{', '.join(made) + ' = ' if made else ''}{writer.call(index)}")
        for site, lookup in shown:
            lines.append(f"{site.table} <- {self._readable_name(lookup.value)}  # {site.operation}, {site.where}")
        places = dict(self.among)
        for site in self.sites:
            if site.reason and table in (None, site.table):
                guess = f"? (some of {site.held_by})" if site in places else "?"
                lines.append(f"{site.table} <- {guess}  # {site.operation}, {site.where}: {site.reason}")
        return lines

    def _is_constant(self, lookup: Any) -> bool:
        for step in self._explanation.steps_of(lookup, self._recipe):
            if self._recipe.steps[step].operator.base == DRAW:
                return False
            inputs = self._recipe.steps[step].inputs
            named = [symbol.value for symbol in self._explanation.symbols(step)]
            if any(value < len(self._recipe.paths) for value in inputs + named):
                return False
        return lookup.value >= len(self._recipe.paths)

    def _readable_name(self, value: int) -> str:
        if value < len(self._recipe.paths):
            return f"batch{self._recipe.paths[value]}"
        constant = self._evidence[-1].constants.get(value)
        if constant is None:
            return f"v{value}"
        kind = str(constant.dtype).removeprefix("torch.")
        return f"constant{value}:{kind}{list(constant.shape)}"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _readable_literal(thing: Any) -> str:
    return str(thing) if isinstance(thing, (torch._ops.OpOverload, torch.dtype, torch.device)) else repr(thing)
