"""Dense optimizers on records in device memory: against torch.optim on whole tables, and against the CPU's body."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from cuda_ops.cuda.advance import advance
from pm import dense_rules
from pm.history import History
from tests.cuda_ops.cuda.device import SIMULATED, dims, drawn, dtypes, host, on_device, seeds

ADAM = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-3}
RMSPROP = {"lr": 0.05, "alpha": 0.8, "eps": 0.1}
# Per kind: its rule, the optimizer, options, and the names of its state in the order of the record.
KINDS = {
    "sgd": (dense_rules.MomentumSGD(False), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, []),
    "sgd_momentum": (
        dense_rules.MomentumSGD(True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.4},
        ["momentum_buffer"],
    ),
    "nesterov": (
        dense_rules.MomentumSGD(True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
        ["momentum_buffer"],
    ),
    "adagrad": (dense_rules.DecayingAdagrad(), torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1}, ["sum"]),
    "rmsprop": (dense_rules.RMSprop(False, False), torch.optim.RMSprop, RMSPROP, ["square_avg"]),
    "rmsprop_momentum": (
        dense_rules.RMSprop(False, True),
        torch.optim.RMSprop,
        {**RMSPROP, "momentum": 0.5},
        ["square_avg", "momentum_buffer"],
    ),
    "rmsprop_centered": (
        dense_rules.RMSprop(True, False),
        torch.optim.RMSprop,
        {**RMSPROP, "centered": True},
        ["square_avg", "grad_avg"],
    ),
    "rmsprop_centered_momentum": (
        dense_rules.RMSprop(True, True),
        torch.optim.RMSprop,
        {**RMSPROP, "centered": True, "momentum": 0.6, "weight_decay": 0.2},
        ["square_avg", "momentum_buffer", "grad_avg"],
    ),
    "adadelta": (
        dense_rules.Adadelta(),
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.2},
        ["square_avg", "acc_delta"],
    ),
    "adam": (dense_rules.Adam(False), torch.optim.Adam, ADAM, ["exp_avg", "exp_avg_sq"]),
    "adamw": (
        dense_rules.Adam(False),
        torch.optim.AdamW,
        {**ADAM, "weight_decay": 0.3},
        ["exp_avg", "exp_avg_sq"],
    ),
    "amsgrad": (
        dense_rules.Adam(True),
        torch.optim.Adam,
        {**ADAM, "amsgrad": True, "weight_decay": 0.1},
        ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ),
    "nadam": (dense_rules.NAdam(), torch.optim.NAdam, ADAM, ["exp_avg", "exp_avg_sq"]),
    "radam": (dense_rules.RAdam(), torch.optim.RAdam, ADAM, ["exp_avg", "exp_avg_sq"]),
    "adamax": (dense_rules.Adamax(), torch.optim.Adamax, ADAM, ["exp_avg", "exp_inf"]),
}
MOST_RECORDS = 5 if SIMULATED else 300


class Table:
    """Records under a rule on the device, the same on the host, and a parameter under torch.optim."""

    def __init__(self, kind, rng, dtype, dim):
        self.rule, make, options, self.names = KINDS[kind]
        self.dim, self.parts = dim, len(self.names)
        self.count = int(rng.integers(1, MOST_RECORDS + 1))
        longs = 8 // dtype.itemsize
        self.stride = dim * (1 + self.parts) + 2 * longs
        self.stride += -self.stride % (16 // dtype.itemsize if rng.integers(2) else longs)
        scalar = np.float32 if dtype == torch.float32 else np.float64
        self.words = np.zeros(self.count * self.stride, scalar)
        values = rng.standard_normal((self.count, dim)).astype(scalar)
        self.records[:, :dim] = values
        self.on_device = on_device(self.words)
        self.parameter = torch.nn.Parameter(torch.from_numpy(values))
        self.optimizer = make([self.parameter], **options)
        self.history = History(self.rule.kind, dtype=np.dtype(scalar).name)
        spec = SimpleNamespace(dtype=np.dtype(scalar).name)
        self.state = SimpleNamespace(gradient_steps=0, begun=False, spec=spec, history=self.history)

    @property
    def records(self):
        return self.words.reshape(self.count, self.stride)

    def note_step(self):
        self.state.gradient_steps += 1
        self.history.append(self.rule.entry(self.state, self.optimizer.param_groups[0]))

    def step(self, slots, grad, scale, version):
        """A step with a gradient of the records `slots`, everywhere."""
        self.note_step()
        whole = np.zeros((self.count, self.dim), grad.dtype)
        whole[slots] = scale * grad
        self.parameter.grad = torch.from_numpy(whole)
        self.optimizer.step()
        self.advance(slots, grad, scale, version)

    def advance(self, slots, grad, scale=1.0, version=0, **options):
        arrays = slots, grad, self.history.steps, self.history.bounds
        body = (self.words, self.stride, self.dim, self.words.view(np.int64))
        cuda_ops.advance(self.rule.kind, *body, *arrays, scale, version, **options)
        arrays = [None if array is None else on_device(array) for array in arrays]
        body = (self.on_device, self.stride, self.dim, self.on_device.view(torch.int64))
        advance(self.rule.kind, *body, *arrays, scale, version, **options)

    def expected(self):
        """Value and state of each row under torch.optim."""
        held = [self.optimizer.state[self.parameter][name] for name in self.names if self.optimizer.state]
        return np.concatenate([self.parameter.detach().numpy(), *[part.numpy() for part in held]], axis=1)


@pytest.mark.parametrize("kind", KINDS)
@settings(drawn, max_examples=2 if SIMULATED else 20)
@given(seeds, dtypes, dims, st.booleans())
def test_rows_touched_now_and_then_equal_all_rows_under_torch(kind, seed, dtype, dim, long):
    rng = np.random.default_rng(seed)
    table = Table(kind, rng, dtype, dim)
    gap_from, gap_to = (4, 75) if long else (4, 8)
    for t in range(1, gap_to + 3):
        resting = gap_from < t <= gap_to
        slots = rng.permutation(table.count)[: 0 if resting else rng.integers(0, table.count + 1)]
        grad = rng.standard_normal((len(slots), dim)).astype(table.words.dtype)
        if t == 30:
            table.optimizer.param_groups[0]["lr"] *= 2  # another regime
        table.step(slots, grad, -0.5, 100 + t)
        marks = host(table.on_device.view(torch.int64)).reshape(table.count, -1)[:, -2:]
        assert (marks[slots] == [cuda_ops.caught_up_word(t), 100 + t]).all()
        if t == 60:
            table.advance(rng.permutation(table.count)[:2], None, states=False)
    everything = np.arange(table.count)
    table.advance(everything, None)
    limit = 2e-5 if dtype == torch.float32 else 1e-11
    used = dim * (1 + table.parts)
    ours = host(table.on_device).reshape(table.count, table.stride)
    np.testing.assert_allclose(ours[:, :used], table.expected(), rtol=limit, atol=limit)
    np.testing.assert_allclose(ours[:, :used], table.records[:, :used], rtol=limit, atol=limit)
    words = ours.view(np.int64)
    assert (words[:, -2] == cuda_ops.caught_up_word(len(table.history))).all()
    np.testing.assert_array_equal(words[:, -1], table.records.view(np.int64)[:, -1])
    table.advance(everything, None)
    np.testing.assert_array_equal(host(table.on_device).reshape(ours.shape), ours)


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    words, steps = on_device(np.ones(2 * 14, np.float32)), None
    steps = words.view(torch.int64)
    columns = cuda_ops.history_columns("adam")[1]
    history, bounds = on_device(np.zeros((1, columns))), on_device(np.array([[np.inf, 0.0, 1.0, 0.0]]))
    grad = on_device(np.ones((2, 3), np.float32))

    def call(kind="adam", slots=(0, 1), grad=grad, history=history, bounds=bounds):
        advance(kind, words, 14, 3, steps, on_device(np.array(slots)), grad, history, bounds, 1.0, 1)

    with pytest.raises(IndexError, match=r"slots\[1\] is 2, which is not in \[0, 2\)"):
        call(slots=(0, 2))
    with pytest.raises(ValueError, match=r"grad must have shape \(2, 3\), got \(1, 3\)"):
        call(grad=grad[:1])
    with pytest.raises(TypeError, match="grad must be float32, got float64"):
        call(grad=grad.double())
    with pytest.raises(ValueError, match=r"history must be float64 \[steps, 15\], got float64 \[1, 3\]"):
        call(history=history[:, :3])
    with pytest.raises(ValueError, match=r"bounds must be float64 \[regimes, 4\], got float32 \[1, 4\]"):
        call(bounds=bounds.float())
    with pytest.raises(ValueError, match="history is empty"):
        call(history=history[:0])
    with pytest.raises(ValueError, match="do not lie in a record"):
        call("amsgrad")
    assert (words == 1).all()
    call(grad=None, history=history[:0])
    assert (words == 1).all()
