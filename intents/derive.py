"""From the tape of a step to one program per batch: walk back from every lookup to what its ids were made of."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .among import find_leaves, repeated_by_python
from .batch import structure_of
from .dims import Observation
from .entries import DrawnAfter, Lookup, Ref, Span, Step
from .program import Program
from .recipe import Evidence, Recipe, RecipeLookup, RecipeStep
from .tape import Tape

_FOUND_LIMIT = 96  # Python numbers and data-dependent sizes that a program may refer to
_LISTED_LIMIT = 16  # lists of whole numbers, the same
_COMMON = 2  # numbers up to this turn up everywhere
_OVERWRITES = {"copy_", "zero_", "fill_"}

FROM_ELSEWHERE = "have no tensor of the batch leading to them (made by numpy, Python or compiled code?)"


class Underivable(Exception):
    """Says in words that follow "the ids" why a value cannot be derived."""


@dataclass
class Closure:
    """All that a value at a time was made of: steps and values of the tape."""

    steps: set[int]
    values: set[int]


def derive(tape: Tape) -> dict[int, Program]:
    """One program for each batch of the tape. Sets batch, reason and program of the tape's sites."""
    closures: dict[Lookup, Closure] = {}
    for lookup in tape.lookups:
        try:
            closures[lookup] = _closure_of_lookup(tape, lookup)
            lookup.site.batch_number = _batch_of(tape, closures[lookup])
        except Underivable as reason:
            lookup.site.reason = f"the ids {reason}"
    _adopt(tape)
    for lookup, closure in closures.items():
        if not lookup.site.reason and _made_elsewhere(tape, lookup, closure):
            lookup.site.reason = f"the ids {FROM_ELSEWHERE}"
    by_python = [lookup for lookup, closure in closures.items() if not lookup.site.reason and _is_python(tape, closure)]
    for lookup in repeated_by_python(tape, [lookup for lookup in by_python if _is_constant(tape, closures[lookup])]):
        lookup.site.reason = f"the ids {FROM_ELSEWHERE}"
    find_leaves(tape, tape.lookups)
    return {number: _derive_batch(tape, number, closures) for number in tape.batches}


def _is_python(tape: Tape, closure: Closure) -> bool:
    return any(tape.values[value].from_python for value in closure.values)


def _is_constant(tape: Tape, closure: Closure) -> bool:
    return not any(tape.values[value].kind == "leaf" for value in closure.values)


def _closure_of_lookup(tape: Tape, lookup: Lookup) -> Closure:
    if lookup.taint is not None:
        raise Underivable(lookup.taint)
    closure = _closure(tape, lookup.value, lookup.time)
    _scratch(tape, closure, [])
    return closure


def _closure(tape: Tape, value: int, time: int) -> Closure:
    """The steps before ``time`` that made ``value`` or overwrote memory that it is made of, and all they read."""
    closure = Closure(set(), set())
    latest: dict[int, int] = {}
    pending = [(value, time)]
    while pending:
        index, before = pending.pop()
        if latest.get(index, -1) >= before:
            continue
        latest[index] = before
        closure.values.add(index)
        for step in _steps_behind(tape, index, before):
            if step not in closure.steps:
                closure.steps.add(step)
                if tape.steps[step].taint is not None:
                    raise Underivable(tape.steps[step].taint)
                pending.extend((read, step) for read in tape.steps[step].inputs)
    return closure


def _steps_behind(tape: Tape, index: int, before: int) -> Iterable[int]:
    value = tape.values[index]
    if value.step is not None:
        yield value.step
    if value.span is not None:
        yield from tape.writers(value.span, before)


def _batch_of(tape: Tape, closure: Closure) -> int | None:
    numbers = {tape.values[value].batch for value in closure.values if tape.values[value].kind == "leaf"}
    if len(numbers) > 1:
        raise Underivable(f"mix tensors of the batches {sorted(numbers)}")
    return next(iter(numbers), None)


def _adopt(tape: Tape) -> None:
    """Give ids that come from no batch to the batch of a lookup nearby.

    Of the lookups before and after it, one with no new batch handed out in between is preferred, then the nearer
    one, then the later one.
    """
    owned = [at for at, lookup in enumerate(tape.lookups) if lookup.site.batch_number is not None]
    numbers = [tape.lookups[at].site.batch_number for at in owned]
    for at, lookup in enumerate(tape.lookups):
        if lookup.site.batch_number is not None:
            continue
        after = bisect_left(owned, at)
        near = [
            (tape.lookups[owned[side]].latest_batch != lookup.latest_batch, abs(owned[side] - at), -side, side)
            for side in (after - 1, after)
            if 0 <= side < len(owned)
        ]
        lookup.site.batch_number = numbers[min(near)[-1]] if near else lookup.latest_batch


def _made_elsewhere(tape: Tape, lookup: Lookup, closure: Closure) -> bool:
    """Whether ids without a batch, which might be constants, look made for it: their number follows its size."""
    values = [tape.values[value] for value in closure.values]
    if any(value.kind == "leaf" for value in values):
        return False
    lengths = {
        tape.values[leaf].shape[0] for leaf in tape.batches.get(lookup.site.batch_number, ()) if tape.values[leaf].shape
    }
    lengths.discard(0)
    lengths.discard(1)
    for value in values:
        if value.kind == "constant" and value.from_python:
            count = value.tensor.numel()
            if any(count and count % length == 0 for length in lengths):
                return True
    ids = tape.values[lookup.value]
    return ids.kind == "constant" and ids.shape[:1] != () and ids.shape[0] in lengths


def _scratch(tape: Tape, closure: Closure, lookups: list[Lookup]) -> set[int]:
    """Constants that ``closure`` overwrites whole before it, or one of ``lookups``, reads them.

    Raises Underivable where one is changed otherwise: its content at a later lookup is not known ahead.
    """
    steps = sorted(closure.steps)
    scratch = set()
    for index in closure.values:
        constant = tape.values[index]
        if constant.kind != "constant" or constant.span is None:
            continue
        writes = [step for step in steps if any(w.overlaps(constant.span) for w in tape.steps[step].writes)]
        if not writes:
            continue
        first = tape.steps[writes[0]]
        read_before = any(_touches(tape, tape.steps[step].inputs, constant.span) for step in steps if step < writes[0])
        read_before |= any(
            lookup.time <= writes[0] and _touches(tape, [lookup.value], constant.span) for lookup in lookups
        )
        if read_before or not _overwrites(tape, first, constant.span):
            culprit = f"{first.operator.name} ({first.where})"
            raise Underivable(f"use a tensor that outlives the step and is changed in place by {culprit}")
        scratch.add(index)
    return scratch


def _touches(tape: Tape, values: Iterable[int], reached: Span) -> bool:
    return any(tape.values[value].span is not None and tape.values[value].span.overlaps(reached) for value in values)


def _overwrites(tape: Tape, step: Step, whole: Span) -> bool:
    """Whether ``step`` sets every element of ``whole`` without reading it."""
    if step.operator.base in _OVERWRITES:
        target, *sources = step.inputs
    elif any(argument.written and argument.name == "out" for argument in step.operator.arguments):
        *sources, target = step.inputs
    else:
        return False
    value = tape.values[target]
    is_dense = value.tensor.numel() * value.tensor.itemsize == whole.high - whole.low
    return value.span == whole and is_dense and not _touches(tape, sources, whole)


def _derive_batch(tape: Tape, number: int, closures: dict[Lookup, Closure]) -> Program:
    mine = [lookup for lookup in tape.lookups if lookup.site.batch_number == number]
    derivable = [lookup for lookup in mine if lookup.site.reason is None]
    while True:
        union = Closure(set(), set())
        for lookup in derivable:
            union.steps |= closures[lookup].steps
            union.values |= closures[lookup].values
        try:
            scratch = _scratch(tape, union, derivable)
            break
        except Underivable as reason:
            # Right for each lookup alone, but not together: leave out those that write.
            writers = [lookup for lookup in derivable if _writes_constants(tape, closures[lookup])]
            for lookup in writers:
                lookup.site.reason = f"the ids {reason}"
            derivable = [lookup for lookup in derivable if lookup not in writers]
    found = _found(tape, number, derivable)
    listed = _listed(tape, number, union)
    builder = _RecipeBuilder(tape, number, union, scratch, found, listed)
    recipe, evidence = builder.build(derivable, closures)
    return Program(recipe, [evidence], [lookup.site for lookup in mine])


def _writes_constants(tape: Tape, closure: Closure) -> bool:
    constants = [tape.values[v].span for v in closure.values if tape.values[v].kind == "constant"]
    writes = [written for step in closure.steps for written in tape.steps[step].writes]
    return any(c is not None and c.overlaps(written) for c in constants for written in writes)


def _found(tape: Tape, number: int, lookups: list[Lookup]) -> dict[int, Closure]:
    """Python numbers and data-dependent sizes before the last lookup that derive from this batch alone."""
    last = max((lookup.time for lookup in lookups), default=0)
    found: dict[int, Closure] = {}
    for value in tape.values:
        is_dynamic = value.kind == "result" and tape.steps[value.step].operator.dynamic
        if not (is_dynamic or value.kind == "number") or value.step >= last or len(found) == _FOUND_LIMIT:
            continue
        try:
            closure = _closure(tape, value.index, value.step + 1)
            if _batch_of(tape, closure) == number and not _writes_constants(tape, closure):
                found[value.index] = closure
        except Underivable:
            continue  # a size that cannot be known ahead explains nothing
    return found


def _listed(tape: Tape, number: int, union: Closure) -> dict[int, Closure]:
    """Lists of whole numbers that derive from this batch, and whose elements are integers of steps in ``union``.

    All of the elements, as in ``x.split(sizes.tolist())``, or several of them, as bounds of slices.
    """
    listed: dict[int, Closure] = {}
    looked_up = {tape.values[lookup.value].span for lookup in tape.lookups if lookup.value is not None}
    storages = {span.storage for span in looked_up if span is not None}
    last_list = {tape.steps[step].numbers: step for step in sorted(union.steps)}
    last_number = {part: step for numbers, step in last_list.items() for part in numbers if part > _COMMON}
    for value in tape.values:
        if value.kind != "result" or not value.elements or value.span is None or value.span.storage in storages:
            continue
        is_one = last_list.get(value.elements, -1) > value.step
        known = sum(last_number.get(element, -1) > value.step for element in set(value.elements))
        if len(listed) == _LISTED_LIMIT or not is_one and (known < 2 or value.step in union.steps):
            continue  # equal by chance
        try:
            closure = _closure(tape, value.index, value.step + 1)
            if _batch_of(tape, closure) == number and not _writes_constants(tape, closure):
                listed[value.index] = closure
        except Underivable:
            continue  # nor do elements that cannot be known ahead
    return listed


class _RecipeBuilder:
    """Renumbers what one batch needs of a tape, so that recordings of the same code give equal recipes."""

    def __init__(
        self,
        tape: Tape,
        number: int,
        union: Closure,
        scratch: set[int],
        found: dict[int, Closure],
        listed: dict[int, Closure],
    ) -> None:
        self.tape = tape
        self.number = number
        self.found = found
        self.listed = listed
        self.leaves = tape.batches[number]
        beside = [closure.steps for closure in (*found.values(), *listed.values())]
        self.steps = sorted(union.steps.union(*beside))
        self.writes = [(step, written) for step in self.steps for written in tape.steps[step].writes]
        self.scratch = scratch
        self.order: list[int] = list(self.leaves)
        self.numbers = {index: position for position, index in enumerate(self.leaves)}

    def build(self, lookups: list[Lookup], closures: dict[Lookup, Closure]) -> tuple[Recipe, Evidence]:
        read = [value for step in self.steps for value in self.tape.steps[step].inputs]
        for value in read + [lookup.value for lookup in lookups]:
            if self.tape.values[value].kind == "constant":
                self._enter(value)
        steps = [self._step(self.tape.steps[index]) for index in self.steps]
        self.users_storages = {
            self.tape.values[value].span.storage
            for value in set(self.numbers) - self.scratch
            if self.tape.values[value].kind in ("leaf", "constant") and self.tape.values[value].span
        }
        recipe = Recipe(
            structure=structure_of(self.tape.contents[self.number]),
            paths=[self._leaf(index).path for index in self.leaves],
            steps=steps,
            lookups=[self._lookup(lookup, closures[lookup]) for lookup in lookups],
            private=self._private(),
            scratch={self.numbers[value] for value in self.scratch},
            found={self.numbers[value]: self._at(closure.steps) for value, closure in self.found.items()},
            listed={self.numbers[value]: self._at(closure.steps) for value, closure in self.listed.items()},
            implied={self.numbers[value] for value in self.found if self.tape.values[value].implied},
        )
        return recipe, self._evidence(lookups)

    def _leaf(self, index: int) -> Any:
        return self.tape.values[index]

    def _enter(self, value: int) -> int:
        if value not in self.numbers:
            self.numbers[value] = len(self.order)
            self.order.append(value)
        return self.numbers[value]

    def _step(self, step: Step) -> RecipeStep:
        outputs = tuple((place, self._enter(value)) for place, value in step.outputs)
        arguments = tuple((name, keyword, self._tree(node)) for name, keyword, node in step.arguments)
        return RecipeStep(step.operator, arguments, outputs)

    def _tree(self, node: Any) -> Any:
        if isinstance(node, Ref):
            return Ref(self.numbers[node.value])
        if isinstance(node, DrawnAfter):
            return 0 if node.batch is None else node.batch - self.number
        return tuple(map(self._tree, node)) if isinstance(node, tuple) else node

    def _at(self, steps: Iterable[int]) -> frozenset[int]:
        return frozenset(bisect_left(self.steps, step) for step in steps)

    def _lookup(self, lookup: Lookup, closure: Closure) -> RecipeLookup:
        return RecipeLookup(
            lookup.site.table,
            lookup.site.operation,
            self.numbers[lookup.value],
            bisect_left(self.steps, lookup.time),
            self._at(closure.steps),
            self._is_copied(lookup),
        )

    def _is_copied(self, lookup: Lookup) -> bool:
        reached = self.tape.values[lookup.value].span
        if reached is None:
            return True
        later = (written for step, written in self.writes if step >= lookup.time)
        return reached.storage in self.users_storages or any(written.overlaps(reached) for written in later)

    def _private(self) -> set[int]:
        return {
            position
            for position, index in enumerate(self.leaves)
            if (reached := self._leaf(index).span) is not None
            and any(written.overlaps(reached) for _, written in self.writes)
        }

    def _evidence(self, lookups: list[Lookup]) -> Evidence:
        values = [self.tape.values[index] for index in self.order]
        numbers = {position: value.number for position, value in enumerate(values) if value.kind == "number"}
        slots = [self.tape.steps[index].numbers for index in self.steps]
        elements = {position: value.elements for position, value in enumerate(values) if value.elements}
        observation = Observation([value.shape for value in values], numbers, slots, elements)
        constants: dict[int, Tensor] = {
            position: value.tensor for position, value in enumerate(values) if value.kind == "constant"
        }
        wheres = [self.tape.steps[index].where for index in self.steps]
        return Evidence(observation, constants, [lookup.site for lookup in lookups], wheres)
