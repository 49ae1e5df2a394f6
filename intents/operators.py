"""What has to be known of a PyTorch operator to record and replay it, read from its schema once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# What an integer argument means decides which explanation of its value is tried first (dims.py).
SIZE = "size"  # the length of something new: follows the batch if it can
REPEAT = "repeat"  # how often a dimension is repeated: as SIZE, but never the size of the input itself
BOUND = "bound"  # a position within a dimension of the input
VIEW = "view"  # one size of a view: all of them together give the number of elements
EXPAND = "expand"  # one size of an expansion, aligned to the right
LITERAL = "literal"  # a constant unless proved otherwise

DRAW = "random_ids"  # an operation of ours: a draw that can be repeated for any batch

_VIEWS = {"view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy"}
_EXPANDS = {"expand", "expand_copy"}
_REPEATS = {"repeat", "tile"}
_BOUNDS = {
    "slice",
    "slice_copy",
    "slice_scatter",
    "split",
    "split_copy",
    "split_with_sizes",
    "split_with_sizes_copy",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "topk",
}
_LITERALS = {"select", "select_copy", "select_scatter", "constant_pad_nd", "roll", "diagonal"}

# They move an argument to other memory; operators with this in their name update statistics that their schema
# hides.
_REBINDING = {"set_", "resize_", "resize_as_"}
_HIDDEN_STATE = "batch_norm"

_REPLAYED_NAMESPACES = {"aten", "prims"}


@dataclass(frozen=True)
class Argument:
    """One argument of an operator. ``role`` is None where it holds no integer that could follow a batch."""

    name: str
    keyword_only: bool
    written: bool
    role: str | None


@dataclass(frozen=True)
class Operator:
    """The facts about one operator overload that recording needs."""

    func: Any
    name: str
    base: str
    arguments: tuple[Argument, ...]
    default_dim: int
    random: bool
    dynamic: bool
    refusal: str | None

    @property
    def is_view(self) -> bool:
        return self.base in _VIEWS

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> list[tuple[Argument, Any]]:
        """The arguments that a call gives, in the order of the schema."""
        bound = list(zip(self.arguments, args, strict=False))
        bound += [(argument, kwargs[argument.name]) for argument in self.arguments if argument.name in kwargs]
        return bound


@cache
def operator(func: Any) -> Operator:
    """The facts about ``func``, an ``OpOverload``."""
    schema = func._schema
    base = schema.name.split("::")[1]
    arguments = tuple(
        Argument(
            argument.name,
            argument.kwarg_only,
            argument.alias_info is not None and argument.alias_info.is_write,
            _role(base, argument),
        )
        for argument in schema.arguments
    )
    tags = func.tags
    return Operator(
        func=func,
        name=str(func),
        base=base,
        arguments=arguments,
        default_dim=next((a.default_value or 0 for a in schema.arguments if a.name == "dim"), 0),
        random=torch.Tag.nondeterministic_seeded in tags or any(a.name == "generator" for a in schema.arguments),
        dynamic=torch.Tag.dynamic_output_shape in tags,
        refusal=_refusal(func.namespace, base, str(func)),
    )


def _refusal(namespace: str, base: str, name: str) -> str | None:
    if namespace not in _REPLAYED_NAMESPACES:
        return f"went through the custom operation {name}, which may do more than compute"
    if base in _REBINDING or _HIDDEN_STATE in base:
        return f"went through {name}, which changes its arguments in ways that its schema does not say"
    return None


def _role(base: str, argument: Any) -> str | None:
    kind = argument.real_type
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    if isinstance(kind, (torch.NumberType, torch.TensorType)):  # a number may stand where a tensor is due
        return SIZE if base == "arange" and argument.name == "end" else LITERAL
    if not isinstance(kind, torch.SymIntType):
        return None
    if base in _VIEWS and argument.name in ("size", "shape"):
        return VIEW
    for names, role in ((_EXPANDS, EXPAND), (_REPEATS, REPEAT), (_BOUNDS, BOUND), (_LITERALS, LITERAL)):
        if base in names:
            return role
    return LITERAL if argument.name == "step" else SIZE
