"""Optimizer steps on records: value, state and last-step word in one pass over memory.

Arithmetic is done in the value dtype and in the order of operations of torch.optim with dense gradients, and
scalars are rounded to that dtype once. SGD gives PyTorch's bits where the processor has fused multiply-add
(as PyTorch assumes); so does Adagrad but for the root, which is rounded correctly here and within one unit
there. Each record named in `slots` is updated once: slots must be distinct.
"""

import numpy as np

from cuda_ops.cpu.atomic import lock_record, unlock_record
from cuda_ops.cpu.checks import float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, touch


def sgd_update(words, stride, dim, steps, slots, grad, lr, scale, version):
    """Step of SGD without momentum: value -= lr * (scale * grad); last step = version.

    Moves len(slots) * (3 * dim * itemsize + 8) bytes.

    Args:
        words: [any] float32 or float64, the record store (see rows.py), updated in place.
        stride: words per record.
        dim: words of value at the beginning of a record.
        steps: [words.nbytes // 8] int64 view of the same bytes.
        slots: [n] int64, distinct.
        grad: [n, dim], dtype of `words`: the gradient of each record.
        lr: learning rate.
        scale: factor of the gradient (1 for none, negative to maximise).
        version: int, the number of this step.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    slots, grad = check_update(words, stride, dim, 0, steps, slots, grad)
    sgd_records(words, stride, steps, slots, grad, float(lr), float(scale), int(version), 0, False)


def adagrad_update(words, stride, dim, steps, slots, grad, clr, eps, scale, version):
    """Step of Adagrad (Duchi, Hazan, Singer 2011), with g = scale * grad.

    state += g * g; value -= clr * g / (sqrt(state) + eps); last step = version. The sum of squares is the
    `dim` words after the value. Moves len(slots) * (5 * dim * itemsize + 8) bytes.

    Args:
        words, stride, dim, steps, slots, grad, scale, version: as in sgd_update, stride >= 2 * dim + the
            last-step word.
        clr: learning rate after decay, lr / (1 + (step - 1) * lr_decay).
        eps: added to the root.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    slots, grad = check_update(words, stride, dim, dim, steps, slots, grad)
    adagrad_records(words, stride, steps, slots, grad, float(clr), float(eps), float(scale), int(version), 0, False)


def check_update(words, stride, dim, state_words, steps, slots, grad):
    """Return (slots, grad) in plain form; raise what the update functions say if something does not fit."""
    count = record_count(words, stride)
    if words.itemsize * stride % 8:
        raise ValueError(f"stride is {stride} words of {words.itemsize} bytes; a record must be a multiple of 8 bytes")
    word_range(stride - 8 // words.itemsize, 0, dim + state_words)
    writable(steps, "steps", np.int64, (words.nbytes // 8,))
    slots = int_vector(slots, "slots")
    grad = float_matrix(grad, "grad", words.dtype)
    if grad.shape != (slots.size, dim):
        raise ValueError(f"grad must have shape {(slots.size, dim)}, got {grad.shape}")
    in_range(slots, count, "slots")
    return slots, grad


@fused_kernel
def sgd_records(words, stride, steps, slots, grad, lr, scale, version, first, shared):
    """The kernel of `sgd_update`, from `slots[first]` on. Returns how many are done: all, but with `shared`, which
    locks each record while it is updated, fewer where another holds one for long."""
    count, dim = grad.shape
    flat = grad.reshape(-1)
    dtype = words.dtype.type
    minus_lr = dtype(-lr)
    scale = dtype(scale)
    record_longs = stride * words.itemsize // 8
    for i in range(first, count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride, stride)
        last = np.uint64((slots[i] + 1) * record_longs - 1)
        if shared and not lock_record(steps, last):
            return i
        value = np.uint64(slots[i] * stride)
        row = np.uint64(i * dim)
        for j in range(dim):
            words[value + np.uint64(j)] += minus_lr * (scale * flat[row + np.uint64(j)])
        if shared:
            unlock_record(steps, last, version)
        else:
            steps[last] = version
    return count


@fused_kernel
def adagrad_records(words, stride, steps, slots, grad, clr, eps, scale, version, first, shared):
    """The kernel of `adagrad_update`, from `slots[first]` on. Returns how many are done: all, but with `shared`, which
    locks each record while it is updated, fewer where another holds one for long."""
    count, dim = grad.shape
    flat = grad.reshape(-1)
    dtype = words.dtype.type
    minus_clr = dtype(-clr)
    eps = dtype(eps)
    scale = dtype(scale)
    record_longs = stride * words.itemsize // 8
    for i in range(first, count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride, stride)
        last = np.uint64((slots[i] + 1) * record_longs - 1)
        if shared and not lock_record(steps, last):
            return i
        value = np.uint64(slots[i] * stride)
        state = value + np.uint64(dim)
        row = np.uint64(i * dim)
        for j in range(dim):
            g = scale * flat[row + np.uint64(j)]
            total = words[state + np.uint64(j)] + g * g
            words[state + np.uint64(j)] = total
            words[value + np.uint64(j)] += minus_clr * g / (np.sqrt(total) + eps)
        if shared:
            unlock_record(steps, last, version)
        else:
            steps[last] = version
    return count
