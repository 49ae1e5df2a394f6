"""Integers of a recording that follow the sizes of the batch.

An operation is recorded with the sizes of one batch in it: ``view(x, [1024, 52])``, ``arange(20)``. On
another batch they may be others. For every such integer a formula over sizes that are known at replay is
chosen: what its meaning suggests where one recording is all there is, and what fits every recording where
there are several. A wrong guess is found when derived ids are compared with those that a lookup used; a
second recording then decides (``Program.refine``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from .entries import Slot
from .operators import BOUND, EXPAND, LITERAL, REPEAT, VIEW

_TO_THE_END = 2**62  # slices without an end carry the largest int64
_LONGEST_PRODUCT = 3
_SMALL = 2  # 0, 1 and 2 turn up everywhere: too common to be evidence
_PLAIN_MULTIPLE = 16  # from this size on, k * size is believed to be no coincidence
_DIVISORS = range(2, 9)
_NO_SUCH = -(2**60)  # an element that a shorter list does not have


class Symbol(NamedTuple):
    """The size of a value's dimension, (``dim`` None) the Python number that a value is, or the element ``element`` of
    a value that is a list of whole numbers."""

    value: int
    dim: int | None
    element: int | None = None


@dataclass(frozen=True)
class Formula:
    """``(sum of factor * product of symbols + largest symbol + addend) // divisor``."""

    terms: tuple[tuple[int, tuple[Symbol, ...]], ...] = ()
    addend: int = 0
    divisor: int = 1
    largest: tuple[Symbol, ...] = ()

    @property
    def symbols(self) -> set[Symbol]:
        return {symbol for _, symbols in self.terms for symbol in symbols}.union(self.largest)

    def evaluate(self, size: Callable[[Symbol], int]) -> int:
        total = sum(factor * prod(map(size, symbols)) for factor, symbols in self.terms)
        total += max(map(size, self.largest), default=0)
        return (total + self.addend) // self.divisor

    def source(self, name: Callable[[Symbol], str]) -> str:
        """The formula as a Python expression."""
        parts = [f"max({', '.join(map(name, self.largest))})"] if self.largest else []
        for factor, symbols in self.terms:
            product = " * ".join(map(name, symbols))
            parts.append(product if factor == 1 else f"{factor} * {product}")
        if self.addend or not parts:
            parts.append(str(self.addend))
        total = " + ".join(parts).replace("+ -", "- ")
        return total if self.divisor == 1 else f"({total}) // {self.divisor}"


@dataclass
class Observation:
    """What one recording showed: the shape of every value, the Python numbers, the elements of short lists, and the
    integers of every step."""

    shapes: list[tuple[int, ...]]
    numbers: dict[int, int]
    slots: list[tuple[int, ...]]
    elements: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def size(self, symbol: Symbol) -> int:
        if symbol.element is not None:
            elements = self.elements.get(symbol.value, ())
            return elements[symbol.element] if symbol.element < len(elements) else _NO_SUCH
        if symbol.dim is None:
            return self.numbers[symbol.value]
        return self.shapes[symbol.value][symbol.dim]


@dataclass
class Scope:
    """What a step may refer to: its own inputs, the leaves of the batch, and what was found out before it.

    ``from_batch`` tells whether the step's first input depends on the batch. ``found`` are Python numbers
    read from tensors and sizes that only the data decides; ``read`` are the numbers that were seen to be read;
    ``lists`` the values whose elements Python may have read. ``siblings`` are leaves of one list in the batch;
    ``selected`` is the place in a list that the step works on, if it works on one.
    """

    own: list[int]
    leaves: list[int]
    found: list[Symbol]
    read: list[Symbol]
    from_batch: bool
    lists: list[int] = field(default_factory=list)
    siblings: list[list[int]] = field(default_factory=list)
    selected: int | None = None


def literal(number: int) -> Formula:
    return Formula(addend=number)


def explain(slots: list[Slot], step: int, scope: Scope, observations: list[Observation]) -> list[Formula | None]:
    """A formula for each integer of ``step`` that gives what was observed, every time; None where there is none."""
    seen = [[observation.slots[step][slot.index] for observation in observations] for slot in slots]
    if slots and slots[0].role == VIEW:
        return _explain_view(slots, seen, scope, observations)
    listed = _one_list(seen, scope, observations) if len(slots) > 1 else None
    if listed is not None:
        return [Formula(((1, (Symbol(listed, None, place),)),)) for place in range(len(slots))]
    return [_choose(slot, numbers, len(slots), scope, observations) for slot, numbers in zip(slots, seen, strict=True)]


def _one_list(seen: list[list[int]], scope: Scope, observations: list[Observation]) -> int | None:
    """The value whose elements the integers of a step are, all of them."""
    for value in scope.lists:
        if all(
            observation.elements.get(value) == tuple(numbers[at] for numbers in seen)
            for at, observation in enumerate(observations)
        ):
            return value
    return None


def _choose(slot: Slot, seen: list[int], count: int, scope: Scope, observations: list[Observation]) -> Formula | None:
    def holds(formula: Formula) -> bool:
        return all(
            formula.evaluate(observation.size) == number for observation, number in zip(observations, seen, strict=True)
        )

    guesses = _guesses(slot, seen[0], count, scope, observations[0])
    found = next(filter(holds, guesses), None)
    if found is None and len(observations) > 1:
        found = next(filter(holds, _fits(seen, scope, observations)), None)
    return found


def _guesses(slot: Slot, number: int, count: int, scope: Scope, first: Observation) -> Iterator[Formula]:
    """Formulas for one integer of one recording, most plausible first; the last is the integer itself, for ever."""
    if -_TO_THE_END < number < -_SMALL and slot.role == BOUND:  # counted from the end
        yield from (Formula(((-1, (symbol,)),)) for symbol in scope.read if first.size(symbol) == -number)
        here = [symbol for symbol in _dims(scope.leaves, first) if symbol.dim == slot.position]
        yield from (Formula(((-1, (symbol,)),)) for symbol in here if first.size(symbol) == -number)
    if number < 0 or number >= _TO_THE_END or (number < _SMALL and slot.role != BOUND):
        yield literal(number)
    yield from _guesses_siblings(slot, number, scope, first)
    if slot.role == LITERAL:
        if number > _SMALL:
            yield from _equal(number, scope.read, first)
        yield literal(number)
    elif slot.role == BOUND:
        yield from _guesses_bound(slot, number, scope, first)
    elif slot.role == EXPAND:
        yield from _guesses_expand(slot, number, count, scope, first)
    own = [] if slot.role in (REPEAT, EXPAND) else scope.own
    yield from _guesses_size(slot, number, own, scope, first)
    yield literal(number)


def _guesses_size(slot: Slot, number: int, own: list[int], scope: Scope, first: Observation) -> Iterator[Formula]:
    here = [symbol for symbol in _dims(own + scope.leaves, first) if symbol.dim == slot.position]
    leading = [symbol for symbol in _dims(scope.leaves, first) if symbol.dim == 0]
    others = _dims(scope.leaves, first)
    yield from _equal(number, here + leading + others + scope.found, first)
    for product in _products(own + scope.leaves, first):
        if prod(map(first.size, product)) == number:
            yield Formula(((1, product),))
    for symbol in leading + others:
        size = first.size(symbol)
        if abs(number - size) == 1 and number > _SMALL * 2:
            yield Formula(((1, (symbol,)),), number - size)
    for symbol in leading:
        size = first.size(symbol)
        if size >= _PLAIN_MULTIPLE and number % size == 0 and number > 0:
            yield Formula(((number // size, (symbol,)),))


def _guesses_siblings(slot: Slot, number: int, scope: Scope, first: Observation) -> Iterator[Formula]:
    """The size of the sibling at the place that is being worked on; the largest of all siblings; what that lacks."""
    for group in scope.siblings:
        for dim in range(len(first.shapes[group[0]])):
            symbols = tuple(Symbol(leaf, dim) for leaf in group)
            sizes = set(map(first.size, symbols))
            if len(sizes) == 1:
                continue
            if scope.selected is not None and scope.selected < len(group) and slot.role == BOUND:
                yield from _equal(number, [symbols[scope.selected]], first)
            if slot.role not in (LITERAL, BOUND) and number > 1:
                if number == len(group) and slot.position == 0:
                    yield literal(number)
                if max(sizes) == number:
                    yield Formula(largest=symbols)


def _fits_siblings(seen: list[int], scope: Scope, first: Observation) -> Iterator[Formula]:
    for group in scope.siblings:
        for dim in range(len(first.shapes[group[0]])):
            symbols = tuple(Symbol(leaf, dim) for leaf in group)
            largest = max(map(first.size, symbols))
            yield Formula(addend=seen[0] - largest, largest=symbols)
            own = [symbol for symbol in symbols if symbol.value in scope.own]
            for symbol in own + [symbol for symbol in symbols if symbol not in own]:
                addend = seen[0] - largest + first.size(symbol)
                yield Formula(((-1, (symbol,)),), addend, largest=symbols)
            total = tuple((1, (symbol,)) for symbol in symbols)
            yield Formula(total, seen[0] - sum(map(first.size, symbols)))


def _guesses_bound(slot: Slot, number: int, scope: Scope, first: Observation) -> Iterator[Formula]:
    own = Symbol(scope.own[0], slot.position)
    size = first.size(own) if slot.position < len(first.shapes[own.value]) else -1
    if number == size and number > 1:
        yield Formula(((1, (own,)),))
    if number < _SMALL:
        yield literal(number)
    if number > _SMALL:
        yield from _equal(number, scope.read, first)
    if number == size - 1 and number > _SMALL:
        yield Formula(((1, (own,)),), -1)
    dims = _dims(scope.leaves, first)
    here = [symbol for symbol in dims if symbol.dim == slot.position]
    # Columns of the batch itself are picked by constants that may equal its size by chance.
    yield from _equal(number, here if scope.from_batch else here + dims, first)
    if number > _SMALL:
        yield from _equal(number, [symbol for symbol in scope.found if symbol.dim is None], first)
    yield literal(number)


def _guesses_expand(slot: Slot, number: int, count: int, scope: Scope, first: Observation) -> Iterator[Formula]:
    shape = first.shapes[scope.own[0]]
    aligned = slot.position - (count - len(shape))
    if aligned >= 0 and shape[aligned] == number != 1:
        yield Formula(((1, (Symbol(scope.own[0], aligned),)),))


def _explain_view(
    slots: list[Slot], seen: list[list[int]], scope: Scope, observations: list[Observation]
) -> list[Formula | None]:
    """Formulas for the sizes of a view. One may stay open (-1): the number of elements decides it."""

    def first_that_holds(index: int, formulas: list[Formula]) -> Formula | None:
        for formula in formulas:
            if [formula.evaluate(observation.size) for observation in observations] == seen[index]:
                return formula
        return None

    first = observations[0]
    sizes = [numbers[0] for numbers in seen]
    aligned = _aligned(scope.own[0], first.shapes[scope.own[0]], sizes)
    chosen: list[Formula | None] = []
    for index, size in enumerate(sizes):
        here = [symbol for symbol in _dims(scope.leaves, first) if symbol.dim == index]
        guesses = [literal(-1)] if size == -1 else []
        guesses += aligned[index]
        if size == 1:
            guesses.append(literal(1))
        else:
            guesses += _equal(size, here, first)
        chosen.append(first_that_holds(index, guesses))
    is_open = -1 in sizes
    rest = [index for index, formula in enumerate(chosen) if formula is None]
    other = {index: _choose(slots[index], seen[index], len(slots), scope, observations) for index in rest}
    if rest and not is_open:
        unexplained = next((index for index in rest if other[index] is None), rest[0])
        other[unexplained] = literal(-1)
    return [other[index] if formula is None else formula for index, formula in enumerate(chosen)]


def _aligned(value: int, shape: tuple[int, ...], sizes: list[int]) -> list[list[Formula]]:
    """For each size of a view, the product of the input dimensions that it merges, if it does no more."""
    known = prod(size for size in sizes if size != -1)
    if known == 0:
        return [[] for _ in sizes]
    wanted = [prod(shape) // known if size == -1 else size for size in sizes]
    explained: list[list[Formula]] = [[] for _ in sizes]
    dim, target, reached = 0, 1, 1
    for index, size in enumerate(wanted):
        begin, target = dim, target * size
        starts_aligned = reached * size == target
        while dim < len(shape) and (reached < target or (dim == begin and shape[dim] == size == 1)):
            reached *= shape[dim]
            dim += 1
        if starts_aligned and reached == target and dim > begin:
            symbols = tuple(Symbol(value, merged) for merged in range(begin, dim))
            explained[index].append(Formula(((1, symbols),)))
    return explained


def _fits(seen: list[int], scope: Scope, observations: list[Observation]) -> Iterator[Formula]:
    """Formulas for an integer that differed between recordings, simplest first; the caller checks each."""
    first, last = observations[0], observations[-1]
    yield from _fits_siblings(seen, scope, first)
    for value in scope.lists:
        elements = [Symbol(value, None, place) for place in range(len(first.elements[value]))]
        yield from _equal(seen[0], elements, first)
    symbols = _dims(scope.own + scope.leaves, first) + scope.found
    bases = [(symbol,) for symbol in symbols] + list(_products(scope.own + scope.leaves, first))
    sizes = {base: prod(map(first.size, base)) for base in bases}
    for base in bases:
        if sizes[base] and seen[0] % sizes[base] == 0:
            yield Formula(((seen[0] // sizes[base], base),))
    for factor in (1, -1):
        for base in bases:
            yield Formula(((factor, base),), seen[0] - factor * sizes[base])
    for base in bases:
        for divisor in _DIVISORS:
            for addend in (0, divisor - 1):
                yield Formula(((1, base),), addend, divisor)
    for one in symbols:
        for two in symbols:
            for factor in (1, -1):
                yield Formula(((1, (one,)), (factor, (two,))))
    for one in symbols:
        for two in symbols:
            yield Formula(((1, (one, two)),))
    for base in bases:
        run = prod(map(last.size, base)) - sizes[base]
        if run and (seen[-1] - seen[0]) % run == 0:
            factor = (seen[-1] - seen[0]) // run
            yield Formula(((factor, base),), seen[0] - factor * sizes[base])


def _dims(values: list[int], observation: Observation) -> list[Symbol]:
    return [Symbol(value, dim) for value in values for dim in range(len(observation.shapes[value]))]


def _equal(number: int, symbols: list[Symbol], observation: Observation) -> list[Formula]:
    return [Formula(((1, (symbol,)),)) for symbol in symbols if observation.size(symbol) == number]


def _products(values: list[int], observation: Observation) -> Iterator[tuple[Symbol, ...]]:
    """Neighbouring dimensions of one value, two or more at a time."""
    for value in values:
        dims = _dims([value], observation)
        for length in range(2, _LONGEST_PRODUCT + 1):
            for begin in range(len(dims) - length + 1):
                yield tuple(dims[begin : begin + length])
