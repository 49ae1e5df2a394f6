"""The loop over records of half values, compiled for each optimizer, format and kind of rounding by itself.

What is known when it is compiled is not chosen for each element, and so a row's step and its rounding are one loop.
"""

from functools import cache

import numpy as np

from cuda_ops.cpu.half_steps import ADAGRAD, ROWWISE_ADAGRAD, SGD, SPARSE_ADAM, element_step
from cuda_ops.cpu.halves import at_random, to_nearest, widen
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, part, touch_all
from cuda_ops.cpu.philox import fill_words
from cuda_ops.cpu.sparse_update import sum_of_squares


@cache
def update_of(optimizer, bfloat, random):
    """Return the kernel of an optimizer of half_steps.py, for bfloat16 or float16, which rounds at random or not.

    Its arguments are `halves` as int16, words, steps, slots, grad, keys, stride, numbers (minus the learning rate, eps,
    the two weights, scale), seed, version, and (drawn, counters) of `philox.room_for`.
    """

    # It closes over numbers alone: a closure that holds another compiled function is never found again on disk.
    @fused_kernel
    def update(halves, words, steps, slots, grad, keys, stride, numbers, seed, version, drawn, counters):
        minus_lr, eps, weight, weight2, scale = numbers
        dim = grad.shape[1]
        blocks = (dim + 3) // 4
        words_of = np.uint64(version), np.uint64(seed), np.uint64(seed) >> np.uint64(32)
        begin = end = 0  # of the rows whose random words are drawn
        for i in range(slots.size):
            if i + ROWS_AHEAD < slots.size:
                touch_all(words, slots[i + ROWS_AHEAD] * stride, stride)
            if random and i == end:
                begin = i
                end += fill_words(drawn, counters, keys, i, blocks, *words_of)
            bits = part(drawn, 4 * (i - begin) * blocks, dim)
            value, row = part(halves, 2 * slots[i] * stride, dim), part(grad, i * dim, dim)
            state = slots[i] * stride + (dim + 1) // 2
            first, second = part(words, state, dim), part(words, state + dim, dim)
            if optimizer == ROWWISE_ADAGRAD:
                total = words[state] + np.float32(sum_of_squares(row, np.uint64(0), dim, scale) / dim)
                words[state] = total
            for j in range(dim):
                at = np.uint64(j)
                before, g = widen(value[at], bfloat), scale * row[at]
                if optimizer == SGD:
                    after, _, _ = element_step(SGD, before, g, g, g, minus_lr, eps, weight, weight2)
                elif optimizer == ROWWISE_ADAGRAD:
                    after, _, _ = element_step(optimizer, before, total, g, g, minus_lr, eps, weight, weight2)
                elif optimizer == ADAGRAD:
                    after, first[at], _ = element_step(
                        optimizer, before, first[at], g, g, minus_lr, eps, weight, weight2
                    )
                else:
                    after, first[at], second[at] = element_step(
                        SPARSE_ADAM, before, first[at], second[at], g, minus_lr, eps, weight, weight2
                    )
                value[at] = at_random(after, bfloat, bits[at]) if random else to_nearest(after, bfloat)
            steps[(slots[i] + 1) * (stride // 2) - 1] = version

    return update
