"""The tensors of a batch, whatever it is made of: containers, their children, and the structure that they share."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Children = Callable[[Any], Iterable[tuple[str, Any]]]

_registered: dict[type, Children] = {}
_resolved: dict[type, Children | None] = {}

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


def leaves(batch: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in ``batch`` with its path, in the order of the containers.

    Mappings, lists, tuples, named tuples, dataclasses, bare tensors, objects that keep tensors in
    ``__dict__`` and classes given to :func:`register_container` are looked into, to any depth; everything
    else is ignored. A bare tensor has the empty path; others read as what follows ``batch`` in Python:
    ``"['sparse']"``, ``"[1].x"``. An object that contains itself is entered once.
    """
    found: list[tuple[str, Tensor]] = []
    _collect("", batch, found, set())
    return found


def structure(batch: Any) -> Hashable:
    """What two batches must share for one program to serve both: paths, dtypes, numbers of dimensions, device types."""
    return structure_of(leaves(batch))


def structure_of(found: list[tuple[str, Tensor]]) -> Hashable:
    """The same as :func:`structure`, for leaves that are at hand."""
    return tuple((path, leaf.dtype, leaf.ndim, leaf.device.type) for path, leaf in found)


def _collect(path: str, node: Any, found: list[tuple[str, Tensor]], entered: set[int]) -> None:
    if isinstance(node, Tensor):
        found.append((path, node))
        return
    children = _children_of(type(node))
    if children is None or id(node) in entered:
        return
    entered.add(id(node))
    for label, child in children(node):
        _collect(path + label, child, found, entered)
    entered.discard(id(node))


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
