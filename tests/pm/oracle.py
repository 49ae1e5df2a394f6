"""Tables as plain dense tensors under torch.optim, and random programs to put them and a manager through."""

from __future__ import annotations

import numpy as np
import torch

import cuda_ops
import pm

RULES = {
    "sgd": pm.SGD,
    "adagrad": pm.Adagrad,
    "sgd_momentum": lambda: pm.MomentumSGD(momentum=True),
    "sgd_decay": lambda: pm.MomentumSGD(momentum=False),
    "adagrad_decay": pm.DecayingAdagrad,
    "rmsprop": lambda: pm.RMSprop(centered=False, momentum=False),
    "rmsprop_all": lambda: pm.RMSprop(centered=True, momentum=True),
    "adadelta": pm.Adadelta,
    "adam": lambda: pm.Adam(amsgrad=False),
    "adam_decay": lambda: pm.Adam(amsgrad=False),
    "adamw_amsgrad": lambda: pm.Adam(amsgrad=True),
    "nadam": pm.NAdam,
    "radam": pm.RAdam,
    "adamax": pm.Adamax,
}
KINDS = {
    pm.SGD: torch.optim.SGD,
    pm.MomentumSGD: torch.optim.SGD,
    pm.Adagrad: torch.optim.Adagrad,
    pm.DecayingAdagrad: torch.optim.Adagrad,
    pm.RMSprop: torch.optim.RMSprop,
    pm.Adadelta: torch.optim.Adadelta,
    pm.Adam: torch.optim.Adam,
    pm.NAdam: torch.optim.NAdam,
    pm.RAdam: torch.optim.RAdam,
    pm.Adamax: torch.optim.Adamax,
}
_ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
_DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
GROUPS = {
    "sgd": {"lr": 0.1, "maximize": False},
    "adagrad": {"lr": 0.1, "lr_decay": 0.05, "eps": 1e-10, "initial_accumulator_value": 0.25, "maximize": False},
    "sgd_momentum": {"lr": 0.02, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.0, "nesterov": False},
    "sgd_decay": {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.05, "nesterov": False},
    "rmsprop": {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False},
    "rmsprop_all": {"lr": 0.01, "alpha": 0.9, "eps": 1e-5, "weight_decay": 0.1, "momentum": 0.7, "centered": True},
    "adadelta": {"lr": 0.5, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    "adam": {**_ADAM, "amsgrad": False},
    "adam_decay": {**_ADAM, "amsgrad": False, "weight_decay": 0.1},
    "adamw_amsgrad": {**_ADAM, **_DECOUPLED, "amsgrad": True},
    "nadam": {**_ADAM, "momentum_decay": 0.004},
    "radam": {**_ADAM, **_DECOUPLED},
    "adamax": dict(_ADAM),
}
GROUPS["adagrad_decay"] = {**GROUPS["adagrad"], "weight_decay": 0.05}
GROUPS = {name: {"maximize": False, **group} for name, group in GROUPS.items()}
DENSE_RULES = [name for name in RULES if name not in ("sgd", "adagrad")]
_STATES = """sum square_avg momentum_buffer grad_avg exp_avg exp_avg_sq max_exp_avg_sq exp_inf acc_delta""".split()
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}
# Thousands of roundings, of moments and of the roots that values are divided by.
TOLERANCE_OF_DENSE_RULES = {"float32": 1e-5, "float64": 1e-10}


def initial(number: int, rows: np.ndarray, dim: int, dtype: str) -> np.ndarray:
    """The initial values `[n, dim]` of some rows of a table: a function of table and row alone."""
    phase = rows[:, None] * 7.0 + np.arange(dim) * 3.0 + number
    return np.sin(phase).astype(dtype)


def make_spec(number: int, rows: int, dim: int, dtype: str, rule: str, group: dict | None = None) -> pm.TableSpec:
    def fill(some: np.ndarray, out: np.ndarray) -> None:
        out[...] = initial(number, some, dim, dtype)

    return pm.TableSpec(f"table {number}", rows, dim, dtype, RULES[rule](), group or dict(GROUPS[rule]), fill)


class DenseTable:
    """What a table must be: one dense parameter and its own torch.optim optimizer."""

    def __init__(self, number: int, spec: pm.TableSpec):
        self.spec = spec
        everything = np.arange(spec.rows, dtype=np.int64)
        self.parameter = torch.nn.Parameter(torch.from_numpy(initial(number, everything, spec.dim, spec.dtype)))
        kind = KINDS.get(type(spec.rule))
        self.optimizer = None if kind is None else kind([self.parameter], **spec.group)
        self.exact = isinstance(spec.rule, (pm.SGD, pm.Frozen))  # roots are rounded otherwise in PyTorch
        self.tolerances = TOLERANCE_OF_DENSE_RULES if spec.rule.catches_up else TOLERANCE

    @property
    def values(self) -> np.ndarray:
        return self.parameter.detach().numpy()

    @property
    def states(self) -> np.ndarray:
        held = self.optimizer.state[self.parameter] if self.optimizer else {}
        parts = [held[name].numpy() for name in _STATES if name in held]
        return np.concatenate(parts, 1) if parts else np.empty((self.spec.rows, 0))

    def step(
        self,
        pieces: list[tuple[np.ndarray, np.ndarray, float, int, np.ndarray | None]],
        machines: list[int] | None = None,
    ) -> None:
        """Apply pieces (rows, values, scale, ordinal, counts), given in the order of ranks.

        Those of the same number in `machines` are added up first, machines then in the order in which they first occur.
        """
        total = np.zeros((self.spec.rows, self.spec.dim), self.spec.dtype)
        ordinals: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for rows, values, scale, ordinal, counts in pieces if machines is None else self._by_machine(pieces, machines):
            scaled = values * values.dtype.type(scale)
            if counts is None:
                total[rows] += scaled
            else:
                summed, often = ordinals.setdefault(ordinal, (np.zeros_like(total), np.zeros(self.spec.rows)))
                summed[rows] += scaled
                often[rows] += counts
        for summed, often in ordinals.values():
            total += summed / np.maximum(often, 1)[:, None].astype(total.dtype)
        self.parameter.grad = torch.from_numpy(total)
        self.optimizer.param_groups[0].update(self.spec.group)
        self.optimizer.step()

    def _by_machine(self, pieces: list[tuple], machines: list[int]) -> list[tuple]:
        """Return pieces of all rows: for each machine one of what has no counts, and one for each ordinal that has."""
        everything = np.arange(self.spec.rows, dtype=np.int64)
        sums: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] = {}
        for (rows, values, scale, ordinal, counts), machine in zip(pieces, machines, strict=True):
            made = np.zeros((self.spec.rows, self.spec.dim), self.spec.dtype), np.zeros(self.spec.rows, np.int64)
            total, often = sums.setdefault((machine, ordinal, counts is not None), made)
            total[rows] += values * values.dtype.type(scale)
            often[rows] += 0 if counts is None else counts
        return [
            (everything, total, 1.0, ordinal, often if counted else None)
            for (_, ordinal, counted), (total, often) in sums.items()
        ]

    def renorm(self, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        values = self.values[rows]
        cuda_ops.renorm(values, max_norm, norm_type)
        self.values[rows] = values

    def check(self, values: np.ndarray, rows: np.ndarray, what: object) -> None:
        """Compare what a manager gave for `rows`: to the bit for a table that only SGD has updated."""
        expected = self.values[rows]
        if self.exact:
            np.testing.assert_array_equal(values, expected, err_msg=str(what))
        else:
            tolerance = self.tolerances[self.spec.dtype]
            np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance, err_msg=str(what))


def some_rows(rng: np.random.Generator, rows: int, most: int | None = None) -> np.ndarray:
    """A random set of distinct rows, in random order, empty at times."""
    count = int(rng.integers(0, (most or rows) + 1)) if rng.random() > 0.1 else 0
    return rng.permutation(rows)[:count].astype(np.int64)


def random_gradient(rng: np.random.Generator, spec: pm.TableSpec, rows: np.ndarray, counted: bool) -> tuple:
    """(rows, values, scale, ordinal, counts) with scales whose products are exact."""
    values = rng.standard_normal((len(rows), spec.dim)).astype(spec.dtype)
    counts = rng.integers(1, 5, len(rows)).astype(np.int64) if counted else None
    return rows, values, float(rng.choice([1.0, 0.5, 0.25])), int(counted), counts
