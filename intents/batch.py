"""The tensors of a batch, whatever it is made of: containers, their children, and the structure that they share."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Children = Callable[[Any], Iterable[tuple[str, Any]]]

_registered: dict[type, Children] = {}
_resolved: dict[type, Children | None] = {}

_LAST_POSITION = re.compile(r"(.*)\[\d+\](.*?)$", re.DOTALL)

# Single values in longer sequences are data of samples (names, say), not flags of the batch.
_MOST_FLAGS = 8
_INTEGERS = (int, np.integer)
_FLAGS = (bool, str, type(None), enum.Enum, np.bool_)

# Things that hold tensors without being data of a batch, and atoms that are met most often.
_OPAQUE = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type(None),
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.dtype,
    torch.device,
    torch.Generator,
)


def register_container(cls: type, children: Callable[[Any], Iterable[tuple[str, Any]]]) -> None:
    """Teach :func:`leaves` to look inside instances of ``cls`` and of its subclasses.

    ``children(obj)`` gives ``(label, child)`` pairs in a stable order; labels must be unique within the
    object and are appended to the path, so ``".x"`` and ``"['x']"`` read well. A later registration for the
    same class replaces the former.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_container takes a class, got {cls!r}: pass type(obj) for an instance")
    _registered[cls] = children
    _resolved.clear()


@dataclass
class Contents:
    """What a batch holds, with paths.

    ``traced`` are the things that ids may be made of: tensors, arrays of numbers, whole numbers, and lists of them.
    ``flags`` are truth values, strings, enumerations and None: what a loop may branch on.
    """

    traced: list[tuple[str, Any]] = field(default_factory=list)
    flags: list[tuple[str, Any]] = field(default_factory=list)


def leaves(batch: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in ``batch`` with its path, in the order of the containers.

    Mappings, lists, tuples, named tuples, dataclasses, bare tensors, objects that keep tensors in
    ``__dict__`` and classes given to :func:`register_container` are looked into, to any depth; everything
    else is ignored. A bare tensor has the empty path; others read as what follows ``batch`` in Python:
    ``"['sparse']"``, ``"[1].x"``. An object that contains itself is entered once.
    """
    return [(path, leaf) for path, leaf in contents(batch).traced if isinstance(leaf, Tensor)]


def contents(batch: Any) -> Contents:
    """What :func:`leaves` gives, and the numbers and flags beside the tensors."""
    found = Contents()
    _collect("", batch, found, set())
    return found


def structure(batch: Any) -> Hashable:
    """What two batches must share for one program to serve both: paths, dtypes, numbers of dimensions, device types."""
    return structure_of(contents(batch).traced)


def structure_of(traced: list[tuple[str, Any]]) -> Hashable:
    """The same as :func:`structure`, for contents that are at hand."""
    return tuple((path, *_kind(leaf)) for path, leaf in traced)


def _kind(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.ndim, leaf.device.type
    if isinstance(leaf, np.ndarray):
        return f"array of {leaf.dtype}", leaf.ndim, "cpu"
    return type(leaf).__name__ if isinstance(leaf, (list, tuple)) else "int", 0, "cpu"


def as_tensor(leaf: Any) -> Tensor:
    """A traced thing as a tensor: arrays share their memory with it, numbers are copied."""
    if isinstance(leaf, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an array that is read only stays unwritten
            return torch.from_numpy(leaf)
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.int64, device="cpu")


def sibling_groups(paths: list[str]) -> list[list[int]]:
    """Places of paths that differ in nothing but their last position in a list, where there are several."""
    groups: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        if found := _LAST_POSITION.match(path):
            groups.setdefault(f"{found[1]}[*]{found[2]}", []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def lengths_of(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The lengths of ``tensors`` in one tensor."""
    return torch.tensor([len(tensor) for tensor in tensors], dtype=dtype, device="cpu")


def _collect(path: str, node: Any, found: Contents, entered: set[int]) -> None:
    if isinstance(node, Tensor) and node.layout is torch.jagged:
        found.traced += [(f"{path}.values()", node._values), (f"{path}.offsets()", node._offsets)]
        return
    if isinstance(node, Tensor) or (isinstance(node, np.ndarray) and _is_shared_by_torch(node)):
        found.traced.append((path, node))
        return
    if isinstance(node, _FLAGS):
        found.flags.append((path, node))
        return
    if isinstance(node, _INTEGERS):
        if -(2**62) < node < 2**62:
            found.traced.append((path, int(node)))
        return
    if isinstance(node, (list, tuple)) and node and _are_atoms(node):
        _collect_atoms(path, node, found)
        return
    children = _children_of(type(node))
    if children is None or id(node) in entered:
        return
    entered.add(id(node))
    for label, child in children(node):
        _collect(path + label, child, found, entered)
    entered.discard(id(node))


def _collect_atoms(path: str, node: Any, found: Contents) -> None:
    if len(node) > _MOST_FLAGS or type(node) is list:
        if all(type(child) is int and -(2**62) < child < 2**62 for child in node):
            found.traced.append((path, node))
    elif _children_of(type(node)) is not None:
        for label, child in _children_of(type(node))(node):
            _collect(path + label, child, found, set())


def _are_atoms(node: Iterable) -> bool:
    return all(isinstance(child, (*_FLAGS, *_INTEGERS, float)) for child in node)


def _is_shared_by_torch(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" and array.dtype.isnative and all(stride >= 0 for stride in array.strides)


def _children_of(cls: type) -> Children | None:
    if cls not in _resolved:
        _resolved[cls] = _resolve(cls)
    return _resolved[cls]


def _resolve(cls: type) -> Children | None:
    for base in cls.__mro__:
        if base in _registered:
            return _registered[base]
    if issubclass(cls, _OPAQUE):
        return None
    if issubclass(cls, Mapping):
        return _of_mapping
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _of_named_tuple
    if issubclass(cls, (list, tuple)):
        return _of_sequence
    if dataclasses.is_dataclass(cls):
        return _of_dataclass
    return _of_object


def _of_mapping(node: Mapping) -> Iterable[tuple[str, Any]]:
    return [(f"[{key!r}]", child) for key, child in node.items()]


def _of_sequence(node: Iterable) -> Iterable[tuple[str, Any]]:
    return [(f"[{position}]", child) for position, child in enumerate(node)]


def _of_named_tuple(node: Any) -> Iterable[tuple[str, Any]]:
    return [(f".{name}", child) for name, child in zip(node._fields, node, strict=True)]


def _of_dataclass(node: Any) -> Iterable[tuple[str, Any]]:
    names = [field.name for field in dataclasses.fields(node)]
    return [(f".{name}", getattr(node, name)) for name in names if hasattr(node, name)]


def _of_object(node: Any) -> Iterable[tuple[str, Any]]:
    # vars() and not getattr(): a property of the user's may compute, draw or fail.
    return [(f".{name}", child) for name, child in getattr(node, "__dict__", {}).items()]
