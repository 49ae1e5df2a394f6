"""Optimizer steps on records in device memory, against torch.optim on the same rows."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaloader import RowwiseAdagrad
from cuda_ops.cuda.sparse_update import rowwise_adagrad_update, sparse_adam_update
from cuda_ops.cuda.update import adagrad_update, sgd_update
from tests.cuda_ops.cuda.device import counts, dims, drawn, dtypes, host, make_store, on_device, seeds, some_slots

scales = st.sampled_from([1, -1, 0.25])
LR, EPS, BETAS = 0.1, 1e-6, (0.8, 0.95)


def sparse(slots, grad, count):
    return torch.sparse_coo_tensor(torch.from_numpy(slots[None]), torch.from_numpy(grad), (count, grad.shape[1]))


class SGD:
    words = staticmethod(lambda dim: 0)
    under_torch = staticmethod(lambda rows: torch.optim.SGD([rows], lr=LR))
    state_names = ()

    @staticmethod
    def step(store, dim, slots, grad, scale, t):
        sgd_update(store[0], store[1], dim, store[2], slots, grad, LR, scale, t)


class Adagrad:
    words = staticmethod(lambda dim: dim)
    under_torch = staticmethod(lambda rows: torch.optim.Adagrad([rows], lr=LR, eps=EPS))
    state_names = ("sum",)

    @staticmethod
    def step(store, dim, slots, grad, scale, t):
        adagrad_update(store[0], store[1], dim, store[2], slots, grad, LR, EPS, scale, t)


class SparseAdam:
    words = staticmethod(lambda dim: 2 * dim)
    under_torch = staticmethod(lambda rows: torch.optim.SparseAdam([rows], lr=LR, betas=BETAS, eps=EPS))
    state_names = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def step(store, dim, slots, grad, scale, t):
        step_size = LR * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        sparse_adam_update(store[0], store[1], dim, store[2], slots, grad, BETAS, step_size, EPS, scale, t)


class Rowwise:
    words = staticmethod(lambda dim: 1)
    under_torch = staticmethod(lambda rows: RowwiseAdagrad([rows], lr=LR, eps=EPS))
    state_names = ("sum",)

    @staticmethod
    def step(store, dim, slots, grad, scale, t):
        rowwise_adagrad_update(store[0], store[1], dim, store[2], slots, grad, LR, EPS, scale, t)


@pytest.mark.parametrize("kind", [SGD, Adagrad, SparseAdam, Rowwise])
@drawn
@given(seeds, dtypes, dims, counts, scales)
def test_records_after_some_steps_are_those_of_torch(kind, seed, dtype, dim, count, scale):
    rng = np.random.default_rng(seed)
    count, state_words = count + 1, kind.words(dim)
    words, stride, steps, records = make_store(rng, count, dim, state_words, dtype)
    records[:, dim : dim + state_words] = 0
    words.copy_(on_device(records.reshape(-1)))
    rows = torch.nn.Parameter(torch.from_numpy(records[:, :dim].copy()))
    optimizer = kind.under_torch(rows)
    versions = records.view(np.int64)[:, -1].copy()
    for t in range(1, 4):
        slots = some_slots(rng, count)
        grad = rng.standard_normal((len(slots), dim)).astype(records.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.grad = sparse(slots, grad * records.dtype.type(scale), count)
            optimizer.step()
        kind.step((words, stride, steps), dim, on_device(slots), on_device(grad), scale, t)
        versions[slots] = t
    after = host(words).reshape(count, stride)
    limit = 5e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(after[:, :dim], rows.detach().numpy(), rtol=limit, atol=limit)
    at = dim
    for name in kind.state_names:
        held = optimizer.state[rows][name].numpy().reshape(count, -1)
        np.testing.assert_allclose(after[:, at : at + held.shape[1]], held, rtol=limit, atol=limit)
        at += held.shape[1]
    np.testing.assert_array_equal(after[:, at : stride - 8 // dtype.itemsize], records[:, at : -(8 // dtype.itemsize)])
    np.testing.assert_array_equal(after.view(np.int64)[:, -1], versions)


@pytest.mark.parametrize("kind", [SGD, Adagrad, SparseAdam, Rowwise])
def test_a_slot_outside_is_an_error_before_anything_is_written(kind):
    words, stride, steps, records = make_store(np.random.default_rng(), 2, 3, kind.words(3), torch.float64)
    grad = on_device(np.ones((2, 3)))
    with pytest.raises(IndexError, match=r"slots\[1\] is 2, which is not in \[0, 2\)"):
        kind.step((words, stride, steps), 3, on_device(np.array([0, 2])), grad, 1, 1)
    with pytest.raises(ValueError, match=r"grad must have shape \(1, 3\), got \(2, 3\)"):
        kind.step((words, stride, steps), 3, on_device(np.array([0])), grad, 1, 1)
    with pytest.raises(ValueError, match="steps must have shape"):
        kind.step((words, stride, steps[1:]), 3, on_device(np.array([0, 1])), grad, 1, 1)
    np.testing.assert_array_equal(host(words).reshape(records.shape), records)
