"""Steps of one row under Adam and its relatives, in the order of operations of torch.optim.

Adam and AdamW: Kingma, Ba 2015 and Loshchilov, Hutter 2019; AMSGrad: Reddi, Kale, Kumar 2018; NAdam: Dozat 2016;
RAdam: Liu et al. 2020; Adamax: Kingma, Ba 2015.

Each function takes the steps [start, stop) of the history one after the other, all with the same gradient: zeros,
for as many as were missed, or that of one step. (Calls, and views of the history, would cost more than a step.)

Columns of the history, for all of them: the weight of the gradient in the first moment (1 - beta1), beta2,
1 - beta2, eps, coupled weight decay, the factor of decoupled decay, the factor of the first moment in the update, and
up to three numbers of the optimizer's own.
"""

import numpy as np

from cuda_ops.cpu.kernels import inlined

FIRST_WEIGHT, BETA2, SECOND_WEIGHT, EPS, WEIGHT_DECAY, VALUE_FACTOR, FIRST_FACTOR, OWN, OWN_2, OWN_3 = range(10)
ADAM, AMSGRAD, NADAM, RADAM, ADAMAX = range(5)


@inlined
def first_moment(m, g, weight, rest):
    """As torch.lerp(m, g, weight), which is written so that it ends at g; `rest` is 1 - weight."""
    return m + weight * (g - m) if weight < 0.5 else g - (g - m) * rest


@inlined
def adam(value, m, v, largest, grad, scale, history, start, stop, keeps_largest):
    """Own number: the root of the second bias correction."""
    dtype = value.dtype.type
    for at in range(start, stop):
        weight, beta2, weight2 = (
            dtype(history[at, FIRST_WEIGHT]),
            dtype(history[at, BETA2]),
            dtype(history[at, SECOND_WEIGHT]),
        )
        eps, decay, kept = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY]), dtype(history[at, VALUE_FACTOR])
        factor, correction = dtype(history[at, FIRST_FACTOR]), dtype(history[at, OWN])
        rest = dtype(1) - weight
        for j in range(value.size):
            x = value[j] * kept
            g = scale * grad[j]
            if decay != 0:
                g += decay * x
            first = first_moment(m[j], g, weight, rest)
            second = v[j] * beta2 + weight2 * g * g
            m[j] = first
            v[j] = second
            if keeps_largest:
                second = max(largest[j], second)
                largest[j] = second
            value[j] = x + factor * first / (np.sqrt(second) / correction + eps)


@inlined
def nadam(value, m, v, grad, scale, history, start, stop):
    """Own numbers: the second bias correction; the factor of the gradient in the update."""
    dtype = value.dtype.type
    for at in range(start, stop):
        weight, beta2, weight2 = (
            dtype(history[at, FIRST_WEIGHT]),
            dtype(history[at, BETA2]),
            dtype(history[at, SECOND_WEIGHT]),
        )
        eps, decay, kept = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY]), dtype(history[at, VALUE_FACTOR])
        factor, correction, grad_factor = (
            dtype(history[at, FIRST_FACTOR]),
            dtype(history[at, OWN]),
            dtype(history[at, OWN_2]),
        )
        rest = dtype(1) - weight
        for j in range(value.size):
            x = value[j] * kept
            g = scale * grad[j]
            if decay != 0:
                g += decay * x
            first = first_moment(m[j], g, weight, rest)
            second = v[j] * beta2 + weight2 * g * g
            m[j] = first
            v[j] = second
            root = np.sqrt(second / correction) + eps
            x += grad_factor * g / root
            value[j] = x + factor * first / root


@inlined
def radam(value, m, v, grad, scale, history, start, stop):
    """Own numbers: the first bias correction; the root of the second; the rectification, 0 for none.

    The factor of the first moment is lr.
    """
    dtype = value.dtype.type
    for at in range(start, stop):
        weight, beta2, weight2 = (
            dtype(history[at, FIRST_WEIGHT]),
            dtype(history[at, BETA2]),
            dtype(history[at, SECOND_WEIGHT]),
        )
        eps, decay, kept = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY]), dtype(history[at, VALUE_FACTOR])
        lr, correction, root2, rectification = (
            dtype(history[at, FIRST_FACTOR]),
            dtype(history[at, OWN]),
            dtype(history[at, OWN_2]),
            dtype(history[at, OWN_3]),
        )
        rectified = history[at, OWN_3] > 0
        rest = dtype(1) - weight
        for j in range(value.size):
            x = value[j] * kept
            g = scale * grad[j]
            if decay != 0:
                g += decay * x
            first = first_moment(m[j], g, weight, rest)
            second = v[j] * beta2 + weight2 * g * g
            m[j] = first
            v[j] = second
            move = first / correction * lr
            if rectified:
                move = move * (root2 / (np.sqrt(second) + eps)) * rectification
            value[j] = x - move


@inlined
def adamax(value, m, largest, grad, scale, history, start, stop):
    """`largest` is the exponentially weighted infinity norm."""
    dtype = value.dtype.type
    for at in range(start, stop):
        weight, beta2 = dtype(history[at, FIRST_WEIGHT]), dtype(history[at, BETA2])
        eps, decay, factor = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY]), dtype(history[at, FIRST_FACTOR])
        rest = dtype(1) - weight
        for j in range(value.size):
            g = scale * grad[j]
            if decay != 0:
                g += decay * value[j]
            first = first_moment(m[j], g, weight, rest)
            norm = max(largest[j] * beta2, abs(g) + eps)
            m[j] = first
            largest[j] = norm
            value[j] += factor * first / norm
