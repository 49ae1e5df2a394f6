"""Sample order on several ranks: one order for all, that of a plain loader from rank 0's random state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from adaloader import AdaLoader, full_state_dict

MOST = 12, 24
"""Batches, and samples in a batch, in what ranks tell each other."""


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, at):
        return torch.tensor(at)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 2, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def loss(self, numbers):
        return (self.scale * self.table(numbers).sum(-1) - 0.1 * numbers).square().mean()


@pytest.fixture
def build(comm):
    """Build a loader and a model for it; all are closed at the end of the test."""
    loaders = []

    def make(source, *args, wrap=False, trains=True, **keywords):
        torch.manual_seed(9)
        model = Lookup()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.3) if trains else None
        made = (AdaLoader.wrap if wrap else AdaLoader)(
            source, *args, model=model, optimizer=optimizer, min_rows=1, comm=comm, timeout_seconds=60, **keywords
        )
        loaders.append(made)
        return made, model, optimizer

    yield make
    for loader in loaders:
        loader.close()


def joined(comm, batches):
    """Return the batches of all ranks, each the ranks' shares one after the other."""
    mine = np.full(MOST, -1, np.int64)
    for at, batch in enumerate(batches):
        batch = torch.atleast_1d(batch)
        mine[at, : len(batch)] = batch.numpy()
    everyone = np.empty((comm.size, *MOST), np.int64)
    comm.Allgather(mine, everyone)
    rows = [[number for rank in everyone[:, at] for number in rank.tolist() if number >= 0] for at in range(MOST[0])]
    return [row for row in rows if row]


def generator_state(generator):
    return torch.get_rng_state() if generator is None else generator.get_state()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("batch_size, drop_last", [(3, False), (3, True), (None, False), (1, False)])
def test_order_and_random_state_are_plain_from_rank_0(
    comm, seed, build, num_workers, own_generator, batch_size, drop_last
):
    """Ranks begin in different random states; two passes, the second left early."""
    if num_workers and (drop_last or batch_size == 1):
        pytest.skip("workers are slow to start")
    length = 3 * comm.size * (batch_size or 1) + 1
    options = {"shuffle": True, "drop_last": drop_last, "num_workers": num_workers}

    def start(offset):
        torch.manual_seed(seed + offset)
        return torch.Generator().manual_seed(seed + 50 + offset) if own_generator else None

    generator = start(0)
    size = batch_size and batch_size * comm.size
    plain = DataLoader(Numbers(length), size, generator=generator, **options)
    expected, states = [], []
    for stop_after in (None, 2):
        batches = [torch.atleast_1d(batch).tolist() for batch in itertools.islice(plain, stop_after and 2)]
        if batch_size is None:
            batches = [sum(batches[at : at + comm.size], []) for at in range(0, len(batches), comm.size)]
        expected.append(batches)
        states.append(generator_state(generator))
    loader, _, _ = build(Numbers(length), batch_size, lookahead=2, generator=(own := start(comm.rank)), **options)
    if not own_generator:
        torch.manual_seed(seed + comm.rank)
    assert joined(comm, loader) == expected[0]
    assert torch.equal(generator_state(own), states[0])
    if batch_size is not None:
        assert joined(comm, itertools.islice(loader, 2)) == expected[1]
        assert torch.equal(generator_state(own), states[1])


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 5, 17])
def test_small_datasets_in_order(comm, build, samples):
    loader, _, _ = build(Numbers(samples), 4, trains=False)
    assert len(loader) == -(-samples // (4 * comm.size))  # on every rank: schedules are made of it
    assert joined(comm, loader) == [batch.tolist() for batch in DataLoader(Numbers(samples), 4 * comm.size)]


@pytest.mark.parametrize("samples", [1, 2, 5, 17])
def test_training_on_small_datasets(comm, build, samples):
    """Ranks without a sample in any batch take part."""
    loader, model, optimizer = build(Numbers(samples), 4)
    torch.manual_seed(9)
    plain = Lookup()
    plain_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.3)
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
        for batch in DataLoader(Numbers(samples), 4 * comm.size):
            plain_optimizer.zero_grad()
            plain.loss(batch).backward()
            plain_optimizer.step()
    check_weights(comm, model, plain)


def check_weights(comm, model, plain):
    weights = full_state_dict(model)
    for name, value in plain.state_dict().items():
        if comm.rank == 0:
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.scale.detach(), plain.scale.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lookahead", [0, 50])
def test_resuming_in_the_middle(comm, seed, build, num_workers, lookahead):
    """The state is that of the last batch handed out, and a resumed run goes on as the other did, weights included."""
    options = {"shuffle": True, "lookahead": lookahead, "num_workers": num_workers}
    loader, _, _ = build(Numbers(5 * 3 * comm.size + 2), 3, **options)
    torch.manual_seed(seed)
    iterator = iter(loader)
    first = list(itertools.islice(iterator, 2))
    state = loader.state_dict()
    rest = list(iterator)
    resumed, model, optimizer = build(Numbers(5 * 3 * comm.size + 2), 3, **options)
    resumed.load_state_dict(state)
    torch.manual_seed(seed + comm.rank + 1)
    again = []
    for batch in resumed:
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        again.append(batch)
    assert joined(comm, again) == joined(comm, rest)
    assert sorted(sum(joined(comm, first + rest), [])) == list(range(5 * 3 * comm.size + 2))
    torch.manual_seed(9)
    plain = Lookup()
    plain_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.3)
    for batch in joined(comm, rest):
        plain.loss(torch.tensor(batch)).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    check_weights(comm, model, plain)


def batches_of(rank, seed):
    """A rank's own batches: ragged, and not equally many."""
    random = torch.Generator().manual_seed(seed + rank)
    return [torch.randint(0, 64, (1 + (rank + at) % 4,), generator=random) for at in range(3 + 2 * (rank % 3))]


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


SOURCES = {
    "list": lambda batches: ((batches,), {"wrap": True}),
    "stream": lambda batches: ((Stream(batches), None), {}),
    "sampler": lambda batches: ((batches, None), {"sampler": SequentialSampler(batches)}),
    "batch_sampler": lambda batches: (
        (batches,),
        {"batch_sampler": [[at] for at in range(len(batches))], "collate_fn": lambda samples: samples[0]},
    ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_weight", [None, len])
@pytest.mark.parametrize("prefetches", [False, True])
def test_batches_of_the_ranks_own(comm, seed, build, source, batch_weight, prefetches):
    """They count equally, or by `batch_weight`; the first step may find a rank without any."""
    batches = batches_of(comm.rank, seed) if comm.rank or comm.size == 1 else batches_of(0, seed)[:2]
    args, keywords = SOURCES[source](batches)
    loader, model, optimizer = build(*args, batch_weight=batch_weight, **keywords)
    for _ in range(2):
        iterator = iter(loader)
        seen = []
        coming = next(iterator, None)
        while coming is not None:
            batch, coming = coming, next(iterator, None) if prefetches else None
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            seen.append(batch)
            coming = coming if prefetches else next(iterator, None)
        assert len(seen) == len(batches) and all(map(torch.equal, seen, batches))
    check_weights(comm, model, own_batches_in_plain(comm, seed, batch_weight))


def own_batches_in_plain(comm, seed, batch_weight, epochs=2):
    torch.manual_seed(9)
    plain = Lookup()
    optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.3)
    everyone = [batches_of(rank, seed) for rank in range(comm.size)]
    if comm.size > 1:
        everyone[0] = everyone[0][:2]
    for _ in range(epochs):
        for step in range(max(map(len, everyone))):
            batches = [batches[step] for batches in everyone if step < len(batches)]
            weights = [1.0 if batch_weight is None else batch_weight(batch) for batch in batches]
            losses = [weight * plain.loss(batch) for weight, batch in zip(weights, batches, strict=True)]
            optimizer.zero_grad()
            (sum(losses) / sum(weights)).backward()
            optimizer.step()
    return plain


def test_a_rank_without_any_batch(comm, seed, build):
    """Rank 0 has none at all, in the first pass; in the second it has them and the others have none."""
    if comm.size == 1:
        pytest.skip("needs another rank")

    class Source:
        batches = batches_of(1, seed) if comm.rank else []

        def __iter__(self):
            return iter(self.batches)

    source = Source()
    loader, model, optimizer = build(source, wrap=True)
    for epoch in range(2):
        source.batches = batches_of(1, seed) if (comm.rank > 0) == (epoch == 0) else []
        for batch in loader:
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    torch.manual_seed(9)
    plain = Lookup()
    plain_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.3)
    for batch in batches_of(1, seed) * 2:
        plain_optimizer.zero_grad()
        plain.loss(batch).backward()
        plain_optimizer.step()
    check_weights(comm, model, plain)


def test_one_rank_evaluates_with_loaders_of_its_own(comm, seed, build):
    """Other ranks do not wait for it, nor it for them; then all go on training."""
    loader, model, optimizer = build(batches_of(0, seed), wrap=True)
    shared = {"model": model, "min_rows": 1, "comm": comm, "timeout_seconds": 60}
    uneven = AdaLoader.wrap(batches_of(2, seed), **shared)
    ordered = AdaLoader(Numbers(7), 3, **shared)
    for epoch in range(2):
        for number, batch in enumerate(loader):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            if comm.rank == comm.size - 1 and number == epoch:
                with torch.no_grad():
                    total = sum(float(model.loss(batch)) for each in (uneven, ordered) for batch in each)
                assert np.isfinite(total)
    torch.manual_seed(9)
    plain = Lookup()
    plain_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.3)
    for batch in batches_of(0, seed) * 2:
        plain_optimizer.zero_grad()
        plain.loss(batch).backward()
        plain_optimizer.step()
    check_weights(comm, model, plain)
    uneven.close()
    ordered.close()


@pytest.mark.parametrize("validates_with_optimizer", [False, True])
def test_validation_within_and_after_uneven_passes(comm, seed, build, validates_with_optimizer):
    """A rank that has run out follows while the others validate in mid-pass, with uneven batches too."""
    batches = batches_of(comm.rank, seed) if comm.size == 1 or comm.rank else batches_of(0, seed)[:2]
    loader, model, optimizer = build(batches, wrap=True)
    shared = {"model": model, "min_rows": 1, "comm": comm, "timeout_seconds": 60}
    if validates_with_optimizer:
        shared["optimizer"] = optimizer
    validation = AdaLoader.wrap(batches_of(comm.rank, seed + 1), **shared)
    for _ in range(2):
        for number, batch in enumerate(loader):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            if number >= 2:  # not on all ranks
                with torch.no_grad():
                    for other in validation:
                        model.loss(other)
        with torch.no_grad():
            for other in validation:
                model.loss(other)
    check_weights(comm, model, own_batches_in_plain(comm, seed, None))
    validation.close()
