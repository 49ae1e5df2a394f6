"""What Python and NumPy do with the numbers of a batch, where no operation is seen.

A detour through them (``torch.tensor(batch["ids"].tolist())``, ``from_numpy(ids.numpy()[2:])``) ends in a tensor out of
nowhere. Where it holds the numbers of a tensor of the newest batch, lies in its memory, or holds the lengths of a list
of them, it is taken for made from that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import lengths_of, sibling_groups
from .entries import Ref, Step
from .operators import Operator
from .sites import users_line

if TYPE_CHECKING:
    from .tape import Tape


def trace_back(tape: Tape, tensor: Tensor) -> bool:
    """Put on the tape how ``tensor``, which Python or NumPy made, comes from the newest batch; whether it does."""
    return _copied(tape, tensor) or _within(tape, tensor) or _counts_siblings(tape, tensor)


def imply_numbers(tape: Tape, leaf: Tensor, is_number: bool) -> None:
    """What Python may read of a leaf unseen: the number that it is; the sum and the largest of lengths."""
    if leaf.dtype not in (torch.int64, torch.int32) or leaf.device.type != "cpu" or not leaf.numel():
        return
    if is_number:
        tape.observe(torch.ops.aten._local_scalar_dense.default, (leaf,), {}, leaf.item())
    elif leaf.layout is torch.strided and leaf.ndim == 1:
        for reduction in (torch.ops.aten.max.default, torch.ops.aten.sum.default):
            made = reduction(leaf)
            before = len(tape.values)
            tape.observe(reduction, (leaf,), {}, made)
            tape.observe(torch.ops.aten._local_scalar_dense.default, (made,), {}, made.item())
            for value in tape.values[before:]:
                value.implied = value.kind == "number"


def _copied(tape: Tape, tensor: Tensor) -> bool:
    """Whether a tensor that Python or numpy made holds what a leaf of the newest batch does; if so, it comes from
    there."""
    newest = next(reversed(tape.batches.values()), ())
    for leaf in (tape.values[index].tensor for index in newest):
        if _same_numbers(leaf, tensor):
            shaped = leaf.reshape(tensor.shape)
            tape.observe(torch.ops.aten.reshape.default, (leaf, list(tensor.shape)), {}, shaped)
            tape.observe(torch.ops.aten._to_copy.default, (shaped,), {"dtype": tensor.dtype}, tensor)
            return True
    return False


def _within(tape: Tape, tensor: Tensor) -> bool:
    """Whether a tensor lies in the memory of a leaf of the newest batch, as a slice of an array does; if so, it is
    a view of it."""
    newest = next(reversed(tape.batches.values()), ())
    for leaf in (tape.values[index].tensor for index in newest):
        if leaf.layout is not torch.strided or leaf.dtype != tensor.dtype or leaf.device != tensor.device:
            continue
        if not leaf.is_contiguous() or not tensor.numel() or not leaf.numel():
            continue
        offset = (tensor.data_ptr() - leaf.data_ptr()) // leaf.itemsize
        if 0 <= offset < leaf.numel():
            form = (list(tensor.shape), list(tensor.stride()), offset)
            tape.observe(torch.ops.aten.as_strided.default, (leaf, *form), {}, tensor)
            return True
    return False


def _counts_siblings(tape: Tape, tensor: Tensor) -> bool:
    """Whether a tensor that Python made holds the lengths of the tensors of one list in the newest batch."""
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.ndim != 1 or tensor.device.type != "cpu":
        return False
    newest = next(reversed(tape.batches.values()), ())
    for group in sibling_groups([tape.values[index].path for index in newest]):
        leaves = [tape.values[newest[place]] for place in group]
        sizes = [leaf.shape[0] if leaf.shape else -1 for leaf in leaves]
        if len(set(sizes)) > 1 and sizes == tensor.tolist():
            inputs = tuple(leaf.index for leaf in leaves)
            arguments = (("tensors", False, tuple(map(Ref, inputs))), ("dtype", False, tensor.dtype))
            facts = Operator(lengths_of, "lengths", "lengths", (), 0, False, False, None)
            tape.append(Step(facts, arguments, (), inputs, tape.add_outputs(tensor), (), users_line()))
            return True
    return False


def _same_numbers(leaf: Tensor, tensor: Tensor) -> bool:
    if leaf.layout is not torch.strided or leaf.device != tensor.device or leaf.numel() != tensor.numel():
        return False
    if tensor.numel() < 2 or leaf.is_floating_point() != tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    flat = leaf.reshape(-1)
    return bool((flat == tensor.reshape(-1)).all()) and not bool((flat == flat[0]).all())
