"""`lookahead="auto"` follows how long the loop waits."""

import pytest
import torch
from torch import nn

from adaloader import AdaLoader
from adaloader.reading.auto_lookahead import FIRST, LEAST, MOST, AutoLookahead


class Clock:
    def __init__(self):
        self.time, self.waited = 0.0, 0.0

    def batches(self, auto: AutoLookahead, count: int, waiting: float) -> int:
        for _ in range(count):
            self.time += 1.0
            self.waited += waiting
            last = auto()
        return last


def test_it_grows_while_the_loop_waits_and_shrinks_when_it_does_not():
    clock = Clock()
    auto = AutoLookahead(lambda: clock.waited, lambda: clock.time)
    assert clock.batches(auto, 10, 0.0) == FIRST
    assert clock.batches(auto, 100, 0.2) > 2 * FIRST
    assert clock.batches(auto, 1000, 0.2) == MOST
    assert clock.batches(auto, 400, 0.001) < MOST
    assert clock.batches(auto, 16 * 8 * MOST, 0.0) == LEAST


@pytest.mark.parametrize("lookahead", ["auto", 3])
def test_results_do_not_depend_on_it(lookahead):
    torch.manual_seed(0)
    model, plain = nn.Embedding(50, 4), nn.Embedding(50, 4)
    plain.load_state_dict(model.state_dict())
    batches = [torch.randint(0, 50, (8,)) for _ in range(60)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1, lookahead=lookahead)
    for ids in loader:
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for ids in batches:
        optimizer.zero_grad()
        plain(ids).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(torch.arange(50)), plain(torch.arange(50)))


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="\"auto\"; got 'much'"):
        AdaLoader.wrap([torch.tensor([1])], model=nn.Embedding(5, 2), lookahead="much")


@pytest.mark.parametrize("staleness, batches", [(0, 5), (2, 16), (None, 16)])
def test_a_loader_that_is_not_told_reads_further_ahead_with_staleness(staleness, batches):
    model = nn.Embedding(40, 2)
    read = []
    data = torch.utils.data.StackDataset(torch.arange(40))
    loader = AdaLoader(
        data,
        1,
        collate_fn=lambda samples: read.append(1) or torch.stack([sample[0] for sample in samples]),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        min_rows=1,
        staleness=staleness,
    )
    ahead = []
    for number, ids in enumerate(loader):
        model(ids).sum().backward()
        ahead.append(len(read) - number - 1)
    assert max(ahead) == batches
    loader.close()
