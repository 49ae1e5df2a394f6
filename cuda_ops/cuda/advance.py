"""Dense optimizers on records in device memory, lazily: catch rows up, and take the next step."""

from __future__ import annotations

import numpy as np
import torch

from cuda_ops.cpu import root_mean_square as host_squares
from cuda_ops.cpu.advance import ADAM_KINDS, LAYOUTS, SQUARE_KINDS
from cuda_ops.cuda import adam, momentum, root_mean_square
from cuda_ops.cuda.checks import float_matrix, in_range, int_vector, name_of, record_count, word_range, writable
from cuda_ops.cuda.launch import launch, like
from cuda_ops.cuda.update import kind_of
from cuda_ops.cuda.words import pieces, widest


def advance(kind, words, stride, dim, steps, slots, grad, history, bounds, scale, version, states=True):
    """Bring records to the last step of a history; with `grad`, as a step that has a gradient of them.

    As cuda_ops.cpu.advance.advance, whose functions for the words of a row these kernels are made of, for tensors of
    one CUDA device, `history` and `bounds` included. A part of a warp per row; the steps that a row missed are made in
    registers, up to 32 between two looks at whether they can still move it, which its lanes decide together. Moves
    len(slots) * ((2 + 2 * parts of state) * dim * itemsize + 32) bytes, for a step with a gradient dim * itemsize more,
    and the rows of the history from the cache.
    """
    parts, columns = LAYOUTS[kind]
    count = record_count(words, stride)
    if words.itemsize * stride % 8:
        raise ValueError(f"stride is {stride} words of {words.itemsize} bytes; a record must be a multiple of 8 bytes")
    word_range(stride - 16 // words.itemsize, 0, dim + parts * dim)
    writable(steps, "steps", torch.int64, (words.numel() * words.itemsize // 8,))
    history = _scalars(history, "history", "steps", columns)
    slots = int_vector(slots, "slots")
    in_range(slots, count, "slots")
    stepping = grad is not None
    if stepping:
        grad = float_matrix(grad, "grad", words.dtype)
        if tuple(grad.shape) != (slots.numel(), dim):
            raise ValueError(f"grad must have shape {(slots.numel(), dim)}, got {tuple(grad.shape)}")
        if not len(history):
            raise ValueError("history is empty: a step with a gradient needs its scalars there")
    elif not len(history):
        return
    else:
        grad = words[:0]
    bounds = _scalars(bounds, "bounds", "regimes", 4)
    grad = grad.view(-1)
    wide = widest(words, stride, dim, others=(grad,) if stepping else ())
    arrays = (words, steps, slots, grad, history, bounds)
    sizes = (stride, dim, stride * words.itemsize // 8, int(stepping))
    launch(
        _body(kind, parts, kind_of(words), wide),
        slots.numel(),
        pieces(dim, wide),
        *arrays,
        *sizes,
        *like(words, scale),
        int(version),
        int(stepping or states),
    )


def _scalars(tensor, name, rows, columns):
    if tensor.dtype != torch.float64 or tensor.ndim != 2 or tensor.shape[1] != columns:
        got = f"{name_of(tensor.dtype)} {list(tensor.shape)}"
        raise ValueError(f"{name} must be float64 [{rows}, {columns}], got {got}")
    return tensor.contiguous()


def _body(kind: str, parts: int, scalar: type[np.generic], wide: int):
    if kind in ADAM_KINDS:
        return adam.advancer(ADAM_KINDS[kind], scalar, wide)
    if kind.startswith("sgd"):
        return momentum.advancer(scalar, wide) if parts else momentum.decayer(scalar, wide)
    optimizer = SQUARE_KINDS.get(kind, host_squares.RMSPROP)
    has_second = optimizer == host_squares.ADADELTA or kind.endswith("momentum")
    return root_mean_square.advancer(optimizer, has_second, "centered" in kind, scalar, wide)
