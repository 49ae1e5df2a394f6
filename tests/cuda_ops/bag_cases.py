"""Ragged bags for the tests of this folder, and what torch.nn.functional.embedding_bag makes of them."""

import numpy as np
import torch
import torch.nn.functional as F


class Bags:
    """Random bags of lookups in a slab: some empty, some long, some of padding alone.

    Args:
        mode: "sum", "mean", "max" or "weighted" (a sum with a weight for each lookup).
    """

    def __init__(self, rng, mode, dtype, dim, most_bags=30, most_lookups=12):
        self.mode, self.weighted = ("sum" if mode == "weighted" else mode), mode == "weighted"
        rows, bags = int(rng.integers(1, 20)), int(rng.integers(0, most_bags))
        sizes = rng.integers(0, most_lookups + 1, bags) * rng.integers(0, 2, bags)
        self.offsets = torch.from_numpy(np.cumsum(sizes) - sizes)
        n = int(sizes.sum())
        self.slab = torch.from_numpy(rng.standard_normal((rows, dim))).to(dtype)
        self.positions = torch.from_numpy(rng.integers(0, rows, n))
        self.skip = int(rng.integers(0, rows)) if rng.integers(2) else -1
        self.weights = torch.from_numpy(rng.standard_normal(n)).to(dtype) if self.weighted else None
        self.grad = torch.from_numpy(rng.standard_normal((bags, dim))).to(dtype)

    def under_torch(self):
        """Return (reduced bags, gradient of the slab) of PyTorch."""
        slab = self.slab.clone().requires_grad_()
        options = {"per_sample_weights": self.weights, "padding_idx": self.skip if self.skip >= 0 else None}
        reduced = F.embedding_bag(self.positions, slab, self.offsets, mode=self.mode, **options)
        reduced.backward(self.grad)
        return reduced.detach(), slab.grad

    def under(self, functions, device="cpu"):
        """Return (reduced bags, gradient of the slab) of `functions` (`cuda_ops`, or the device's own module)."""
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        slab, positions, offsets, weights = map(move, (self.slab, self.positions, self.offsets, self.weights))
        reduced, chosen = functions.reduce_bags(slab, positions, offsets, self.mode, weights, self.skip)
        out = torch.full_like(slab, torch.nan)
        rest = (self.mode, weights, self.skip, chosen)
        assert functions.bags_backward(move(self.grad), positions, offsets, out, *rest).data_ptr() == out.data_ptr()
        return reduced.cpu(), out.cpu()


def limits(dtype, terms=50):
    """Tolerances of sums of `terms` normal values, made in any order."""
    limit = (1e-5 if dtype == torch.float32 else 1e-12) * max(1.0, terms / 50)
    return {"rtol": limit, "atol": limit}
