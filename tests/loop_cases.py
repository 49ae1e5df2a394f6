"""A training loop over a plain `DataLoader` and over an `AdaLoader`: what it runs on, and the comparison of the two.

A loop gets a `Script` and runs its epochs; what it logs, and the weights that it leaves, must not depend on which
loader it has, nor on how many ranks share the batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from adaloader import AdaLoader, full_state_dict

ROWS = 90
MIN_ROWS = 50
MOST_SEGMENTS, MOST_IN_SEGMENT = 40, 400


class Clicks(Dataset):
    """Samples in dicts: ids for two tables, dense features, a target; all float64."""

    def __init__(self, samples: int, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.x = torch.randint(0, ROWS, (samples, 4), generator=random)
        self.y = torch.randint(0, ROWS, (samples, 3), generator=random)
        self.dense = torch.randn(samples, 2, generator=random, dtype=torch.float64)
        self.target = torch.rand(samples, generator=random, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[at], "y": self.y[at], "dense": self.dense[at], "target": self.target[at]}


class Model(nn.Module):
    """Two tables, and dense parameters of which some are not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, 5, padding_idx=0, dtype=torch.float64)
        self.bag = nn.EmbeddingBag(ROWS, 3, mode="mean", dtype=torch.float64)
        self.top = nn.Linear(4 * 5 + 3 + 2, 1, dtype=torch.float64)
        self.side = nn.Linear(2, 1, dtype=torch.float64)
        self.never = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x, y, dense):
        return self.top(torch.cat([self.rows(x).flatten(1), self.bag(y), dense], 1)).squeeze(1)

    def loss(self, batch):
        return F.mse_loss(self(batch["x"], batch["y"], batch["dense"]), batch["target"])

    def side_loss(self, batch):
        return F.mse_loss(self.side(batch["dense"]).squeeze(1), batch["target"])


@dataclass
class Script:
    """What a loop has at hand, and the log that it writes."""

    model: Model
    optimizers: list[torch.optim.Optimizer]
    loader: Iterable
    validation: Iterable
    rank: int = 0
    ranks: int = 1
    plain_ranks: int = 1
    schedulers: list = field(default_factory=list)
    epochs: int = 2
    log: list[list[tuple[float, int]]] = field(default_factory=lambda: [[]])

    def passes(self):
        """Yield once per epoch. A rank may have one batch less: each pass is logged apart."""
        for epoch in range(self.epochs):
            self.log.append([])
            yield epoch

    def note(self, loss: torch.Tensor, samples: int) -> None:
        """Log a mean over this rank's samples of a batch."""
        self.log[-1].append((float(loss.detach()), samples))

    def note_same(self, value: torch.Tensor) -> None:
        """Log something that is the same on every rank."""
        self.log[-1].append((float(value), 1))

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def shares(self, batch):
        """Yield (rank, share of it, its part of the loss): in plain PyTorch all of them, else this rank's batch."""
        if self.plain_ranks == 1:
            yield self.rank, batch, 1.0
            return
        size = len(batch["target"])
        bounds = np.cumsum(
            [0] + [size // self.plain_ranks + (r < size % self.plain_ranks) for r in range(self.plain_ranks)]
        )
        for rank in range(self.plain_ranks):
            share = {name: value[bounds[rank] : bounds[rank + 1]] for name, value in batch.items()}
            if len(share["target"]):
                yield rank, share, len(share["target"]) / size


@dataclass
class Case:
    """How a loop is run: the same on all ranks."""

    samples: int
    batch_size: int = 4
    seed: int = 0
    optimizer: str = "adagrad"
    with_schedule: bool = False
    comm: object = None

    @property
    def rank(self) -> int:
        return 0 if self.comm is None else self.comm.rank

    @property
    def ranks(self) -> int:
        return 1 if self.comm is None else self.comm.size

    def build(self):
        """Seed everything; return model, optimizers, schedulers and both datasets."""
        torch.manual_seed(self.seed)
        model = Model()
        if self.optimizer == "two":
            optimizers = [
                torch.optim.Adagrad([*model.rows.parameters(), *model.bag.parameters()], lr=0.2),
                torch.optim.Adam([*model.top.parameters(), *model.side.parameters(), model.never], lr=0.01),
            ]
        else:
            kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[self.optimizer]
            optimizers = [kind(model.parameters(), lr=0.2)]
        schedulers = []
        if self.with_schedule:
            schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, gamma=0.8) for each in optimizers]
        return model, optimizers, schedulers, Clicks(self.samples, self.seed + 1), Clicks(11, self.seed + 2)

    def run_plain(self, loop, **options):
        model, optimizers, schedulers, train, test = self.build()
        size = self.ranks * self.batch_size
        script = Script(
            model,
            optimizers,
            DataLoader(train, size, shuffle=True, **options),
            DataLoader(test, size),
            plain_ranks=self.ranks,
            schedulers=schedulers,
        )
        loop(script)
        return _spread(script.log), model.state_dict(), torch.get_rng_state()

    def run_managed(self, loop, validation_options=None, **options):
        model, optimizers, schedulers, train, test = self.build()
        shared = {
            "model": model,
            "min_rows": MIN_ROWS,
            "comm": self.comm if self.ranks > 1 else None,
            "timeout_seconds": 60,
        }
        loader = AdaLoader(train, self.batch_size, shuffle=True, optimizer=optimizers, **shared, **options)
        extra = validation_options or {}
        if extra.pop("with_optimizer", False):
            extra["optimizer"] = optimizers
        validation = AdaLoader(test, self.batch_size, **shared, **extra)
        script = Script(model, optimizers, loader, validation, self.rank, self.ranks, schedulers=schedulers)
        loop(script)
        weights = full_state_dict(model)
        stats = loader.stats()
        random_state = torch.get_rng_state()
        validation.close()
        loader.close()
        return self._joined(script.log), weights, random_state, stats

    def _joined(self, log) -> np.ndarray:
        """Join the ranks' logs: means over all samples."""
        mine = _spread(log)
        mine[..., 0] *= mine[..., 1]
        total = mine.copy()
        if self.ranks > 1:
            self.comm.Allreduce(mine, total)
        total[..., 0] /= np.maximum(total[..., 1], 1)
        return total

    def compare(self, loop, plain_options=None, **options):
        """Run a loop both ways; all that it logs and leaves must be equal. Return the managed loader's statistics."""
        theirs, their_weights, their_state = self.run_plain(loop, **(plain_options or {}))
        ours, our_weights, our_state, stats = self.run_managed(loop, **options)
        np.testing.assert_array_equal(ours[..., 1] > 0, theirs[..., 1] > 0, err_msg=loop.__name__)
        np.testing.assert_allclose(ours[..., 0], theirs[..., 0], rtol=1e-10, atol=1e-11, err_msg=loop.__name__)
        if self.rank == 0:
            for name, value in their_weights.items():
                torch.testing.assert_close(
                    our_weights[name],
                    value,
                    rtol=1e-9,
                    atol=1e-10,
                    msg=lambda text, n=name: f"{loop.__name__}, {n}: {text}",
                )
        assert torch.equal(our_state, their_state), f"{loop.__name__}: another random state is left behind"
        return stats


def _spread(log) -> np.ndarray:
    """Return [segment, place, (value, samples)], zero where nothing was logged."""
    spread = np.zeros((MOST_SEGMENTS, MOST_IN_SEGMENT, 2))
    for at, segment in enumerate(log):
        for place, entry in enumerate(segment):
            spread[at, place] = entry if entry[1] else (0.0, 0)
    return spread
