"""An optimizer's state_dict from rank 0 to the others: its structure as JSON text, its tensors as plain bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

import pm
from adaloader.ranks.table_values import broadcast_tensor, text_of_rank_0


def broadcast_optimizer_state(manager: pm.Manager, state_dict: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return rank 0's `state_dict` on every rank (collective): on rank 0 itself, elsewhere with tensors on the CPU.

    Raises:
        TypeError: on rank 0, if an entry is neither a tensor nor a number, text, None, or a list or mapping of such.
    """
    if manager.ranks == 1:
        return dict(state_dict)
    tensors: list[torch.Tensor] = []
    text = json.dumps(_encode(dict(state_dict), tensors)) if manager.rank == 0 else ""
    text = text_of_rank_0(manager, text)
    if manager.rank == 0:
        for tensor in tensors:
            broadcast_tensor(manager, tensor)
        return dict(state_dict)
    decoded = _decode(json.loads(text), tensors)
    for tensor in tensors:
        broadcast_tensor(manager, tensor)
    return decoded


def _encode(value, tensors: list[torch.Tensor]):
    """Return `value` as JSON knows it; tensors become their form, and are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"items": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encode(element, tensors) for element in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):  # a NumPy number
        return value.item()
    raise TypeError(
        f"an optimizer's state_dict holds a {type(value).__name__}, which cannot be sent to other ranks: {value!r}"
    )


def _decode(value, tensors: list[torch.Tensor]):
    """Return what was encoded, with tensors whose values are still to come; they are appended to `tensors`."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensors.append(torch.empty(value["tensor"], dtype=getattr(torch, value["dtype"])))
        return tensors[-1]
    if "items" in value:
        return {_decode(k, tensors): _decode(v, tensors) for k, v in value["items"]}
    ((kind, elements),) = value.items()
    return (tuple if kind == "tuple" else list)(_decode(element, tensors) for element in elements)
