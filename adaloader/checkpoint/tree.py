"""State of any shape (dictionaries, lists, numbers, tensors) as JSON and named tensors, and back; no pickle.

Whatever is not one of the kinds below is refused by name when it is saved, not when it is wanted back.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from adaloader.checkpoint.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from adaloader.errors import CheckpointError

_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_MOST_DEPTH = 64


class Encoder:
    """Turns values into JSON nodes, and gathers their tensors by name.

    A tensor is named for its place; `tensors` are not copied, so they are to be written before they change.
    """

    def __init__(self):
        self.tensors: dict[str, np.ndarray | torch.Tensor] = {}

    def copy_tensors(self) -> None:
        """Have `tensors` in memory of their own, which nobody changes."""
        self.tensors = {
            name: each.copy() if isinstance(each, np.ndarray) else each.to("cpu", copy=True)
            for name, each in self.tensors.items()
        }

    def encode(self, value: Any, place: str) -> Any:
        """Return the node of `value`.

        Raises:
            CheckpointError: naming the place of what cannot be saved.
        """
        return self._encode(value, place, 0)

    def _encode(self, value: Any, place: str, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise CheckpointError(f"{place[:80]}... cannot be saved: it is nested more than {_MOST_DEPTH} deep")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._name(value.detach(), place)}
        if isinstance(value, (np.ndarray, np.generic)):
            return self._encode_numpy(value, place)
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": base64.b64encode(bytes(value)).decode()}
        for kind, of in _MAPPINGS.items():
            if type(value) is of:
                items = [
                    [self._encode(key, place, depth + 1), self._encode(each, f"{place}/{key}", depth + 1)]
                    for key, each in value.items()
                ]
                return {kind: items}
        for kind, of in _SEQUENCES.items():
            if type(value) is of or (kind == "tuple" and type(value) is torch.Size):
                return {kind: [self._encode(each, f"{place}/{at}", depth + 1) for at, each in enumerate(value)]}
        if isinstance(value, Mapping) and type(value).__module__.startswith(("torch", "adaloader")):
            return self._encode(dict(value), place, depth)
        raise CheckpointError(
            f"{place} cannot be saved: it is a {type(value).__module__}.{type(value).__qualname__}; checkpoints hold "
            "numbers, text, tensors, arrays, and lists, tuples, sets and dictionaries of them (no pickle): put what "
            "it needs into such"
        )

    def _encode_numpy(self, value: np.ndarray | np.generic, place: str) -> Any:
        if value.dtype.kind == "U" and value.ndim == 0:
            return str(value)
        if value.dtype not in NUMPY_DTYPES.values():
            raise CheckpointError(f"{place} cannot be saved: it is a NumPy array of dtype {value.dtype}")
        kind = "scalar" if isinstance(value, np.generic) else "array"
        return {kind: self._name(np.ascontiguousarray(value).reshape(value.shape), place)}

    def _name(self, tensor: np.ndarray | torch.Tensor, place: str) -> str:
        if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.dtype not in TORCH_DTYPES):
            raise CheckpointError(
                f"{place} cannot be saved: it is a tensor of dtype {tensor.dtype} and layout {tensor.layout}; make it "
                "a dense one of real numbers"
            )
        name, again = place, 1
        while name in self.tensors:
            again += 1
            name = f"{place}#{again}"
        self.tensors[name] = tensor
        return name


def decode(node: Any, tensor: Callable[[str], torch.Tensor], place: str = "") -> Any:
    """Return the value of a node; `tensor(name)` gives the tensors, each asked for once for each mention.

    Raises:
        CheckpointError: if the node is none of `Encoder`'s.
    """
    return _decode(node, tensor, place, 0)


def _decode(node: Any, tensor: Callable[[str], torch.Tensor], place: str, depth: int) -> Any:
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if not isinstance(node, dict) or len(node) != 1 or depth > 2 * _MOST_DEPTH:
        raise CheckpointError(f"{place or 'the index'}: {str(node)[:80]} is no node of a checkpoint")
    ((kind, content),) = node.items()
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "bytes" and isinstance(content, str):
        try:
            return base64.b64decode(content, validate=True)
        except ValueError as error:
            raise CheckpointError(f"{place}: not base64: {error}") from error
    if kind in ("tensor", "array", "scalar") and isinstance(content, str):
        found = tensor(content)
        if kind == "tensor":
            return found
        array = found.numpy()
        return array if kind == "array" else array.reshape(())[()]
    if kind in _SEQUENCES and isinstance(content, list):
        return _SEQUENCES[kind](_decode(each, tensor, f"{place}/{at}", depth + 1) for at, each in enumerate(content))
    if kind in _MAPPINGS and isinstance(content, list):
        made = _MAPPINGS[kind]()
        for item in content:
            if not (isinstance(item, list) and len(item) == 2):
                raise CheckpointError(f"{place}: {str(item)[:80]} is no item of a dictionary")
            key = _decode(item[0], tensor, place, depth + 1)
            try:
                made[key] = _decode(item[1], tensor, f"{place}/{key}", depth + 1)
            except TypeError as error:
                raise CheckpointError(f"{place}: {str(key)[:80]} cannot be a key: {error}") from error
        return made
    raise CheckpointError(f"{place or 'the index'}: {kind!r} is no kind of node that this version knows")
