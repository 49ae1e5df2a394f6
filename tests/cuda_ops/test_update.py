"""Optimizer steps on records against torch.optim on the same rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, make_store, seeds

rates = st.sampled_from([0.01, 0.3, 1, 1e-5])


def assert_few_ulp(actual, expected, terms, ulp):
    """Compare, allowing `ulp` roundings of the largest term that entered each sum."""
    scale = np.maximum(np.abs(expected), terms)
    assert (np.abs(actual - expected) <= ulp * np.finfo(expected.dtype).eps * scale).all()


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 30), rates, st.sampled_from([1, -1, 0.25]))
def test_sgd_is_torch_sgd(seed, dtype, dim, count, lr, scale):
    rng = np.random.default_rng(seed)
    words, stride, steps = make_store(rng, count, dim, 0, dtype)
    slots = rng.permutation(count)[: rng.integers(0, count + 1)]
    grad = rng.standard_normal((len(slots), dim)).astype(dtype)
    expected = words.reshape(count, stride).copy()
    row = torch.nn.Parameter(torch.from_numpy(expected[slots, :dim]))
    row.grad = torch.from_numpy(grad) * scale
    start = np.abs(expected[slots, :dim])
    torch.optim.SGD([row], lr=lr).step()
    cuda_ops.sgd_update(words, stride, dim, steps, slots, grad, lr, scale, 77)
    records = words.reshape(count, stride)
    assert_few_ulp(records[slots, :dim], row.detach().numpy(), start, ulp=1)
    assert (steps.reshape(count, -1)[slots, -1] == 77).all()
    others = np.setdiff1d(np.arange(count), slots)
    np.testing.assert_array_equal(records[others], expected[others])


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 30), rates, st.sampled_from([1, -1, 0.25]), st.sampled_from([0, 0.1]))
def test_adagrad_is_torch_adagrad_over_steps(seed, dtype, dim, count, lr, scale, lr_decay):
    rng = np.random.default_rng(seed)
    words, stride, steps = make_store(rng, count, dim, dim, dtype)
    words.reshape(count, stride)[:, dim : 2 * dim] = 0.1
    before = words.reshape(count, stride).copy()
    slots = rng.permutation(count)[: rng.integers(0, count + 1)]
    row = torch.nn.Parameter(torch.from_numpy(before[slots, :dim]))
    optimizer = torch.optim.Adagrad([row], lr=lr, lr_decay=lr_decay, initial_accumulator_value=0.1, eps=1e-8)
    for step in range(1, 4):
        start = np.abs(row.detach().numpy()) + lr
        grad = rng.standard_normal((len(slots), dim)).astype(dtype)
        row.grad = torch.from_numpy(grad) * scale
        optimizer.step()
        clr = lr / (1 + (step - 1) * lr_decay)
        cuda_ops.adagrad_update(words, stride, dim, steps, slots, grad, clr, 1e-8, scale, step)
    records = words.reshape(count, stride)
    assert_few_ulp(records[slots, :dim], row.detach().numpy(), start, ulp=6)  # two for each of three steps
    assert_few_ulp(records[slots, dim : 2 * dim], optimizer.state[row]["sum"].numpy(), 0, ulp=3)
    assert (steps.reshape(count, -1)[slots, -1] == 3).all()
    others = np.setdiff1d(np.arange(count), slots)
    np.testing.assert_array_equal(records[others], before[others])


@settings(deadline=None)
@given(seeds, dims)
def test_adagrad_in_float64_is_the_formula(seed, dim):
    rng = np.random.default_rng(seed)
    words, stride, steps = make_store(rng, 9, dim, dim, np.float64)
    state = words.reshape(9, stride)[:, dim : 2 * dim]
    state[:] = rng.random((9, dim))
    value, state = words.reshape(9, stride)[:, :dim].copy(), state.copy()
    grad = rng.standard_normal((9, dim))
    cuda_ops.adagrad_update(words, stride, dim, steps, np.arange(9), grad, 0.1, 1e-10, 0.5, 1)
    state += (0.5 * grad) ** 2
    moved = value - 0.1 * (0.5 * grad) / (np.sqrt(state) + 1e-10)
    np.testing.assert_allclose(words.reshape(9, stride)[:, :dim], moved, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(words.reshape(9, stride)[:, dim : 2 * dim], state, rtol=1e-15)


def test_a_record_may_have_more_state_than_the_update_uses():
    words, stride, steps = make_store(np.random.default_rng(), 2, 3, 12, np.float32)
    before = words.reshape(2, stride).copy()
    cuda_ops.adagrad_update(words, stride, 3, steps, np.array([1]), np.ones((1, 3), np.float32), 0.1, 1e-10, 1, 4)
    np.testing.assert_array_equal(words.reshape(2, stride)[:, 6:-2], before[:, 6:-2])


@pytest.mark.parametrize("bad", [-1, 2, 2**62])
def test_a_slot_outside_is_an_error_before_anything_is_written(bad):
    words, stride, steps = make_store(np.random.default_rng(), 2, 3, 3, np.float64)
    before = words.copy()
    with pytest.raises(IndexError, match=rf"slots\[1\] is {bad}, which is not in \[0, 2\)"):
        cuda_ops.adagrad_update(words, stride, 3, steps, np.array([0, bad]), np.ones((2, 3)), 0.1, 1e-10, 1, 1)
    np.testing.assert_array_equal(words, before)


def test_shapes_that_do_not_fit():
    words, stride, steps = make_store(np.random.default_rng(), 2, 3, 3, np.float32)
    slots, grad = np.array([0, 1]), np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"grad must have shape \(2, 3\), got \(1, 3\)"):
        cuda_ops.sgd_update(words, stride, 3, steps, slots, grad[:1], 0.1, 1, 1)
    with pytest.raises(TypeError, match="grad must be float32, got float64"):
        cuda_ops.sgd_update(words, stride, 3, steps, slots, grad.astype(np.float64), 0.1, 1, 1)
    with pytest.raises(ValueError, match="do not lie in a record of 4 words"):
        cuda_ops.adagrad_update(words[:12], 6, 3, steps[:6], slots, grad, 0.1, 1e-10, 1, 1)
    with pytest.raises(ValueError, match="stride is 5 words of 4 bytes"):
        cuda_ops.sgd_update(words, 5, 3, steps, slots, grad, 0.1, 1, 1)
    with pytest.raises(ValueError, match="steps must have shape"):
        cuda_ops.sgd_update(words, stride, 3, steps[:1], slots, grad, 0.1, 1, 1)
