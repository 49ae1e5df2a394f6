"""Records of half values for the tests of this folder, and what an optimizer in float32 makes of them."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

half_dtypes = st.sampled_from([torch.float16, torch.bfloat16])
LR, EPS, BETAS = 0.1, 1e-6, (0.8, 0.95)


class HalfStore:
    """Records on a device: values of a half dtype, float32 state, last step; rows at random 16-byte aligned or not.

    `functions` has the update functions by name (`cuda_ops`, or the device's own module).
    """

    def __init__(self, rng, functions, optimizer, dtype, dim, device="cpu"):
        self.functions, self.optimizer, self.dtype, self.dim = functions, optimizer, dtype, dim
        self.count = int(rng.integers(1, 12))
        self.state_words = {"sgd": 0, "adagrad": dim, "sparse_adam": 2 * dim, "rowwise_adagrad": 1}[optimizer]
        self.stride = (dim + 1) // 2 + self.state_words + 2
        self.stride += -self.stride % int(rng.choice([2, 4]))
        self.words = torch.zeros(self.count * self.stride, device=device)
        self.halves, self.steps = self.words.view(dtype), self.words.view(torch.int64)
        self.records = self.words.view(self.count, self.stride)
        self.values.copy_(torch.from_numpy(rng.standard_normal((self.count, dim))))

    @property
    def values(self):
        return self.halves.view(self.count, -1)[:, : self.dim]

    @property
    def state(self):
        return self.records[:, (self.dim + 1) // 2 :][:, : self.state_words]

    def step(self, slots, grad, scale, t, **rounding):
        function = getattr(self.functions, f"half_{self.optimizer}_update")
        where = (self.halves, self.words, self.stride, self.dim, self.steps, slots, grad)
        numbers = {
            "sgd": (LR,),
            "adagrad": (LR, EPS),
            "sparse_adam": (BETAS, LR * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t), EPS),
            "rowwise_adagrad": (LR, EPS),
        }[self.optimizer]
        function(*where, *numbers, scale, t, **rounding)


def torch_step(optimizer, value, state, g, t):
    """A step of float32 (or float64) rows; returns (values before they are rounded, state)."""
    if optimizer == "sgd":
        return value - LR * g, state
    if optimizer == "sparse_adam":
        dim = g.shape[1]
        m, v = state[:, :dim], state[:, dim:]
        m, v = m + (g - m) * (1 - BETAS[0]), v + (g * g - v) * (1 - BETAS[1])
        step_size = LR * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        return value - step_size * m / (v.sqrt() + EPS), torch.cat([m, v], 1)
    state = state + ((g * g).mean(1, keepdim=True) if optimizer == "rowwise_adagrad" else g * g)
    return value - LR * g / (state.sqrt() + EPS), state


def assert_half_neighbours(actual, exact, dtype):
    """Each of `actual` (half) is one of the two halves around a value within a few ulp of `exact` (float64)."""
    slack = 1e-6 * exact.abs() + 1e-7
    spacing = torch.from_numpy(np.spacing(exact.abs().numpy().astype(np.float16)).astype(np.float64))
    if dtype == torch.bfloat16:
        spacing = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 7)
    assert ((actual.double() - exact).abs() <= spacing + slack).all()
