"""Steps of optimizers that leave alone the rows without gradient: SparseAdam, and the rowwise Adagrad."""

import numpy as np

from cuda_ops.cpu.atomic import lock_record, unlock_record
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, inlined, touch
from cuda_ops.cpu.squares import LANES, squares_of_eights
from cuda_ops.cpu.update import check_update


def sparse_adam_update(words, stride, dim, steps, slots, grad, betas, step_size, eps, scale, version):
    """Step of torch.optim.SparseAdam (Adam of the rows that have a gradient), with g = scale * grad.

    m += (1 - beta1) * (g - m); v += (1 - beta2) * (g * g - v); value -= step_size * (m / (sqrt(v) + eps)); last step =
    version. The two moments are the 2 * `dim` words after the value. Moves len(slots) * (7 * dim * itemsize + 8) bytes.

    Args:
        words, stride, dim, steps, slots, grad, scale, version: as in sgd_update.
        betas: (beta1, beta2).
        step_size: lr * sqrt(1 - beta2^t) / (1 - beta1^t) at step t.
        eps: added to the root.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    slots, grad = check_update(words, stride, dim, 2 * dim, steps, slots, grad)
    weights = 1 - betas[0], 1 - betas[1]
    _sparse_adam(words, stride, steps, slots, grad, *weights, float(step_size), float(eps), float(scale), int(version))


def rowwise_adagrad_update(words, stride, dim, steps, slots, grad, lr, eps, scale, version):
    """Step of Adagrad with one sum per row, of the mean of squares, with g = scale * grad.

    state += mean(g * g); value -= lr * g / (sqrt(state) + eps); last step = version. The sum is the word after the
    value. Means are summed in float64. Moves len(slots) * (3 * dim * itemsize + 16) bytes.

    Args:
        words, stride, dim, steps, slots, grad, scale, version: as in sgd_update.
        lr: learning rate.
        eps: added to the root.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    slots, grad = check_update(words, stride, dim, 1, steps, slots, grad)
    numbers = float(lr), float(eps), float(scale), int(version)
    rowwise_adagrad_records(words, stride, steps, slots, grad, *numbers, 0, False)


@inlined
def sum_of_squares(flat, row, dim, scale):
    """Sum, in float64, of the squares of scale * flat[row : row + dim]; `row` is a uint64.

    Eight sums side by side, of every eighth square: one alone would wait for each addition.
    """
    whole = dim - dim % LANES
    total = squares_of_eights(flat, row, whole, scale)
    for j in range(whole, dim):
        total += _square(scale * flat[row + np.uint64(j)])
    return total


@inlined
def _square(g):
    return np.float64(g) * np.float64(g)


@fused_kernel
def _sparse_adam(words, stride, steps, slots, grad, weight, weight2, step_size, eps, scale, version):
    count, dim = grad.shape
    flat = grad.reshape(-1)
    dtype = words.dtype.type
    weight, weight2, eps, scale, minus = dtype(weight), dtype(weight2), dtype(eps), dtype(scale), dtype(-step_size)
    record_longs = stride * words.itemsize // 8
    for i in range(count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride, stride)
        value = np.uint64(slots[i] * stride)
        m = value + np.uint64(dim)
        v = m + np.uint64(dim)
        row = np.uint64(i * dim)
        for j in range(dim):
            at = np.uint64(j)
            g = scale * flat[row + at]
            first = words[m + at] + (g - words[m + at]) * weight
            second = words[v + at] + (g * g - words[v + at]) * weight2
            words[m + at] = first
            words[v + at] = second
            words[value + at] += minus * (first / (np.sqrt(second) + eps))
        steps[np.uint64((slots[i] + 1) * record_longs - 1)] = version


@fused_kernel
def rowwise_adagrad_records(words, stride, steps, slots, grad, lr, eps, scale, version, first, shared):
    """The kernel of `rowwise_adagrad_update`, from `slots[first]` on. Returns how many are done: all, but with
    `shared`, which locks each record while it is updated, fewer where another holds one for long."""
    count, dim = grad.shape
    flat = grad.reshape(-1)
    dtype = words.dtype.type
    minus_lr, eps, scale = dtype(-lr), dtype(eps), dtype(scale)
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
        total = words[state] + dtype(sum_of_squares(flat, row, dim, scale) / dim)
        words[state] = total
        root = np.sqrt(total) + eps
        for j in range(dim):
            words[value + np.uint64(j)] += minus_lr * (scale * flat[row + np.uint64(j)]) / root
        if shared:
            unlock_record(steps, last, version)
        else:
            steps[last] = version
    return count
