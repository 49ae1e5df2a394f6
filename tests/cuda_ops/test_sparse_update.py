"""SparseAdam and the rowwise Adagrad on records, against optimizers on whole tables."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from adaloader import RowwiseAdagrad
from tests.cuda_ops.records import dims, dtypes, make_store, seeds

scales = st.sampled_from([1, -1, 0.25])


def sparse(touched, grad, count):
    return torch.sparse_coo_tensor(torch.from_numpy(touched[None]), torch.from_numpy(grad), (count, grad.shape[1]))


def make(rng, count, dim, state_words, dtype):
    words, stride, steps = make_store(rng, count, dim, state_words, dtype)
    words.reshape(count, stride)[:, dim : dim + state_words] = 0
    return words, stride, steps


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 20), scales)
def test_sparse_adam_is_torch_sparse_adam(seed, dtype, dim, count, scale):
    rng = np.random.default_rng(seed)
    words, stride, steps = make(rng, count, dim, 2 * dim, dtype)
    rows = torch.nn.Parameter(torch.from_numpy(words.reshape(count, stride)[:, :dim].copy()))
    optimizer = torch.optim.SparseAdam([rows], lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for t in range(1, 5):
        touched = rng.permutation(count)[: rng.integers(0, count + 1)]
        grad = rng.standard_normal((len(touched), dim)).astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.grad = sparse(touched, grad * dtype(scale), count)
            optimizer.step()
        step_size = 0.1 * math.sqrt(1 - 0.95**t) / (1 - 0.8**t)
        cuda_ops.sparse_adam_update(words, stride, dim, steps, touched, grad, (0.8, 0.95), step_size, 1e-6, scale, t)
        assert (steps.reshape(count, -1)[touched, -1] == t).all()
    limit = 2e-6 if dtype == np.float32 else 1e-14
    records = words.reshape(count, stride)
    np.testing.assert_allclose(records[:, :dim], rows.detach().numpy(), rtol=limit, atol=limit)
    for at, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        held = optimizer.state[rows][name].numpy()
        np.testing.assert_allclose(records[:, at * dim : (at + 1) * dim], held, rtol=limit, atol=limit)


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 20), scales, st.booleans())
def test_rowwise_adagrad_is_our_optimizer(seed, dtype, dim, count, scale, dense):
    rng = np.random.default_rng(seed)
    words, stride, steps = make(rng, count, dim, 1, dtype)
    rows = torch.nn.Parameter(torch.from_numpy(words.reshape(count, stride)[:, :dim].copy()))
    optimizer = RowwiseAdagrad([rows], lr=0.2, eps=1e-5)
    for t in range(1, 5):
        touched = rng.permutation(count)[: rng.integers(0, count + 1)]
        grad = rng.standard_normal((len(touched), dim)).astype(dtype)
        rows.grad = sparse(touched, grad * dtype(scale), count)
        if dense:
            rows.grad = rows.grad.to_dense()
        optimizer.step()
        cuda_ops.rowwise_adagrad_update(words, stride, dim, steps, touched, grad, 0.2, 1e-5, scale, t)
        assert (steps.reshape(count, -1)[touched, -1] == t).all()
    limit = 5e-6 if dtype == np.float32 else 1e-13
    records = words.reshape(count, stride)
    np.testing.assert_allclose(records[:, :dim], rows.detach().numpy(), rtol=limit, atol=limit)
    np.testing.assert_allclose(records[:, dim], optimizer.state[rows]["sum"].numpy(), rtol=limit)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_rowwise_adagrad_is_its_formula(sparse_grad):
    generator = torch.Generator().manual_seed(3)
    table = torch.nn.Embedding(6, 4, sparse=sparse_grad).double()
    bias = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    number = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = RowwiseAdagrad([table.weight, bias, number], lr=0.5, initial_accumulator_value=0.3)
    expected, total = table.weight.detach().clone(), torch.full((6,), 0.3, dtype=torch.float64)
    of_bias = torch.full((3,), 0.3, dtype=torch.float64)
    factors = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        ((table(torch.tensor([1, 4, 1])) * factors).sum() + (bias * factors[:, 0]).sum() + number).backward()
        optimizer.step()
        grad = torch.zeros_like(expected).index_add_(0, torch.tensor([1, 4, 1]), factors)
        total += grad.square().mean(1)
        expected -= 0.5 * grad / (total.sqrt() + 1e-10)[:, None]
        of_bias += factors[:, 0].square()
    torch.testing.assert_close(table.weight.detach(), expected)
    torch.testing.assert_close(optimizer.state[bias]["sum"], of_bias)
    assert optimizer.state[table.weight]["sum"].shape == (6,) and float(optimizer.state[number]["sum"]) == 3.3


@pytest.mark.parametrize("bad", [{"lr": -0.1}, {"eps": -1.0}, {"initial_accumulator_value": -1.0}])
def test_rowwise_adagrad_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be 0 or more, got -"):
        RowwiseAdagrad([torch.nn.Parameter(torch.ones(2))], **bad)
