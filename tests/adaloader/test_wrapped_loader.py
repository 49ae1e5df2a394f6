"""`AdaLoader.wrap` over sources of all kinds: their batches, saving and resuming, what is refused; on one process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchdata.nodes as nodes
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from adaloader import AdaLoader
from tests.adaloader.id_loaders import Lookup, Pairs, managed, numbers, save_and_load, train


class Generated:
    """A loader of a kind of its own: `__iter__` is a generator; no length, no state."""

    batch_size = 4

    def __iter__(self):
        for number in range(6):
            yield torch.tensor([number]), torch.tensor([[number, number + 1]])


def as_nodes():
    node = nodes.IterableWrapper([(torch.tensor([n]), torch.tensor([[n, n + 1]])) for n in range(6)])
    return nodes.Loader(nodes.Prefetcher(node, prefetch_factor=2))


SOURCES = {
    "list": lambda: list(Generated()),
    "generator": Generated,
    "nodes": as_nodes,
    "stateful": lambda: StatefulDataLoader(Pairs(), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "dataloader": lambda: DataLoader(Pairs(), 4),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("lookahead", [0, 1, 50])
def test_wrapped_sources(source, lookahead):
    plain = SOURCES[source]()
    expected = [numbers(plain), numbers(plain)]
    loader, model, optimizer = managed(SOURCES[source](), wrap=True, lookahead=lookahead)
    seen = []
    for _ in range(2):
        seen.append([])
        for batch in loader:
            train(model, optimizer, batch)
            seen[-1].append(batch[0].tolist())
    assert seen == expected
    if hasattr(plain, "__len__"):
        assert len(loader) == len(plain)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("lookahead", [0, 1, 50])
@pytest.mark.parametrize("stop_after", [0, 2, 6, None])
def test_wrapped_sources_resume(source, lookahead, stop_after):
    """`None`: the state is taken after the end."""
    loader, _, _ = managed(SOURCES[source](), wrap=True, lookahead=lookahead)
    iterator = iter(loader)
    list(itertools.islice(iterator, stop_after))
    state = save_and_load(loader.state_dict())
    resumed, _, _ = managed(SOURCES[source](), wrap=True, lookahead=lookahead)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state or source in ("nodes", "stateful")
    rest = numbers(iterator)
    if stop_after is None or (stop_after, source) == (6, "nodes"):  # a nodes.Loader itself begins anew there
        assert len(numbers(resumed)) == 6
    else:
        assert numbers(resumed) == rest
        assert len(numbers(resumed)) == 6


def test_wrap_refuses_what_cannot_be_iterated_again():
    model = Lookup()
    for source in (iter([]), (n for n in range(3)), 3):
        with pytest.raises(TypeError, match="iterated again"):
            AdaLoader.wrap(source, model=model)
    loader, _, _ = managed([1], wrap=True)
    with pytest.raises(ValueError, match="not a state of a wrapped loader"):
        loader.load_state_dict({"_num_yielded": 3})


def test_wrapping_draws_nothing():
    """Building the wrapper must not begin a pass of the user's loader."""

    class Counting:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter([])

    source = Counting()
    loader, _, _ = managed(source, wrap=True)
    assert source.begun == 0
    assert loader.begun == 0 and not hasattr(loader, "no_such_thing")
    list(loader)
    assert loader.begun == 1


@pytest.mark.parametrize("batch_size", [2, 8])
def test_two_loaders_side_by_side(batch_size):
    """Batches of two loaders in one step, looked up in many small lookups, are told apart."""
    model = torch.nn.Embedding(5000, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, fields = 20, 6

    def loader():
        ids = torch.randint(5000, (steps * batch_size, fields))
        return AdaLoader.wrap(DataLoader(ids, batch_size), model=model, optimizer=optimizer)

    def loss(ids):
        return sum(model(ids[:, field]).square().mean() for field in range(fields))

    one, other = loader(), loader()
    for first, second in zip(one, other, strict=True):
        optimizer.zero_grad()
        (loss(first) + loss(second)).backward()
        optimizer.step()
    rows = one.stats()["tables"]["weight"]
    assert rows["on_demand"] <= 2 * 2 * batch_size * fields  # of the steps in which nothing is known yet
    one.close(), other.close()
