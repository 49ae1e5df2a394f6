"""Every loop of `tests/loops.py` on one process: what it logs and leaves is what plain PyTorch logs and leaves."""

import pytest
import torch
from torch import nn

from adaloader import AdaLoader
from tests import loops
from tests.loops import Case


@pytest.mark.parametrize("loop", loops.ALL, ids=lambda loop: loop.__name__)
def test_loop_is_plain(loop, seed):
    case = Case(samples=26, seed=seed)
    case.compare(loop)
    case.compare(loop, keys=None, lookahead=0)


@pytest.mark.parametrize("loop", loops.ALL, ids=lambda loop: loop.__name__)
def test_loop_is_plain_with_two_optimizers_and_schedules(loop, seed):
    Case(samples=26, seed=seed, optimizer="two", with_schedule=True).compare(loop, lookahead=50)


class LooksUpNowAndThen(nn.Module):
    """Whether it looks a second table up hangs on a digit of the data; it is always the same row."""

    def __init__(self):
        super().__init__()
        self.emb, self.rare = nn.Embedding(50, 2), nn.Embedding(50, 2)

    def forward(self, batch):
        out = self.emb(batch["ids"]).sum()
        if int(batch["dense"].sum() * 1000) % 2:
            out = out + self.rare(batch["ids"][:1, 0] * 0 + 7).sum()
        return out


@pytest.mark.parametrize("seed", range(4))
def test_an_unforeseen_lookup_is_of_the_forward_that_goes_on(seed):
    """Though a batch before, which is finished, had looked up the same ids there."""
    torch.manual_seed(seed)
    model = LooksUpNowAndThen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [{"ids": torch.randint(50, (2,)), "dense": torch.randn(2)} for _ in range(120)]
    loader = AdaLoader(data, batch_size=3, model=model, optimizer=optimizer, min_rows=1)
    for number, batch in enumerate(loader):
        loss = model(batch).square()
        optimizer.zero_grad()
        assert loader._session.managed.batches.current.number == number
        loss.backward()
        optimizer.step()
    loader.close()
