"""Dense optimizers on records, step by step, against torch.optim on whole tables; `tests/pm` has the long gaps."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dtypes, seeds

dims = st.one_of(st.integers(1, 20), st.sampled_from([31, 64, 70]))
NEVER_CUT_SHORT = np.array([[np.inf, 0.0, 1.0, 0.0]])
# Per kind: the optimizer, the names of its state in the order of the record, the scalars of step t.
ADAM = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-3}


def adam_scalars(t, lr=0.03, beta1=0.8, beta2=0.9):
    return [1 - beta1, beta2, 1 - beta2, 1e-3, 0.0, 1.0, -lr / (1 - beta1**t), (1 - beta2**t) ** 0.5]


def momentum_scalars(t):
    return [0.1, 0.7, 1.0 if t == 1 else 0.6, 0.2, 0.0]


KINDS = {
    "adam": (torch.optim.Adam, ADAM, ["exp_avg", "exp_avg_sq"], adam_scalars),
    "amsgrad": (
        torch.optim.Adam,
        {**ADAM, "amsgrad": True},
        ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        adam_scalars,
    ),
    "sgd_momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "dampening": 0.4, "weight_decay": 0.2},
        ["momentum_buffer"],
        momentum_scalars,
    ),
    "rmsprop_centered_momentum": (
        torch.optim.RMSprop,
        {"lr": 0.1, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.2, "momentum": 0.7, "centered": True},
        ["square_avg", "momentum_buffer", "grad_avg"],
        lambda t: [0.1, 0.8, 1 - 0.8, 0.1, 0.2, 0.7],
    ),
    "adadelta": (
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.2},
        ["square_avg", "acc_delta"],
        lambda t: [0.5, 0.8, 1 - 0.8, 1e-3, 0.2, 0.0],
    ),
}


def zero_state_store(rng, count, dim, parts, dtype):
    longs = 8 // np.dtype(dtype).itemsize
    stride = dim * (1 + parts)
    stride += -stride % longs + 2 * longs
    words = np.zeros(count * stride, dtype)
    words.reshape(count, stride)[:, :dim] = rng.standard_normal((count, dim))
    return words, stride, words.view(np.int64)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(seeds, dtypes, dims)
def test_rows_touched_now_and_then_equal_all_rows_under_torch(kind, seed, dtype, dim):
    make, options, names, scalars = KINDS[kind]
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    words, stride, steps = zero_state_store(rng, count, dim, len(names), dtype)
    records = words.reshape(count, stride)
    rows = torch.nn.Parameter(torch.from_numpy(records[:, :dim].copy()))
    optimizer = make([rows], **options)
    history = np.zeros((12, cuda_ops.history_columns(kind)[1]))
    for t in range(1, 13):
        entry = scalars(t)
        history[t - 1, : len(entry)] = entry
        touched = rng.permutation(count)[: rng.integers(0, count + 1)]
        grad = rng.standard_normal((len(touched), dim)).astype(dtype)
        whole = np.zeros((count, dim), dtype)
        whole[touched] = -0.5 * grad
        rows.grad = torch.from_numpy(whole)
        optimizer.step()
        cuda_ops.advance(kind, words, stride, dim, steps, touched, grad, history[:t], NEVER_CUT_SHORT, -0.5, 100 + t)
        marks = steps.reshape(count, -1)[:, -2:]
        assert (marks[touched] == [cuda_ops.caught_up_word(t), 100 + t]).all()
    cuda_ops.advance(kind, words, stride, dim, steps, np.arange(count), None, history, NEVER_CUT_SHORT, 1.0, 0)
    limit = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(records[:, :dim], rows.detach().numpy(), rtol=limit, atol=limit)
    for part, name in enumerate(names, 1):
        expected = optimizer.state[rows][name].numpy()
        np.testing.assert_allclose(records[:, part * dim : (part + 1) * dim], expected, rtol=limit, atol=limit)
    before = words.copy()
    cuda_ops.advance(kind, words, stride, dim, steps, np.arange(count), None, history, NEVER_CUT_SHORT, 1.0, 0)
    np.testing.assert_array_equal(words, before)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_neither_kept_nor_let_go_of(kind):
    names, scalars = KINDS[kind][2:]
    words, stride, steps = zero_state_store(np.random.default_rng(), 40, 3, len(names), np.float32)
    history = np.zeros((50, cuda_ops.history_columns(kind)[1]))
    for t in range(1, 51):
        history[t - 1, : len(scalars(t))] = scalars(t)
    slots, grad, bounds = np.arange(40), np.ones((40, 3), np.float32), NEVER_CUT_SHORT.copy()
    arrays = words, steps, slots, grad, history, bounds
    before = [sys.getrefcount(array) for array in arrays]
    for stop in range(1, 51, 7):
        cuda_ops.advance(kind, words, stride, 3, steps, slots[:stop], None, history[:stop], bounds, 1.0, 0)
        cuda_ops.advance(kind, words, stride, 3, steps, slots, grad, history, bounds, 1.0, stop)
        steps.reshape(40, -1)[:, -2:] = 0
    assert [sys.getrefcount(array) for array in arrays] == before


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    words, stride, steps = zero_state_store(np.random.default_rng(), 2, 3, 2, np.float32)
    before = words.copy()
    history = np.zeros((1, cuda_ops.history_columns("adam")[1]))
    slots, grad = np.array([0, 1]), np.ones((2, 3), np.float32)

    def advance(kind="adam", slots=slots, grad=grad, history=history, dim=3):
        cuda_ops.advance(kind, words, stride, dim, steps, slots, grad, history, NEVER_CUT_SHORT, 1.0, 1)

    with pytest.raises(IndexError, match=r"slots\[1\] is 2, which is not in \[0, 2\)"):
        advance(slots=np.array([0, 2]))
    with pytest.raises(ValueError, match=r"grad must have shape \(2, 3\), got \(1, 3\)"):
        advance(grad=grad[:1])
    with pytest.raises(TypeError, match="grad must be float32, got float64"):
        advance(grad=grad.astype(np.float64))
    with pytest.raises(ValueError, match=r"history must be float64 \[steps, 15\], got float64 \[1, 3\]"):
        advance(history=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="history is empty"):
        advance(history=history[:0])
    with pytest.raises(ValueError, match="do not lie in a record"):
        advance("amsgrad")
    np.testing.assert_array_equal(words, before)
    advance(grad=None, history=history[:0])
    np.testing.assert_array_equal(words, before)
