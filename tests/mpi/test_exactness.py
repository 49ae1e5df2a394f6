"""Staleness 0 is exact: N ranks with batch B train as one process of plain PyTorch with batch N*B."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from adaloader import AdaLoader, full_optimizer_state_dict, full_state_dict
from tests.mpi.worlds import SHARED_MEMORY, TECHNIQUES

ROWS, FIELDS, DENSE, DIM = 60, 4, 3, 4
LIMITS = {torch.float32: (5e-6, 5e-5), torch.float64: (1e-10, 1e-10)}


class Clicks(Dataset):
    """Samples of dense numbers, ids (0 is padding; a few ids are most of them), bags and a label."""

    def __init__(self, seed: int, length: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(seed)
        hot = torch.randint(0, 6, (length, FIELDS), generator=generator)
        cold = torch.randint(0, ROWS, (length, FIELDS), generator=generator)
        self.ids = torch.where(torch.rand(length, FIELDS, generator=generator) < 0.6, hot, cold)
        self.dense = torch.randn(length, DENSE, generator=generator).to(dtype)
        self.label = torch.randint(0, 2, (length,), generator=generator).to(dtype)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, at):
        return {"dense": self.dense[at], "ids": self.ids[at], "label": self.label[at]}


class WideAndDeep(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.wide = nn.Embedding(FIELDS * ROWS, 1)
        self.deep = nn.Embedding(FIELDS * ROWS, DIM)
        self.register_buffer("offsets", torch.arange(FIELDS) * ROWS)
        self.mlp = nn.Sequential(nn.Linear(FIELDS * DIM + DENSE, 6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 1))

    def forward(self, batch):
        ids = batch["ids"] + self.offsets
        deep = self.mlp(torch.cat([self.deep(ids).flatten(1), batch["dense"]], 1))
        return (deep + self.wide(ids).sum(1)).squeeze(1)


class DLRM(nn.Module):
    """A table for each field, and the products of all pairs of their rows and the dense part."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, DIM, mode="sum") for _ in range(FIELDS))
        self.bottom = nn.Sequential(nn.Linear(DENSE, DIM), nn.ReLU())
        self.top = nn.Linear(DIM + FIELDS * (FIELDS + 1) // 2, 1)

    def forward(self, batch):
        dense = self.bottom(batch["dense"])
        rows = [table(batch["ids"][:, at : at + 1]) for at, table in enumerate(self.tables)]
        together = torch.stack([dense, *rows], 1)
        products = together @ together.transpose(1, 2)
        above = torch.triu_indices(FIELDS + 1, FIELDS + 1, 1)
        return self.top(torch.cat([dense, products[:, above[0], above[1]]], 1)).squeeze(1)


class ManyTables(nn.Module):
    """Tables of two dims for each field, the first with a padding row and looked up twice."""

    def __init__(self):
        super().__init__()
        self.wide = nn.ModuleList(nn.Embedding(ROWS, 1) for _ in range(FIELDS))
        self.deep = nn.ModuleList(nn.Embedding(ROWS, DIM, padding_idx=None if at else 0) for at in range(FIELDS))
        self.top = nn.Linear((FIELDS + 1) * DIM + DENSE, 1)

    def forward(self, batch):
        columns = batch["ids"].unbind(1)
        rows = [table(ids) for table, ids in zip([*self.deep, self.deep[0]], [*columns, columns[1]], strict=True)]
        wide = sum(table(ids) for table, ids in zip(self.wide, columns, strict=True))
        return (self.top(torch.cat([*rows, batch["dense"]], 1)) + wide).squeeze(1)


class FourLookups(nn.Module):
    """A table looked up by a module, a bag, `index_select` and indexing, and others beside it."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="mean", padding_idx=0)
        self.frozen = nn.Embedding(ROWS, DIM)
        self.frozen.weight.requires_grad_(False)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, batch):
        ids, weight = batch["ids"], self.emb.weight
        out = self.emb(ids).sum(1) + weight.index_select(0, ids[:, 0]) * weight[ids[:, 1] - ROWS]
        out = out + F.embedding_bag(ids, weight, mode="max") + self.bag(ids) * self.frozen(ids[:, 2])
        out = out + F.embedding_bag(ids, self.bag.weight, mode="sum", per_sample_weights=torch.sigmoid(weight[ids, 0]))
        return self.linear(torch.tanh(out)).squeeze(1)


class Options(nn.Module):
    """What embeddings do beside looking up: norms limited, gradients divided by frequency, padding, sharing."""

    def __init__(self):
        super().__init__()
        self.limited = nn.Embedding(ROWS, DIM, max_norm=1.0, padding_idx=0)
        self.counted = nn.Embedding(ROWS, DIM, scale_grad_by_freq=True, padding_idx=0)
        self.counted_bag = nn.EmbeddingBag(ROWS, DIM, max_norm=1.2, norm_type=1.0)
        self.shared = nn.EmbeddingBag(ROWS, DIM)
        self.shared.weight = self.counted.weight
        self.linear = nn.Linear(DIM, 1)

    def forward(self, batch):
        ids = batch["ids"]
        out = self.limited(ids).sum(1) + self.counted(ids).sum(1) * self.counted(ids[:, :2]).sum(1)
        return self.linear(torch.tanh(out + self.counted_bag(ids) + self.shared(ids))).squeeze(1)


MODELS = {
    "Wide & Deep": WideAndDeep,
    "DLRM": DLRM,
    "many tables": ManyTables,
    "four lookups": FourLookups,
    "options": Options,
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(
        parameters, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.05
    ),
}


@dataclass
class Run:
    """One way of training: everything that both sides share."""

    model: Callable[[], nn.Module]
    optimizer: Callable
    seed: int
    length: int = 43
    batch_size: int = 3
    epochs: int = 2
    dtype: torch.dtype = torch.float64
    schedule: bool = False
    shuffle: bool = True
    loader_options: dict = field(default_factory=dict)
    change_gradients: Callable[[nn.Module], None] = lambda model: None

    def train(self, make_loader):
        """Return (per step: this rank's loss times its samples, samples), the model and its optimizer."""
        torch.manual_seed(self.seed)
        np.random.seed(self.seed % 2**31)
        model = self.model().to(self.dtype)
        optimizer = self.optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.2 * t)) if self.schedule else None
        loader = make_loader(model, optimizer)
        losses = []
        for _ in range(self.epochs):
            for batch in loader:
                loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                self.change_gradients(model)
                optimizer.step()
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
                if scheduler is not None:
                    scheduler.step()
        return losses, model, optimizer, loader

    def data(self) -> Dataset:
        return Clicks(self.seed, self.length, self.dtype)

    def plain(self, ranks: int):
        losses, model, optimizer, _ = self.train(
            lambda m, o: DataLoader(self.data(), batch_size=ranks * self.batch_size, shuffle=self.shuffle)
        )
        return losses, model.state_dict(), optimizer.state_dict()["state"], torch.rand(3)

    def managed(self, **keywords):
        options = {
            "min_rows": 1,
            "techniques": TECHNIQUES,
            "shared_memory": SHARED_MEMORY,
            **self.loader_options,
            **keywords,
        }
        losses, model, optimizer, loader = self.train(
            lambda m, o: AdaLoader(
                self.data(), batch_size=self.batch_size, shuffle=self.shuffle, model=m, optimizer=o, **options
            )
        )
        drawn = torch.rand(3)
        weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
        loader.close()
        return losses, weights, state.get("state", {}), drawn


def global_losses(comm, losses: list[tuple[float, int]], steps: int) -> np.ndarray:
    """Return the loss of each global batch, the mean over all ranks' samples (collective)."""
    mine = np.zeros((steps, 2))
    mine[: len(losses)] = losses  # a rank without a sample in the last batch of an epoch took one step less
    everyone = np.zeros_like(mine)
    comm.Allreduce(mine, everyone)
    return everyone[:, 0] / everyone[:, 1]


def per_epoch(losses: list, epochs: int, steps: int) -> list[tuple[float, int]]:
    """Pad each epoch of a rank to the steps that the global order has."""
    mine = len(losses) // epochs
    padded = []
    for epoch in range(epochs):
        part = losses[epoch * mine : (epoch + 1) * mine]
        padded += part + [(0.0, 0)] * (steps // epochs - len(part))
    return padded


def assert_exact(comm, run: Run, **keywords) -> None:
    """Train both ways and compare losses, weights, optimizer state and the random state that is left behind."""
    managed = run.managed(**keywords)
    plain = run.plain(comm.size)
    loss_limit, weight_limit = LIMITS[run.dtype]
    expected = np.array([loss / count for loss, count in plain[0]])
    losses = global_losses(comm, per_epoch(managed[0], run.epochs, len(expected)), len(expected))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=loss_limit)
    assert torch.equal(managed[3], plain[3]), "the random state differs from plain PyTorch's"
    if comm.rank:
        assert managed[1] == {} and managed[2] == {}
        return
    assert managed[1].keys() == plain[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(
            managed[1][name], value, rtol=0, atol=weight_limit, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert managed[2].keys() == plain[2].keys()
    for index, entry in plain[2].items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(managed[2][index][name], value, rtol=10 * weight_limit, atol=weight_limit)


def digest(outcome) -> int:
    """A number that differs if any bit of the losses or weights does."""
    losses, weights = outcome[:2]
    parts = [np.array(losses).tobytes()] + [value.numpy().tobytes() for value in weights.values()]
    return zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("schedule", [False, True], ids=["constant lr", "schedule"])
@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_ranks_train_as_one_process(comm, seed, model, optimizer, dtype, schedule):
    if dtype == torch.float32 and not schedule:
        pytest.skip("float64 says more")
    assert_exact(comm, Run(MODELS[model], OPTIMIZERS[optimizer], seed, dtype=dtype, schedule=schedule))


@pytest.mark.parametrize("techniques", ["relocation", "replication", "none"])
@pytest.mark.parametrize("model", MODELS)
def test_with_fewer_techniques(comm, seed, model, techniques):
    assert_exact(comm, Run(MODELS[model], OPTIMIZERS["Adagrad"], seed, schedule=True), techniques=techniques)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "float64"])
def test_techniques_do_not_change_a_bit(comm, seed, dtype):
    run = Run(FourLookups, OPTIMIZERS["Adagrad"], seed, dtype=dtype)
    digests = {digest(run.managed(techniques=name)) for name in ("all", "relocation", "replication", "none")}
    assert len(digests) == 1


@pytest.mark.parametrize("samples_left", range(1, 13))
def test_last_batches_that_do_not_divide(comm, seed, samples_left):
    """Of every size, among them fewer samples than ranks: these have ranks that have no part in the last step."""
    if samples_left > 3 * comm.size:
        pytest.skip("a whole batch")
    run = Run(DLRM, OPTIMIZERS["Adagrad"], seed, length=6 * comm.size + samples_left, schedule=True)
    assert_exact(comm, run)


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
@pytest.mark.parametrize("keys", ["auto", None])
def test_any_lookahead(comm, seed, lookahead, keys):
    if keys is None and lookahead in (1, 50):
        pytest.skip("without keys nothing depends on it")
    assert_exact(comm, Run(FourLookups, OPTIMIZERS["Adagrad"], seed), lookahead=lookahead, keys=keys)


@pytest.mark.parametrize("lookahead", [0, 5])
def test_with_workers(comm, seed, lookahead):
    run = Run(WideAndDeep, OPTIMIZERS["Adagrad"], seed, length=31)
    assert_exact(comm, run, lookahead=lookahead, num_workers=2)


def test_key_functions(comm, seed):
    offsets = torch.arange(FIELDS) * ROWS

    def all_ids(batch):
        return batch["ids"] + offsets

    def wrong_ids(batch):
        return batch["ids"][::2] % 7

    run = Run(WideAndDeep, OPTIMIZERS["Adagrad"], seed)
    assert_exact(comm, run, keys={"wide.weight": all_ids, "deep.weight": wrong_ids})


def test_no_shuffle_and_one_sample_each(comm, seed):
    assert_exact(comm, Run(DLRM, OPTIMIZERS["SGD"], seed, length=11, batch_size=1, shuffle=False))


@pytest.mark.parametrize("model", MODELS)
def test_the_same_run_twice_is_bit_identical(comm, seed, model):
    run = Run(MODELS[model], OPTIMIZERS["Adagrad"], seed, dtype=torch.float32)
    assert digest(run.managed()) == digest(run.managed())
    assert digest(run.managed(lookahead=0)) == digest(run.managed(lookahead=9))


def test_tables_beside_dense_ones(comm, seed):
    """Tables below min_rows stay dense parameters, and are averaged as those are."""
    assert_exact(comm, Run(WideAndDeep, OPTIMIZERS["Adagrad"], seed), min_rows=FIELDS * ROWS + 1)


def test_gradients_scaled_by_hand(comm, seed):
    def halve(model):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    assert_exact(comm, Run(FourLookups, OPTIMIZERS["Adagrad"], seed, length=36, change_gradients=halve))


class Accumulating(Run):
    """Steps after every second batch, and clears after the step or never."""

    clears = True

    def train(self, make_loader):
        torch.manual_seed(self.seed)
        model = self.model().to(self.dtype)
        optimizer = self.optimizer(model.parameters())
        loader = make_loader(model, optimizer)
        losses = []
        for _ in range(self.epochs):
            for number, batch in enumerate(loader):
                loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                (loss / 4).backward()
                if number % 2:
                    optimizer.step()
                    if self.clears:
                        optimizer.zero_grad()
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
        return losses, model, optimizer, loader


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("model", ["four lookups", "options"])
def test_accumulating_over_batches(comm, seed, model, clears):
    run = Accumulating(MODELS[model], OPTIMIZERS["SGD"], seed, length=9 * comm.size * 2)
    run.clears = clears
    assert_exact(comm, run)


class WithClosure(Run):
    def train(self, make_loader):
        torch.manual_seed(self.seed)
        model = self.model().to(self.dtype)
        optimizer = self.optimizer(model.parameters())
        loader = make_loader(model, optimizer)
        losses = []
        for _ in range(self.epochs):
            for batch in loader:

                def closure(batch=batch):
                    optimizer.zero_grad()
                    loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                    loss.backward()
                    return loss

                loss = optimizer.step(closure)
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
        return losses, model, optimizer, loader


def test_steps_with_a_closure(comm, seed):
    assert_exact(comm, WithClosure(WideAndDeep, OPTIMIZERS["Adagrad"], seed))


@dataclass
class TwoOptimizers(Run):
    """Tables by one optimizer, the rest by another, which the other class of optimizers cannot do for tables."""

    def train(self, make_loader):
        torch.manual_seed(self.seed)
        model = self.model().to(self.dtype)
        tables = [p for name, p in model.named_parameters() if name in ("wide.weight", "deep.weight")]
        dense = [p for p in model.parameters() if all(p is not t for t in tables)]
        optimizers = [torch.optim.Adam(dense, lr=0.01), self.optimizer(tables)]
        loader = make_loader(model, optimizers)
        losses = []
        for _ in range(self.epochs):
            for batch in loader:
                loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
        return losses, model, optimizers[1], loader


def test_two_optimizers(comm, seed):
    assert_exact(comm, TwoOptimizers(WideAndDeep, OPTIMIZERS["Adagrad"], seed))


def test_only_tables(comm, seed):
    """A model without a dense parameter, so that no sum of dense gradients says what a batch weighs."""

    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, DIM)
            self.bag = nn.EmbeddingBag(ROWS, DIM)

        def forward(self, batch):
            return (self.emb(batch["ids"]).sum(1) * self.bag(batch["ids"])).sum(1)

    for length in (43, 6 * comm.size + 1):
        assert_exact(comm, Run(Tables, OPTIMIZERS["Adagrad"], seed, length=length))


def test_a_table_that_some_ranks_do_not_use(comm, seed):
    """A lookup that depends on the data: in some steps no rank makes it, in others some ranks do."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, 1)
            self.rare = nn.Embedding(ROWS, 1)
            self.linear = nn.Linear(DENSE, 1)

        def forward(self, batch):
            out = self.emb(batch["ids"]).sum(1) + self.linear(batch["dense"])
            marked = batch["ids"][:, 0] == 3
            if bool(marked.any()):
                out = out.index_add(0, marked.nonzero()[:, 0], self.rare(batch["ids"][marked, 1]))
            return out.squeeze(1)

    assert_exact(comm, Run(Sometimes, OPTIMIZERS["Adagrad"], seed, length=60))


# --- one process ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_one_process_equals_plain_pytorch_from_the_same_seed(comm, seed, optimizer, workers):
    """With dropout and a shuffled loader; on several ranks there is no such oracle."""
    if comm.size > 1:
        pytest.skip("dropout draws from each rank's own random state")
    run = Run(lambda: WideAndDeep(dropout=0.5), OPTIMIZERS[optimizer], seed, length=31, batch_size=4, epochs=3)
    assert_exact(comm, run, num_workers=workers)


# --- gradients are those of all ranks ---


@pytest.mark.ranks(2)
def test_norms_are_the_same_on_all_ranks(comm, seed):
    """Bit by bit; `test_gradients.py` compares them with plain PyTorch."""
    run = Run(FourLookups, OPTIMIZERS["SGD"], seed, length=36)
    seen = []

    def clip(model):
        seen.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        seen.append(float(model.emb.weight.grad.norm(1)))

    run.change_gradients = clip
    run.managed()
    norms = np.array(seen)
    others = norms.copy()
    comm.Bcast(others)
    np.testing.assert_array_equal(norms, others)
