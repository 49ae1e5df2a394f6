"""Bags of a managed table against plain PyTorch's: ragged, empty and padded ones, weights, second derivatives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaloader.lookups import bags
from adaloader.lookups.slabs import Slab


def slab_of(rows):
    """A slab of these rows, of no table."""
    return Slab(np.arange(len(rows)), None, rows, None, {"backward": 0.0})


def cases(rng, dtype):
    """Arguments of embedding_bag after the rows, at random."""
    n, bag_count = int(rng.integers(0, 60)), int(rng.integers(1, 12))
    positions = torch.from_numpy(rng.integers(0, 9, n))
    begins = np.sort(np.r_[0, rng.integers(0, n + 1, bag_count - 1)])
    weights = torch.from_numpy(rng.standard_normal(n)).to(dtype)
    for mode in ("sum", "mean"):
        for padding in (None, 4):
            for last in (False, True):
                ends = np.r_[begins, n] if last else begins
                for used in (None, weights) if mode == "sum" else (None,):
                    options = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
                    yield positions, torch.from_numpy(ends), options | {"per_sample_weights": used}
            matrix = torch.from_numpy(rng.integers(0, 9, (bag_count, 5)))
            used = torch.from_numpy(rng.standard_normal((bag_count, 5))).to(dtype) if mode == "sum" else None
            options = {"mode": mode, "padding_idx": padding, "include_last_offset": False}
            yield matrix, None, options | {"per_sample_weights": used}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bags_and_their_gradients_are_torchs(dtype):
    rng = np.random.default_rng()
    limits = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for positions, offsets, options in cases(rng, dtype):
        rows = torch.from_numpy(rng.standard_normal((9, 7))).to(dtype).requires_grad_()
        ours = bags.embedding_bag(slab_of(rows), rows, positions, offsets, **options)
        expected = F.embedding_bag(positions, rows, offsets, **options)
        assert ours.grad_fn.name() == "_BagsBackward" and torch.equal(ours, expected)
        grad = torch.from_numpy(rng.standard_normal(ours.shape)).to(dtype)
        (by_us,) = torch.autograd.grad(ours, rows, grad, retain_graph=True)
        (by_torch,) = torch.autograd.grad(expected, rows, grad)
        torch.testing.assert_close(by_us, by_torch, **limits)
        grad.requires_grad_()
        (differentiable,) = torch.autograd.grad(ours, rows, grad, create_graph=True)
        torch.testing.assert_close(differentiable, by_torch, **limits)
        direction = torch.randn_like(rows)
        (second,) = torch.autograd.grad(differentiable, grad, direction)  # the bags of the direction
        torch.testing.assert_close(second, F.embedding_bag(positions, direction, offsets, **options), **limits)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "max"},
        {"per_sample_weights": torch.ones(4, requires_grad=True)},
        {"offsets": torch.tensor([0, 1, 3]), "include_last_offset": True},
    ],
)
def test_what_is_left_to_torch(change):
    rows = torch.randn(5, 3, requires_grad=True)
    options = {"mode": "sum", "per_sample_weights": None, "include_last_offset": False, "padding_idx": None} | change
    offsets = options.pop("offsets", torch.tensor([0, 1, 4]))
    positions = torch.tensor([0, 4, 4, 1])

    def outcome(function):
        try:
            return function()
        except RuntimeError as error:
            return str(error)

    ours = outcome(lambda: bags.embedding_bag(slab_of(rows), rows, positions, offsets, **options))
    expected = outcome(lambda: F.embedding_bag(positions, rows, offsets, **options))
    assert type(ours) is type(expected)
    if isinstance(ours, torch.Tensor):
        assert ours.grad_fn.name() == expected.grad_fn.name() and torch.equal(ours, expected)
    else:
        assert ours == expected
