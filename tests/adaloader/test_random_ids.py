"""Random ids: what the loop draws is known ahead, repeats, resumes, and follows the asked distribution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, random_ids

ROWS = 5000


class Model(nn.Module):
    """Users against items of the batch and drawn ones."""

    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(ROWS, 4)
        self.item = nn.Embedding(ROWS, 4)
        self.register_buffer("popularity", torch.arange(1.0, ROWS + 1))
        self.drawn = []

    def draw(self, users):
        flat = random_ids(ROWS, (len(users), 3))
        popular = random_ids(None, 2 * len(users), weights=self.popularity)
        distinct = random_ids(ROWS, (2, 5), low=10, replacement=False)
        self.drawn.append([flat, popular, distinct])
        return flat, popular, distinct

    def forward(self, users):
        users_E = self.user(users).mean(0)
        return sum((self.item(ids) @ users_E).square().mean() for ids in self.draw(users))


def batches(seed, sizes=(8, 8, 5, 8, 7, 3)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (size,), generator=generator) for size in sizes]


def start(seed, data, **keywords):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, AdaLoader.wrap(data, model=model, optimizer=optimizer, min_rows=1, **keywords)


def step(model, optimizer, batch):
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


@pytest.mark.parametrize("lookahead", [0, 1, 5])
def test_what_the_forward_pass_draws_is_intended(lookahead, seed):
    model, optimizer, loader = start(seed, batches(seed), lookahead=lookahead)
    demanded = []
    for _ in range(2):
        for batch in loader:
            step(model, optimizer, batch)
            demanded.append(loader.stats()["on_demand"])
    assert demanded[0] == demanded[-1] > 0
    loader.close()


def test_what_a_loop_draws_one_batch_ahead_is_intended(seed):
    model, optimizer, loader = start(seed, batches(seed, (8,) * 8))
    demanded, iterator = [], iter(loader)
    batch = next(iterator)
    while batch is not None:
        following = next(iterator, None)
        step(model, optimizer, batch)
        demanded.append(loader.stats()["on_demand"])
        batch = following
    assert demanded[0] == demanded[-2] > 0  # for the last batch nothing follows, and the draws are other ones
    loader.close()


def test_runs_repeat_and_passes_differ(seed):
    runs = []
    for _ in range(2):
        model, optimizer, loader = start(seed, batches(seed), lookahead=len(runs) * 3)
        for _ in range(2):
            for batch in loader:
                step(model, optimizer, batch)
        loader.close()
        runs.append(model.drawn)
    assert same(*runs)
    assert not same(runs[0][:6], runs[0][6:])
    assert not torch.equal(runs[0][0][0], runs[0][1][0])


@pytest.mark.parametrize("stop_after", [2, 6, 9])
def test_a_resumed_run_draws_what_the_interrupted_one_would_have(stop_after, seed):
    def run(model, optimizer, loader, passes, state=None):
        if state is not None:
            loader.load_state_dict(state)
        states = []
        for _ in range(passes):
            for batch in loader:
                step(model, optimizer, batch)
                states.append(loader.state_dict())
            states[-1] = loader.state_dict()
        loader.close()
        return model.drawn, states

    drawn, states = run(*start(seed, batches(seed)), 2)
    assert len(drawn) == 12
    passes = 1 if stop_after >= 6 else 2
    model, optimizer, loader = start(seed + 1, batches(seed))
    resumed, _ = run(model, optimizer, loader, passes, states[stop_after - 1])
    assert same(resumed, drawn[stop_after:])


def test_the_loader_of_a_dataset_saves_its_draws_too(seed):
    def run(state=None):
        torch.manual_seed(seed)
        model = Model()
        loader = AdaLoader(batches(seed, (1,) * 20), batch_size=4, model=model, min_rows=1)
        if state is not None:
            loader.load_state_dict(state)
        states = []
        with torch.no_grad():
            for batch in loader:
                model(batch.flatten())
                states.append(loader.state_dict())
        loader.close()
        return model.drawn, states

    drawn, states = run()
    assert same(run(states[2])[0], drawn[3:])


def test_drawing_takes_nothing_from_pytorchs_generator_in_a_loop(seed):
    model, optimizer, loader = start(seed, batches(seed))
    for batch in loader:
        before = torch.get_rng_state()
        step(model, optimizer, batch)
        assert torch.equal(before, torch.get_rng_state())
    loader.close()
    torch.manual_seed(seed)
    first = random_ids(100, 8)
    torch.manual_seed(seed)
    assert torch.equal(first, random_ids(100, 8)) and torch.equal(first, random_ids(100, 8)) is False


@pytest.mark.parametrize("where", ["in a loop", "outside"])
def test_draws_are_as_asked(where, seed):
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0])
    model = Model()
    loader = AdaLoader.wrap(batches(seed), model=model, min_rows=1)
    if where == "in a loop":
        next(iter(loader))
    torch.manual_seed(seed)
    plain = random_ids(9, (2000,), low=4)
    assert plain.dtype == torch.int64 and plain.min() == 4 and plain.max() == 8
    assert (plain.bincount(minlength=9)[4:] - 400).abs().max() < 120
    weighted = random_ids(5, (100, 80), weights=weights)
    share = weighted.flatten().bincount(minlength=5) / 8000
    torch.testing.assert_close(share, weights / 8, atol=0.03, rtol=0)
    several = random_ids(None, (2000, 2), weights=weights, replacement=False, dtype=torch.int32)
    assert several.dtype == torch.int32 and (several[:, 0] != several[:, 1]).all()
    first = several[:, 0].long().bincount(minlength=5) / 2000
    torch.testing.assert_close(first, weights / 8, atol=0.06, rtol=0)
    assert random_ids(3, (4, 3), replacement=False).sort(-1).values.tolist() == [[0, 1, 2]] * 4
    assert random_ids(3, ()).shape == () and random_ids(3, 0).shape == (0,)
    generator = torch.Generator().manual_seed(seed)
    drawn = random_ids(100, 6, generator=generator)
    assert torch.equal(drawn, torch.randint(0, 100, (6,), generator=torch.Generator().manual_seed(seed)))
    loader.close()


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        ({"high": 0, "size": 3}, ValueError, "high=0"),
        ({"high": 5, "size": 3, "low": 5}, ValueError, "low=5"),
        ({"high": 5, "size": (2, -1)}, ValueError, "-1"),
        ({"high": 5, "size": 6, "replacement": False}, ValueError, "6 of 5"),
        ({"high": 5, "size": 2, "weights": torch.ones(4)}, ValueError, r"5.*\[4\]"),
        ({"high": 2, "size": 2, "weights": torch.tensor([1.0, -1.0])}, ValueError, "not negative"),
        ({"high": 2, "size": 2, "weights": torch.zeros(2)}, ValueError, "positive sum"),
        ({"high": 2, "size": 2, "weights": torch.tensor([1.0, 0]), "replacement": False}, ValueError, "2 of 1"),
        ({"high": 5, "size": 2, "dtype": torch.float32}, TypeError, "float32"),
    ],
)
def test_bad_arguments_are_named(arguments, error, named):
    with pytest.raises(error, match=named):
        random_ids(**arguments)
