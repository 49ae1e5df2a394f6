"""Optimizer steps of one element whose value is kept in half precision and its state in float32, as update.py's."""

import numpy as np

from cuda_ops.cpu.kernels import inlined

SGD, ADAGRAD, SPARSE_ADAM, ROWWISE_ADAGRAD = range(4)
STATE_PARTS = (0, 1, 2, 0)
"""State words per word of value; the rowwise Adagrad has one word a row."""


@inlined
def element_step(optimizer, value, first, second, g, minus_lr, eps, weight, weight2):
    """Return (value, first, second) after a step, all float32.

    Args:
        first, second: state: Adagrad's sum; SparseAdam's moments; the rowwise Adagrad's sum after this step.
        g: the gradient.
        minus_lr: minus the learning rate after decay or correction.
        weight, weight2: SparseAdam's 1 - betas.
    """
    if optimizer == SGD:
        return value + minus_lr * g, first, second
    if optimizer == SPARSE_ADAM:
        first = first + (g - first) * weight
        second = second + (g * g - second) * weight2
        return value + minus_lr * (first / (np.sqrt(second) + eps)), first, second
    if optimizer == ADAGRAD:
        first = first + g * g
    return value + minus_lr * g / (np.sqrt(first) + eps), first, second
