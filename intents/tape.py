"""What is kept of a recorded step: the values that can be traced to a batch, and the operations that made them.

Values are tensors that came from a batch, constants that the step found lying about, and whatever operations
made of those. Three kinds of tensor are deliberately not values, so that no activation is kept alive: what
depends on a parameter, what was drawn at random, and what an operation made that cannot be replayed. They are
remembered weakly, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .batch import as_tensor
from .detours import imply_numbers, trace_back
from .entries import DrawnAfter, Lookup, Ref, Slot, Span, Step, Value, span
from .operators import BOUND, DRAW, LITERAL, SIZE, Argument, Operator, operator
from .sites import Site, users_line

PARAMETER = "depend on a parameter"
_MOST_LISTED = 64  # elements of a tensor that Python may have read as whole numbers
# Operations that take of their tensor nothing but its shape and type: what they make depends on no parameter.
_FORMED_LIKE = {
    "new_zeros": torch.ops.aten.zeros.default,
    "zeros_like": torch.ops.aten.zeros.default,
    "new_ones": torch.ops.aten.ones.default,
    "ones_like": torch.ops.aten.ones.default,
    "new_empty": torch.ops.aten.empty.memory_format,
    "empty_like": torch.ops.aten.empty.memory_format,
    "new_full": torch.ops.aten.full.default,
    "full_like": torch.ops.aten.full.default,
}


@dataclass(eq=False)
class Tape:
    """Invariant: a tensor is known by its identity as a value (held strongly, so that identities and
    addresses stay unique) or as tainted (held weakly), never both; and steps stand in the order in which they
    ran."""

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    batches: dict[int, list[int]] = field(default_factory=dict)
    contents: dict[int, list[tuple[str, Any]]] = field(default_factory=dict)
    writes: dict[int, list[tuple[int, Span]]] = field(default_factory=dict)
    births: dict[int, list[tuple[int, Span]]] = field(default_factory=dict)
    _known: dict[int, int] = field(default_factory=dict)
    _places: dict[tuple, int] = field(default_factory=dict)
    _storages: set[int] = field(default_factory=set)
    _aliases: list[Tensor] = field(default_factory=list)
    _tainted: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def add_batch(self, number: int, found: list[tuple[str, Any]]) -> None:
        """Make the contents of a batch values, whatever they were before: what a loader did to make them is past."""
        self.contents[number] = found
        tensors = [(path, as_tensor(leaf), isinstance(leaf, int)) for path, leaf in found]
        self.batches[number] = [self._add("leaf", leaf, batch=number, path=path) for path, leaf, _ in tensors]
        for index in self.batches[number]:
            reached = self.values[index].span
            if reached is not None:
                self.births.setdefault(reached.storage, []).append((len(self.steps), reached))
        for _, leaf, is_number in tensors:
            imply_numbers(self, leaf, is_number)

    def writers(self, reached: Span, before: int) -> list[int]:
        """The steps before ``before`` that overwrote some of ``reached``, since it was last handed out in a batch."""
        births = self.births.get(reached.storage, ())
        since = max((time for time, span in births if time <= before and span.overlaps(reached)), default=0)
        writes = self.writes.get(reached.storage, ())
        return [step for step, written in writes if since <= step < before and written.overlaps(reached)]

    def add_lookup(self, site: Site, ids: Tensor, on_host: np.ndarray | None = None) -> None:
        """Note that ``ids`` were looked up now; ``on_host`` are the same, flat, if somebody has brought them there."""
        taint = self.taint(ids)
        if taint is None and (ids.is_floating_point() or ids.is_complex()):
            taint = f"have dtype {ids.dtype}, where integers are expected"
        if taint is None and span(ids) is None:
            taint = "are not a plain tensor (sparse, a subclass, or inside a function transform?)"
        value = self._value(ids) if taint is None else None
        latest_batch = next(reversed(self.batches), None)
        self.lookups.append(Lookup(site, value, len(self.steps), taint, latest_batch, _distinct(ids, on_host)))

    def taint(self, tensor: Tensor) -> str | None:
        """Why ``tensor`` cannot be traced, or None."""
        if id(tensor) in self._known:
            return None
        if tensor in self._tainted:
            return self._tainted[tensor]
        is_parameter = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
        return PARAMETER if tensor.requires_grad or is_parameter else None

    def mark(self, made: Any, reason: str) -> None:
        """Remember, weakly, why the tensors in ``made`` cannot be traced."""
        for _, out in _outputs(made):
            if isinstance(out, Tensor) and id(out) not in self._known:
                self._tainted[out] = reason

    def recognise(self, made: Any, reason: str) -> None:
        """Take those tensors in ``made`` for a value that are its memory, as the inner tensors of a wrapper; mark the
        others."""
        for _, out in _outputs(made):
            alias = self._places.get(_place(out)) if type(out) is Tensor else None
            if alias is None:
                self.mark(out, reason)
            elif id(out) not in self._known:
                self._aliases.append(out)
                self._known[id(out)] = alias

    def observe(self, func: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> None:
        """Take in one operation that has just run and gave ``made``."""
        facts = operator(func)
        bound = facts.bind(args, kwargs)
        given = [(argument, tensor) for argument, node in bound for tensor in _tensors(node)]
        if facts.base == "lift_fresh":
            self._lift(given[0][1])
        elif facts.random:
            self._spoil(facts, given, made, f"are drawn at random by {facts.name} ({users_line()})")
        elif facts.refusal:
            self._spoil(facts, given, made, f"{facts.refusal} ({users_line()})")
        elif (taint := next((t for _, tensor in given if (t := self.taint(tensor))), None)) is not None:
            if facts.base in _FORMED_LIKE and isinstance(made, Tensor):
                self._add_formed(facts, made, next((node for a, node in bound if a.name == "fill_value"), None))
            else:
                self._spoil(facts, given, made, taint)
        elif given or any(isinstance(out, Tensor) for _, out in _outputs(made)):
            if facts.base == "copy_" and self._fills_a_row(given):
                self._add_step(*self._as_slice(facts, bound), made)
            else:
                self._add_step(facts, bound, given, made)

    def _fills_a_row(self, given: list) -> bool:
        """Whether a row is overwritten whole, as by ``padded[i, :n] = x`` where ``n`` is all of it: PyTorch leaves out
        the slice then, which other batches have."""
        (_, target), source = given[0], given[-1][1]
        value = self.values[self._known[id(target)]] if id(target) in self._known else None
        is_row = value is not None and value.step is not None and self.steps[value.step].operator.base == "select"
        return is_row and len(given) == 2 and target.ndim > 0 and target.shape == source.shape

    def _as_slice(self, facts: Operator, bound: list) -> tuple[Operator, list, list]:
        target = bound[0][1]
        made = torch.ops.aten.slice.Tensor(target, 0, 0, len(target))
        self.observe(torch.ops.aten.slice.Tensor, (target, 0, 0, len(target)), {}, made)
        bound = [(bound[0][0], made), *bound[1:]]
        return facts, bound, [(argument, tensor) for argument, node in bound for tensor in _tensors(node)]

    def _add_step(self, facts: Operator, bound: list, given: list, made: Any) -> None:
        numbers: list[int] = []
        inputs = tuple(self._value(tensor) for _, tensor in given)
        arguments = tuple(
            (argument.name, argument.keyword_only, self._tree(facts, argument, node, bound, numbers))
            for argument, node in bound
        )
        written = [
            (self.values[value], tensor)
            for (argument, tensor), value in zip(given, inputs, strict=True)
            if argument.written
        ]
        taint = None
        if any(value.span is None for value, _ in written):
            taint = f"went through {facts.name}, which changes a tensor in place that has no plain storage"
        elif any((value.shape, value.span) != (tuple(t.shape), span(t)) for value, t in written):
            taint = f"went through {facts.name}, which changes the shape of a tensor in place"
        writes = tuple(value.span for value, _ in written if value.span is not None)
        outputs = self.add_outputs(made)
        self.append(Step(facts, arguments, tuple(numbers), inputs, outputs, writes, users_line(), taint))

    def add_outputs(self, made: Any) -> tuple[tuple[tuple[int, ...], int], ...]:
        """Make values of what the step that is added next made; return them with their places in it."""
        outputs = []
        step = len(self.steps)
        for place, out in _outputs(made):
            if isinstance(out, Tensor):
                if id(out) not in self._known:
                    outputs.append((place, self._add("result", out, step=step)))
            elif isinstance(out, int) and not isinstance(out, bool):
                self.values.append(Value(len(self.values), "number", step=step, number=out))
                outputs.append((place, len(self.values) - 1))
        return tuple(outputs)

    def _add_formed(self, facts: Operator, made: Tensor, fill: Any) -> None:
        numbers = tuple(made.shape)
        sizes = tuple(Slot(index, SIZE, index) for index in range(made.ndim))
        arguments = (("size", False, sizes), ("dtype", True, made.dtype))
        if _FORMED_LIKE[facts.base] is torch.ops.aten.full.default:
            arguments = (arguments[0], ("fill_value", False, fill), arguments[1])
        outputs = self.add_outputs(made)
        formed = operator(_FORMED_LIKE[facts.base])
        self.append(Step(formed, arguments, numbers, (), outputs, (), users_line()))

    def _spoil(self, facts: Operator, given: list, made: Any, taint: str) -> None:
        """What an untraceable operation made is untraceable, and so is what it overwrote from then on."""
        self.mark(made, taint)
        written = [tensor for argument, tensor in given if argument.written]
        self.mark(written, taint)
        spans = [reached for tensor in written if (reached := span(tensor)) is not None]
        known = tuple(reached for reached in spans if reached.storage in self._storages)
        if known:
            self.append(Step(facts, (), (), (), (), known, users_line(), taint))

    def add_draw(
        self,
        redraw: Callable[..., Tensor],
        ordinal: int,
        low: int,
        high: int,
        shape: tuple[int, ...],
        weights: Tensor | None,
        replacement: bool,
        dtype: torch.dtype,
        made: Tensor,
    ) -> None:
        """Note that `made` was drawn at random, in a way that `redraw` repeats for any batch."""
        taint = self.taint(weights) if weights is not None else None
        if taint is not None:
            self.mark(made, taint)
            return
        inputs = () if weights is None else (self._value(weights),)
        bounds = (Slot(0, LITERAL, 0), Slot(1, LITERAL, 0))
        sizes = tuple(Slot(2 + index, SIZE, index) for index in range(len(shape)))
        arguments = (
            ("offset", False, DrawnAfter(next(reversed(self.batches), None))),
            ("ordinal", False, ordinal),
            ("low", False, bounds[0]),
            ("high", False, bounds[1]),
            ("size", False, sizes),
            ("weights", False, None if weights is None else Ref(inputs[0])),
            ("replacement", False, replacement),
            ("dtype", False, dtype),
        )
        outputs = self.add_outputs(made)
        facts = Operator(redraw, DRAW, DRAW, (), 0, False, False, None)
        self.append(Step(facts, arguments, (low, high, *shape), inputs, outputs, (), users_line()))

    def append(self, step: Step) -> None:
        """Add a step that has run."""
        for reached in step.writes:
            self.writes.setdefault(reached.storage, []).append((len(self.steps), reached))
        self.steps.append(step)

    def _lift(self, tensor: Tensor) -> None:
        # Every torch.tensor(...) and from_numpy(...) comes through here, whatever its numbers come from.
        if self.taint(tensor) is None:
            is_new = id(tensor) not in self._known and self._places.get(_place(tensor)) is None
            if is_new and trace_back(self, tensor):
                return
            value = self.values[self._value(tensor)]
            value.from_python = value.kind == "constant"

    def _value(self, tensor: Tensor) -> int:
        """The value that ``tensor`` is; one that nobody has seen before lay about already: a constant."""
        if id(tensor) in self._known:
            return self._known[id(tensor)]
        alias = self._places.get(_place(tensor))
        if alias is None:
            return self._add("constant", tensor)
        self._aliases.append(tensor)
        self._known[id(tensor)] = alias
        return alias

    def _add(self, kind: str, tensor: Tensor, **facts: Any) -> int:
        index = len(self.values)
        reached = span(tensor)
        self.values.append(Value(index, kind, tensor, tuple(tensor.shape), reached, **facts))
        if kind != "constant":
            self.values[index].elements = _elements(tensor)
        self._known[id(tensor)] = index
        if reached is not None:
            self._storages.add(reached.storage)
            place = _place(tensor)
            if place is not None:
                # Only the newest batch may be found by address: an older one of the same memory is over.
                self._places[place] = index if kind == "leaf" else self._places.get(place, index)
        return index

    def _tree(self, facts: Operator, argument: Argument, node: Any, bound: list, numbers: list[int]) -> Any:
        def slot(number: int, position: int) -> Slot:
            numbers.append(number)
            if argument.role == BOUND:
                dim = next((given for other, given in bound if other.name == "dim"), facts.default_dim)
                position = dim % max(bound[0][1].ndim, 1)
            return Slot(len(numbers) - 1, argument.role, position)

        def walk(child: Any, position: int) -> Any:
            if isinstance(child, Tensor):
                return Ref(self._value(child))
            if isinstance(child, (list, tuple)):
                return tuple(walk(item, index) for index, item in enumerate(child))
            follows = argument.role is not None and isinstance(child, int) and not isinstance(child, bool)
            return slot(child, position) if follows else child

        return walk(node, 0)


def _elements(tensor: Tensor) -> tuple[int, ...] | None:
    if tensor.ndim != 1 or tensor.dtype not in (torch.int64, torch.int32) or len(tensor) > _MOST_LISTED:
        return None
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return None
    return tuple(tensor.tolist())


def _distinct(ids: Tensor, on_host: np.ndarray | None) -> np.ndarray:
    """The distinct ids of a lookup, int64; none where they cannot be read."""
    if span(ids) is None or ids.device.type == "meta" or ids.is_floating_point() or ids.is_complex():
        return np.empty(0, np.int64)
    return np.unique(ids.detach().cpu().numpy() if on_host is None else on_host).astype(np.int64)


def _place(tensor: Tensor) -> tuple | None:
    """What two tensors share that are one memory under two names (as after ``detach`` or a detour through numpy)."""
    if span(tensor) is None or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _tensors(child)


def _outputs(made: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(made, (list, tuple)):
        for position, child in enumerate(made):
            yield from _outputs(child, (*place, position))
    else:
        yield place, made
