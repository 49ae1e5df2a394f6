"""Runs that are saved, ended and resumed, for tests: a script with everything in it that a checkpoint must keep."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import adaloader
from adaloader import AdaLoader, full_optimizer_state_dict, full_state_dict
from adaloader.checkpoint.writing import Saved, Saving

ROWS, SMALL_ROWS = 211, 37
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.8, weight_decay=1e-3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.3, initial_accumulator_value=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, amsgrad=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.02, momentum=0.5, centered=True),
    "rowwise": lambda parameters: adaloader.RowwiseAdagrad(parameters, lr=0.3),
}


class Visits(Dataset):
    """Samples of ids, some of which come often, and a label."""

    def __init__(self, samples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, ROWS, (samples, 3), generator=generator)
        self.ids = torch.minimum(ids, torch.randint(0, ROWS, (samples, 3), generator=generator))
        self.label = torch.rand(samples, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"ids": self.ids[at], "label": self.label[at], "at": torch.tensor(at)}


def with_draws(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A `collate_fn` that draws ids, from three generators and each time another number."""
    batch = torch.utils.data.default_collate(samples)
    batch["ids"][:, 1] = torch.randint(0, ROWS, (len(samples),))
    for at in range(random.randrange(len(samples) + 1)):
        batch["ids"][at, 2] = int(np.random.normal(ROWS / 2, ROWS / 9)) % ROWS
    return batch


class Model(nn.Module):
    """A declared table, one that is built, one that no module says is one; dense layers, a buffer, and dropout."""

    def __init__(self, dtype: torch.dtype, dropout: float, deferred: bool = True):
        super().__init__()
        if deferred:
            with adaloader.deferred_init(seed=11, min_rows=100):
                self.declared = nn.Embedding(ROWS, 4, dtype=dtype)
        else:
            self.declared = nn.Embedding(ROWS, 4, dtype=dtype)
        self.built = nn.Embedding(SMALL_ROWS, 3, dtype=dtype)
        self.bare = nn.Parameter(torch.randn(SMALL_ROWS, 2, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 + 3 + 2, 1, dtype=dtype)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        self.seen += 1
        small = batch["ids"][:, 0] % SMALL_ROWS
        parts = [self.declared(batch["ids"]).sum(1), self.built(small), self.bare[small]]
        return self.out(self.dropout(torch.cat(parts, 1))).squeeze(1)


@dataclass
class Script:
    """A training script: `start()` builds it, `run(batches)` trains on, over the ends of passes.

    Args:
        comm: of the ranks.
        options: of the loader.
        wrapped: whether the loader wraps a list of batches of the rank's own.
    """

    comm: object
    optimizer: str = "adagrad"
    dtype: torch.dtype = torch.float64
    dropout: float = 0.0
    samples: int = 61
    batch_size: int = 4
    seed: int = 0
    options: dict = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def start(self, model_seed: int | None = None) -> Script:
        seed = self.seed if model_seed is None else model_seed
        torch.manual_seed(seed), np.random.seed(seed % 2**31), random.seed(seed)
        self.model = Model(self.dtype, self.dropout)
        self.optim = OPTIMIZERS[self.optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optim, [2, 5, 9], gamma=0.7)
        options = {"shuffle": True, "min_rows": 20, "comm": self.comm, **self.options}
        data = Visits(self.samples, self.seed)
        self.loader = AdaLoader(data, self.batch_size, model=self.model, optimizer=self.optim, **options)
        self.iterator, self.losses, self.seen = None, [], []
        return self

    def run(self, batches: int) -> Script:
        for _ in range(batches):
            self.one_batch()
        return self

    def one_batch(self) -> None:
        if self.iterator is None:
            self.iterator = iter(self.loader)
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = None
            return
        self.optim.zero_grad()
        loss = nn.functional.mse_loss(self.model(batch), batch["label"].to(self.dtype))
        loss.backward()
        self.optim.step()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.seen += batch["at"].tolist()

    def finish_pass(self) -> Script:
        while True:
            self.one_batch()
            if self.iterator is None:
                return self

    def save(self, path: Path, asynchronous: bool = False) -> Saved | Saving:
        extra = {"scheduler": self.scheduler, "losses": self.losses}
        return adaloader.save(path, self.loader, extra, asynchronous=asynchronous)

    def load(self, path: Path, **options) -> adaloader.checkpoint.report.Restored:
        return adaloader.load(path, self.loader, extra={"scheduler": self.scheduler}, **options)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the run has come to, by name, on rank 0 (collective)."""
        weights = full_state_dict(self.model)
        optimizer = full_optimizer_state_dict(self.model, self.optim)
        if not weights:
            return {}
        flat = {f"{at}.{n}": v for at, entry in optimizer["state"].items() for n, v in entry.items()}
        flat["lr"] = optimizer["param_groups"][0]["lr"]
        tensors = {**weights, **{name: torch.as_tensor(value) for name, value in flat.items()}}
        return {**tensors, "draw": torch.rand(3), "numpy": torch.from_numpy(np.random.rand(3))}

    def close(self) -> None:
        if self.comm is not None:
            self.comm.Barrier()
        self.loader.close()


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two states are the same to the bit."""
    assert list(ours) == list(theirs)
    differing = {
        name: float((ours[name].double() - theirs[name].double()).abs().max())
        for name in ours
        if not torch.equal(torch.nan_to_num(ours[name]), torch.nan_to_num(theirs[name]))
    }
    assert not differing, differing


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Two states are the same to rounding, but for what the ranks draw apart."""
    assert list(ours) == list(theirs)
    for name in ours:
        if name not in ("draw", "numpy", "seen"):
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
            )


def begun(optimizer: str = "adagrad", batches: int = 5, **options) -> Script:
    """Return a script that has trained some batches."""
    return Script(None, optimizer, **options).start().run(batches)
