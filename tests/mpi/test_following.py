"""A rank without a sample in the last batch ends the epoch with the dense state and schedule of the others."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import adaloader
from adaloader import AdaLoader
from tests.training import assert_same_tensors

BATCH_SIZE = 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 4)
        self.dense = nn.Linear(12, 1)

    def forward(self, ids):
        return self.dense(self.table(ids).flatten(1)).squeeze(1)


def train(ranks, seed, managed):
    generator = torch.Generator().manual_seed(seed)
    samples = 2 * BATCH_SIZE * ranks + 1  # the last global batch is one sample, on rank 0
    dataset = torch.utils.data.TensorDataset(
        torch.randint(0, 1000, (samples, 3), generator=generator),
        torch.rand(samples, generator=generator, dtype=torch.float64) * 50,
    )
    torch.manual_seed(seed)
    model = Model().double()
    optimizers = [
        torch.optim.Adagrad(model.table.parameters(), lr=0.1),
        torch.optim.Adam(model.dense.parameters(), lr=0.01),
    ]
    if managed:
        loader = AdaLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, model=model, optimizer=optimizers)
    else:
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE * ranks, shuffle=True)
    for _ in range(3):
        for ids, target in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.mse_loss(model(ids), target).backward()
            nn.utils.clip_grad_norm_(model.dense.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
    if not managed:
        return model.state_dict(), optimizers[1].state_dict()
    own = {name: p.detach().clone() for name, p in model.dense.named_parameters(prefix="dense")}
    state = adaloader.full_state_dict(model)
    loader.close()
    return own | state, optimizers[1].state_dict()


@pytest.mark.ranks(2)
def test_gradients_clipped_in_the_loop(comm, seed):
    weights, adam = train(comm.size, seed, managed=True)
    expected, expected_adam = train(comm.size, seed, managed=False)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)
    torch.testing.assert_close(adam["state"], expected_adam["state"], atol=1e-10, rtol=0)


# --- schedules ---


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def _warm_up(optimizer):
    return lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)


SCHEDULERS = {
    "lambda": lambda o: [lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))],
    "one cycle": lambda o: [lr_scheduler.OneCycleLR(o, 0.2, total_steps=20)],
    "sequential": lambda o: [lr_scheduler.SequentialLR(o, [_warm_up(o), lr_scheduler.ExponentialLR(o, 0.9)], [4])],
    "chained": lambda o: [lr_scheduler.ChainedScheduler([_warm_up(o), lr_scheduler.ExponentialLR(o, 0.9)])],
    "two": lambda o: [_warm_up(o), lr_scheduler.ExponentialLR(o, 0.9)],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2)],
    "chained restarts": lambda o: [
        lr_scheduler.ChainedScheduler([lr_scheduler.CosineAnnealingWarmRestarts(o, 3), _warm_up(o)])
    ],
    "fractions": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 1, 2)],
}


def train_on_schedule(comm, seed, kind, stream, managed):
    """Return (weights, learning rate) after three epochs, in which the last global batch is one sample, on rank 0."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, 1000, (2 * BATCH_SIZE * comm.size + 1, 3), generator=generator)
    torch.manual_seed(seed)
    model = Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    if managed:
        share = Stream([ids for part in samples.split(BATCH_SIZE)[comm.rank :: comm.size] for ids in part])
        loader = AdaLoader(share if stream else samples, batch_size=BATCH_SIZE, model=model, optimizer=optimizer)
    else:
        loader = DataLoader(samples, batch_size=BATCH_SIZE * comm.size)
    schedulers = SCHEDULERS[kind](optimizer)
    for epoch in range(3):
        for at, ids in enumerate(loader):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*[epoch + at / 3] if kind == "fractions" else ())
    weights = adaloader.full_state_dict(model) if managed else model.state_dict()
    if managed:
        loader.close()
    return weights, optimizer.param_groups[0]["lr"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stream", [False, True], ids=["samples", "stream"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_pytorch_is_followed(comm, seed, kind, stream):
    weights, lr = train_on_schedule(comm, seed, kind, stream, managed=True)
    expected, expected_lr = train_on_schedule(comm, seed, kind, stream, managed=False)
    assert lr == expected_lr
    if comm.rank == 0:
        assert_same_tensors(weights, expected)


def train_with_rates_of_its_own(comm, seed, managed):
    """The loop multiplies the learning rate after each step; no scheduler does."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 4, (comm.size,), generator=generator).tolist()
    counts[int(torch.randint(comm.size, (1,), generator=generator))] = 5
    batches = [[torch.randint(0, 1000, (3, 3), generator=generator) for _ in range(count)] for count in counts]
    torch.manual_seed(seed)
    model = Model().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if managed:
        loader = AdaLoader.wrap(batches[comm.rank], model=model, optimizer=optimizer)
        steps = ([batch] for _ in range(2) for batch in loader)
    else:
        steps = ([own[at] for own in batches if at < len(own)] for _ in range(2) for at in range(max(counts)))
    for batch_of_each in steps:
        optimizer.zero_grad()
        (sum(model(batch).square().mean() for batch in batch_of_each) / len(batch_of_each)).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    state = adaloader.full_state_dict(model) if managed else model.state_dict()
    if managed:
        loader.close()
    return state, optimizer.param_groups[0]["lr"]


@pytest.mark.ranks(2)
def test_rates_that_the_loop_sets_are_followed(comm, seed):
    expected, rate = train_with_rates_of_its_own(comm, seed, managed=False)
    values, own_rate = train_with_rates_of_its_own(comm, seed, managed=True)
    assert own_rate == rate
    if comm.rank == 0:
        assert_same_tensors(values, expected)
