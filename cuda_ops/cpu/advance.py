"""Dense optimizers on records, lazily: catch rows up with the steps that they missed, and take the next one."""

import numpy as np

from cuda_ops.cpu import adam, adam_steps, momentum, root_mean_square
from cuda_ops.cpu.checks import float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cpu.gaps import LOGS

# Per kind: parts of state (of `dim` words each), columns of its history.
LAYOUTS = {
    "sgd": (0, momentum.COLUMNS),
    "sgd_momentum": (1, momentum.COLUMNS),
    "adagrad": (1, root_mean_square.COLUMNS),
    "rmsprop": (1, root_mean_square.COLUMNS),
    "rmsprop_momentum": (2, root_mean_square.COLUMNS),
    "rmsprop_centered": (2, root_mean_square.COLUMNS),
    "rmsprop_centered_momentum": (3, root_mean_square.COLUMNS),
    "adadelta": (2, root_mean_square.COLUMNS),
    "adam": (2, adam.COLUMNS),
    "amsgrad": (3, adam.COLUMNS),
    "nadam": (2, adam.COLUMNS),
    "radam": (2, adam.COLUMNS),
    "adamax": (2, adam.COLUMNS),
}
ADAM_KINDS = {
    "adam": adam_steps.ADAM,
    "amsgrad": adam_steps.AMSGRAD,
    "nadam": adam_steps.NADAM,
    "radam": adam_steps.RADAM,
    "adamax": adam_steps.ADAMAX,
}
SQUARE_KINDS = {"adagrad": root_mean_square.ADAGRAD, "adadelta": root_mean_square.ADADELTA}


def history_columns(kind):
    """Return (columns that hold scalars, columns in all) of the history of optimizer `kind`."""
    columns = LAYOUTS[kind][1]
    return columns - LOGS - 1, columns


def caught_up_word(count):
    """Return the word of a record whose value and state are those after step `count` of its table's history."""
    return count << 32 | count


def advance(kind, words, stride, dim, steps, slots, grad, history, bounds, scale, version, states=True):
    """Bring records to the last step of a history; with `grad`, as a step that has a gradient of them.

    The arithmetic is that of torch.optim's single-tensor implementations in the value dtype, step by step. It is cut
    short, or replaced by a product, only where that does not change a value (gaps.py, and the file of each optimizer,
    say why). Without coupled weight decay a row takes a few hundred iterations at most after it was last touched, with
    it as many as it has missed steps. To the bit, what a record becomes depends on its gradients and on when it was
    caught up with its state, not on when its value alone was.

    Args:
        kind: "sgd" (weight decay alone), "sgd_momentum", "adagrad", "rmsprop" (also "_centered", "_momentum",
            "_centered_momentum"), "adadelta", "adam", "amsgrad", "nadam", "radam", "adamax".
        words: [any] float32 or float64, the record store (see rows.py), updated in place: `dim` words of value, the
            parts of the state, and before the last-step word an int64 with the steps that the record is caught up to.
        stride: words per record.
        dim: words of value.
        steps: [words.nbytes // 8] int64 view of the same bytes.
        slots: [n] int64, distinct.
        grad: [n, dim], dtype of `words`; None to catch up only.
        history: [steps, columns] float64, the scalars of each step; with `grad` the last is the one to take now.
        bounds: [regimes, 4] float64, by the last column of the history (gaps.py).
        scale: factor of the gradient (negative to maximise).
        version: int, written to the last-step word where a gradient is applied.
        states: whether the state must be that of the last step too, not only the value.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    parts, columns = LAYOUTS[kind]
    count = record_count(words, stride)
    if words.itemsize * stride % 8:
        raise ValueError(f"stride is {stride} words of {words.itemsize} bytes; a record must be a multiple of 8 bytes")
    word_range(stride - 16 // words.itemsize, 0, dim + parts * dim)
    writable(steps, "steps", np.int64, (words.nbytes // 8,))
    if history.dtype != np.float64 or history.ndim != 2 or history.shape[1] != columns:
        raise ValueError(f"history must be float64 [steps, {columns}], got {history.dtype} {list(history.shape)}")
    slots = int_vector(slots, "slots")
    in_range(slots, count, "slots")
    stepping = grad is not None
    if stepping:
        grad = float_matrix(grad, "grad", words.dtype)
        if grad.shape != (slots.size, dim):
            raise ValueError(f"grad must have shape {(slots.size, dim)}, got {grad.shape}")
        if not len(history):
            raise ValueError("history is empty: a step with a gradient needs its scalars there")
    elif not len(history):
        return
    else:
        grad = np.empty((0, dim), words.dtype)
    if bounds.dtype != np.float64 or bounds.ndim != 2 or bounds.shape[1] != 4:
        raise ValueError(f"bounds must be float64 [regimes, 4], got {bounds.dtype} {list(bounds.shape)}")
    zeros = np.zeros(dim, words.dtype)
    rest = (slots, grad, zeros, stepping, history, bounds, float(scale), int(version), bool(stepping or states))
    if kind in ADAM_KINDS:
        adam.advance(ADAM_KINDS[kind], words, stride, dim, steps, *rest)
    elif kind.startswith("sgd"):
        momentum.advance(words, stride, dim, steps, parts, *rest)
    else:
        number = SQUARE_KINDS.get(kind, root_mean_square.RMSPROP)
        buffered, centered = int(kind.endswith("momentum")), int("centered" in kind)
        root_mean_square.advance(number, words, stride, dim, steps, (buffered, centered), *rest)
