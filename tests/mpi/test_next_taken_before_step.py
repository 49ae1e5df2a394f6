"""Loops that take the next batch between a batch's backward and its step."""

import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader
from tests.training import assert_same_tensors

LR = 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.dense = nn.Linear(4, 1)

    def forward(self, ids):
        return self.dense(self.table(ids)).sum(1)


def batches_of(comm, seed, counts):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, 50, (3, 2), generator=generator) for _ in range(count)] for count in counts]


def optimizers_of(model, number):
    if number == 1:
        return [torch.optim.SGD(model.parameters(), lr=LR)]
    return [torch.optim.SGD(model.table.parameters(), lr=LR), torch.optim.Adam(model.dense.parameters(), lr=LR)]


def train(batches, model, optimizers, accumulated):
    """Train on an iterable; each item is a list of tensors of ids, of which the loss is the mean."""
    it = iter(batches)
    batch, at = next(it, None), 0
    while batch is not None:
        parts = batch if isinstance(batch, list) else [batch]
        (sum(model(part).square().mean() for part in parts) / len(parts) / accumulated).backward()
        batch, at = next(it, None), at + 1
        if at % accumulated == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("number", [1, 2], ids=["one optimizer", "two optimizers"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_rank_whose_batches_end_before_a_step_takes_it_with_the_others(comm, seed, accumulated, number):
    """The other ranks have one batch more."""
    counts = [10] + [9] * (comm.size - 1)
    batches = batches_of(comm, seed, counts)
    torch.manual_seed(seed)
    model = Model().double()
    optimizers = optimizers_of(model, number)
    loader = AdaLoader.wrap(
        batches[comm.rank], model=model, optimizer=optimizers, min_rows=1, timeout_seconds=20, comm=comm
    )
    train(loader, model, optimizers, accumulated)
    ours = adaloader.full_state_dict(model)
    loader.close()
    torch.manual_seed(seed)
    model = Model().double()
    joint = [[own[at] for own in batches if at < len(own)] for at in range(max(counts))]
    train(joint, model, optimizers_of(model, number), accumulated)
    if comm.rank == 0:
        assert_same_tensors(ours, model.state_dict())
