"""Writes to tables in loops of which ranks have different numbers of batches: who has none left takes its part."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from adaloader import AdaLoader, deferred_init, full_state_dict

ROWS, DIM = 1200, 3


class Net(nn.Module):
    def __init__(self, dense=True):
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM, dtype=torch.float64)
        self.top = nn.Linear(DIM, 1, dtype=torch.float64) if dense else nn.Identity()

    def forward(self, ids):
        return self.top(self.table(ids)).square().mean()


def normalise(weight):
    weight.data = F.normalize(weight.data, dim=-1)


def copy_back(weight):
    weight.copy_(weight.data * 0.5 + 0.125)


def shrink(weight):
    weight.mul_(0.75)


def pad(weight):
    weight[0] = 0.25


def add_to_some(weight):
    weight.index_fill_(0, torch.tensor([43, 86]), 0.5)


WRITES = [normalise, copy_back, shrink, pad, add_to_some]
PLACES = ["before the forward", "before the step", "after the step"]


def train(model, optimizer, steps, write, place, schedulers=()):
    """Each step is a list of batches, whose mean loss is stepped; `schedulers` before what is written after it, and
    after that."""

    @torch.no_grad()
    def write_if(here):
        if place == here:
            write(model.table.weight)

    for batches in steps:
        optimizer.zero_grad()
        write_if("before the forward")
        (sum(map(model, batches)) / len(batches)).backward()
        write_if("before the step")
        optimizer.step()
        for scheduler in schedulers[:1]:
            if scheduler is not None:
                scheduler.step()
        write_if("after the step")
        for scheduler in schedulers[1:]:
            if scheduler is not None:
                scheduler.step()


def ahead(batches):
    """Take each batch before the one before it is worked on, as training frameworks do."""
    iterator = iter(batches)
    held = next(iterator, None)
    while held is not None:
        following = next(iterator, None)
        yield held
        held = following


def batches_of_ranks(random, ranks, most_at_least):
    """Some ranks have more batches than others, one none at all."""
    counts = torch.randint(1, 5, (ranks,), generator=random).tolist()
    none, most = torch.randperm(ranks, generator=random)[:2].tolist()
    counts[none], counts[most] = 0, max(counts[most], most_at_least)
    return [[torch.randint(0, 30, (3, 2), generator=random) * 43 % ROWS for _ in range(count)] for count in counts]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("options", [{}, {"shared_memory": False}], ids=["shared", "apart"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("taken", [iter, ahead], ids=["in turn", "ahead"])
def test_who_has_no_batch_left_writes_along(comm, seed, write, place, options, taken):
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    plain = Net(dense=bool(torch.randint(2, (1,), generator=random)))
    model = copy.deepcopy(plain)
    batches = batches_of_ranks(random, comm.size, most_at_least=1 if taken is iter else 2)
    steps = [[own[at] for own in batches if at < len(own)] for at in range(max(map(len, batches)))]
    make = [torch.optim.Adagrad, torch.optim.Adam, torch.optim.SGD][int(torch.randint(3, (1,), generator=random))]
    plain_optimizer, optimizer = (make(m.parameters(), lr=0.1) for m in (plain, model))
    loader = AdaLoader.wrap(
        batches[comm.rank], model=model, optimizer=optimizer, timeout_seconds=60.0, min_rows=1000, **options
    )
    schedulers, plain_schedulers = ([ExponentialLR(o, 0.8), StepLR(o, 2, 0.9)] for o in (optimizer, plain_optimizer))
    if taken is ahead:  # with two, whose order nobody knows, their last bit may differ
        left_out = int(torch.randint(2, (1,), generator=random))
        schedulers[left_out] = plain_schedulers[left_out] = None
    for _ in range(3):
        train(model, optimizer, ([batch] for batch in taken(loader)), write, place, schedulers)
        train(plain, plain_optimizer, steps, write, place, plain_schedulers)
    for name, value in full_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=1e-10)
    assert optimizer.param_groups[0]["lr"] == plain_optimizer.param_groups[0]["lr"]
    loader.close()


@pytest.mark.ranks(2)
def test_rows_that_nobody_holds_are_not_changed_by_one_rank(comm, seed):
    """The function is known to those alone that run the line: an error, on every rank, says what to do."""
    with deferred_init(min_rows=100, seed=seed):
        model = Net(dense=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.tensor([[1, 2]])] * (3 if comm.rank else 1)
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, timeout_seconds=60.0)
    with pytest.raises(RuntimeError, match="deferred_init, while a rank has no batch left: .*drop_last=True"):
        train(model, optimizer, ([batch] for batch in loader), shrink, "after the step")
    loader.close()


@pytest.mark.ranks(2)
def test_ranks_that_write_different_things_are_told_so(comm):
    model = Net(dense=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap([torch.tensor([[1, 2]])], model=model, optimizer=optimizer, timeout_seconds=60.0)
    train(model, optimizer, ([batch] for batch in loader), shrink, None)
    odd = comm.rank == comm.size - 1
    with pytest.raises(
        RuntimeError, match=r"rank \d writes to table 'table.weight' \(.*all ranks must run the same line"
    ):
        with torch.no_grad():
            (pad if odd else shrink)(model.table.weight)
    loader.close()
