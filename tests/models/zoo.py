"""Models of other people's making, trained with and without AdaLoader: what a case is, and how it is run.

The cases are in `deepctr.py`, `geometric.py`, `language.py` and `home_made.py`; `all_cases()` gathers those whose
package is installed. Models are used as they are published, built from a configuration: nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from adaloader import AdaLoader, full_state_dict

PACKAGES = {
    "deepctr_torch": "tests.models.deepctr",
    "torch_geometric": "tests.models.geometric",
    "transformers": "tests.models.language",
    "torch": "tests.models.home_made",
}
"""Which package each file of cases needs."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}
EPOCHS = 2


def no_tables(model: nn.Module) -> list[str]:
    return []


def all_tables(model: nn.Module) -> list[str]:
    """Return the names of the model's embedding weights, each once though it may be tied to others."""
    weights = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def tables_like(*patterns: str) -> Callable[[nn.Module], list[str]]:
    """Return a function of a model that gives its tables whose names match one of the patterns."""
    return lambda model: [name for name in all_tables(model) if any(fnmatch(name, pattern) for pattern in patterns)]


def tied_tables(model: nn.Module) -> list[str]:
    """Return the tables that are the weight of a linear layer as well."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    weights = dict(model.named_parameters())
    return [name for name in all_tables(model) if id(weights[name]) in linear]


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        library: the package that the model comes from.
        name: of the model, and of what is special here.
        make_model: builds it, in the default dtype, from the global generator.
        make_batches: given the model, returns a re-iterable of batches (a list, or the library's own loader).
        loss_of: of (model, batch), a scalar.
        dense_of: given the model, the names of tables that it uses as a whole, which must therefore stay dense.
        coverage: the least share of lookups after warm-up that must have been intended.
        warm_up_steps: after how many steps coverage counts: two where batches are of one kind.
        per_sample: whether the loss is a mean over samples, without random numbers, once the model is in evaluation
            mode: then ranks that share its batches must give what one process gives.
        dtype: in which it is compared.
        tolerance: of results on several ranks; more for a model that rounds to float32 by itself, for which PyTorch
            with the same batch in several parts differs as much.
        note: what the table of the documentation says of it.
    """

    library: str
    name: str
    make_model: Callable[[], nn.Module]
    make_batches: Callable[[nn.Module], Iterable]
    loss_of: Callable[[nn.Module, object], torch.Tensor]
    dense_of: Callable[[nn.Module], Iterable[str]] = no_tables
    coverage: float = 0.99
    warm_up_steps: int = 2
    per_sample: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-11
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.library}: {self.name}"


@dataclass(frozen=True)
class Run:
    """What a training left behind; `learned` is the most by which a weight changed, `lookups` counts managed rows."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    learned: float = 0.0
    managed: tuple[str, ...] = ()
    lookups: int = 0
    coverage: float = 1.0
    missed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A managed run against the plain one: differences are relative to the larger of 1 and the largest plain value."""

    case: Case
    tables: tuple[str, ...]
    expected_dense: tuple[str, ...]
    managed: tuple[str, ...]
    lookups: int
    learned: float
    coverage: float
    missed: tuple[str, ...]
    loss_difference: float
    weight_difference: float

    @property
    def dense(self) -> tuple[str, ...]:
        return tuple(name for name in self.tables if name not in self.managed)


def all_cases() -> list[Case]:
    """Return the cases whose packages are installed."""
    return [
        case
        for package, module in PACKAGES.items()
        if importlib.util.find_spec(package)
        for case in importlib.import_module(module).CASES
    ]


def missing_packages() -> list[str]:
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def compare(case: Case, optimizer: str = "adagrad", seed: int = 0) -> Comparison:
    """Train the case in plain PyTorch and under AdaLoader, from the same seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        plain = train_plain(case, optimizer, seed)
        managed = train_managed(case, optimizer, seed)
        model = case.make_model()
    finally:
        torch.set_default_dtype(before)
    assert plain.weights.keys() == managed.weights.keys()
    assert len(plain.losses) == len(managed.losses) > 0
    return Comparison(
        case,
        tuple(dict.fromkeys((*all_tables(model), *managed.managed))),
        tuple(case.dense_of(model)),
        managed.managed,
        managed.lookups,
        plain.learned,
        managed.coverage,
        managed.missed,
        difference(as_tensor(managed.losses), as_tensor(plain.losses)),
        max(difference(managed.weights[name], value) for name, value in plain.weights.items()),
    )


def train_plain(case: Case, optimizer: str, seed: int) -> Run:
    torch.manual_seed(seed)
    model = case.make_model()
    made = OPTIMIZERS[optimizer](model.parameters())
    batches = case.make_batches(model)
    initial = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(seed + 1)
    losses = [loss for _ in range(EPOCHS) for loss in steps(case, model, made, batches)]
    learned = max(difference(value, initial[name]) for name, value in model.named_parameters())
    return Run(losses, dict(model.state_dict()), learned)


def train_managed(case: Case, optimizer: str, seed: int) -> Run:
    torch.manual_seed(seed)
    model = case.make_model()
    made = OPTIMIZERS[optimizer](model.parameters())
    batches = case.make_batches(model)
    loader = AdaLoader.wrap(batches, model=model, optimizer=made, min_rows=1)
    try:
        torch.manual_seed(seed + 1)
        losses, warm = [], {}
        for _ in range(EPOCHS):
            for loss in steps(case, model, made, loader):
                losses.append(loss)
                if len(losses) <= case.warm_up_steps:
                    warm = loader.stats()["tables"]
        counts = loader.stats()["tables"]
        shares = {name: coverage_since(warm.get(name), now) for name, now in counts.items()}
        looked_up = sum(now["lookups"] - warm.get(name, {"lookups": 0})["lookups"] for name, now in counts.items())
        intended = sum(now["intended"] - warm.get(name, {"intended": 0})["intended"] for name, now in counts.items())
        missed = tuple(f"{name} {share:.3f}" for name, share in shares.items() if share < 0.99)
        coverage = intended / looked_up if looked_up else 1.0
        return Run(losses, full_state_dict(model), 0.0, tuple(counts), looked_up, coverage, missed)
    finally:
        loader.close()


def coverage_since(before: dict[str, int] | None, now: dict[str, int]) -> float:
    """Return the share of a table's lookups since `before` that had been intended; 1.0 where there were none."""
    start = before or {"lookups": 0, "intended": 0}
    looked_up = now["lookups"] - start["lookups"]
    return (now["intended"] - start["intended"]) / looked_up if looked_up else 1.0


def steps(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> Iterable[float]:
    """One pass of the usual loop, yielding the losses."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = case.loss_of(model, batch)
        loss.backward()
        optimizer.step()
        yield loss.item()


def as_tensor(losses: list[float]) -> torch.Tensor:
    return torch.tensor(losses, dtype=torch.float64)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, over the larger of 1 and the largest of `theirs`; infinity for another shape or
    for numbers that are not finite on one side alone."""
    if ours.shape != theirs.shape:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if not torch.equal(torch.isfinite(ours), torch.isfinite(theirs)):
        return float("inf")
    finite = torch.isfinite(theirs)
    if not finite.any():
        return 0.0
    return float((ours - theirs)[finite].abs().max() / theirs[finite].abs().max().clamp(min=1.0))
