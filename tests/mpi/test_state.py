"""Leaving and coming back on 1 to 4 ranks: whole state on rank 0 alone, equal to plain PyTorch's, and back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import adaloader
from adaloader import AdaLoader
from adaloader.model import gathering
from tests.training import (
    ITEMS,
    OPTIMIZERS,
    SHELVES,
    USERS,
    WORDS,
    Shop,
    Visits,
    assert_same_optimizer_state,
    assert_same_tensors,
    close,
    step,
    train,
)

BATCH = 4  # a rank


@pytest.fixture(params=sorted(OPTIMIZERS))
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def managed(comm, make_optimizer, data, model_seed=0, **options):
    """A model whose values before the loader differ by rank: rank 0's count."""
    torch.manual_seed(model_seed + 1000 * comm.rank)
    model = Shop()
    optimizer = make_optimizer(model.parameters())
    loader = AdaLoader(data, batch_size=BATCH, model=model, optimizer=optimizer, min_rows=1, **options)
    return model, optimizer, loader


def plain(comm, make_optimizer, data, model_seed=0):
    torch.manual_seed(model_seed)
    model = Shop()
    return model, make_optimizer(model.parameters()), DataLoader(data, batch_size=BATCH * comm.size)


def equal_on_all_ranks(comm, tensor: torch.Tensor) -> bool:
    mine = tensor.detach().double().reshape(-1).numpy().copy()
    of_rank_0 = mine.copy()
    comm.Bcast(of_rank_0)
    return np.array_equal(mine, of_rank_0)


def assert_full_state_is(comm, model, optimizer, twin, twin_optimizer):
    """Rank 0 gets what plain PyTorch has, the others nothing."""
    weights, state = adaloader.full_state_dict(model), adaloader.full_optimizer_state_dict(model, optimizer)
    if comm.rank:
        assert (weights, state) == ({}, {})
    else:
        assert_same_tensors(weights, twin.state_dict())
        assert_same_optimizer_state(state, twin_optimizer.state_dict())
    return weights, state


def test_round_trip_through_rank_0_continues_as_plain(comm, seed, make_optimizer):
    data = Visits(61, seed)
    model, optimizer, loader = managed(comm, make_optimizer, data)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    train(model, optimizer, loader), train(twin, twin_optimizer, plain_loader)
    weights, state = assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    train(model, optimizer, loader)  # the saved tensors are no views of what goes on
    close(comm, loader)

    again, again_optimizer, again_loader = managed(comm, make_optimizer, data, model_seed=5)
    adaloader.load_full_state_dict(again, None if comm.rank else weights)
    adaloader.load_full_optimizer_state_dict(again, again_optimizer, None if comm.rank else state)
    assert_full_state_is(comm, again, again_optimizer, twin, twin_optimizer)
    train(again, again_optimizer, again_loader), train(twin, twin_optimizer, plain_loader)
    assert_full_state_is(comm, again, again_optimizer, twin, twin_optimizer)
    for parameter in again.out.parameters():
        assert equal_on_all_ranks(comm, parameter)
        for value in again_optimizer.state[parameter].values():
            assert equal_on_all_ranks(comm, value)
    close(comm, again_loader)


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
def test_loading_within_an_iteration_is_seen_by_the_next_lookup(comm, seed, lookahead):
    data = Visits(63, seed)  # no rank is without a sample of the last batch
    make_optimizer = OPTIMIZERS["adagrad"]
    model, optimizer, loader = managed(comm, make_optimizer, data, lookahead=lookahead)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    torch.manual_seed(9)
    other = Shop()
    weights, state = other.state_dict(), make_optimizer(other.parameters()).state_dict()
    for number, (batch, whole) in enumerate(zip(loader, plain_loader, strict=True)):
        if number == 1:
            model(batch)  # looked up once before, and again after
            adaloader.load_full_state_dict(model, weights if comm.rank == 0 else {"other": 1})
            twin.load_state_dict(weights)
        if number == 2:
            adaloader.load_full_optimizer_state_dict(model, optimizer, state if comm.rank == 0 else None)
            twin_optimizer.load_state_dict(copy.deepcopy(state))
        if number == 3:
            assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
        expected = twin(whole)
        first, last = share_of(comm, len(whole["label"]))
        torch.testing.assert_close(model(batch), expected[first:last], rtol=1e-10, atol=1e-10)
        step(model, optimizer, batch), step(twin, twin_optimizer, whole)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    close(comm, loader)


def share_of(comm, samples: int) -> tuple[int, int]:
    sizes = [samples // comm.size + (rank < samples % comm.size) for rank in range(comm.size)]
    return sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1])


def test_what_does_not_fit_is_refused_on_every_rank_before_anything_changes(comm, seed):
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(61, seed))
    twin, twin_optimizer, plain_loader = plain(comm, OPTIMIZERS["adagrad"], Visits(61, seed))
    train(model, optimizer, loader), train(twin, twin_optimizer, plain_loader)
    weights, state = copy.deepcopy([twin.state_dict(), twin_optimizer.state_dict()])
    for change, message in (
        (lambda w: w.pop("user.weight"), "user.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra"),
        (lambda w: w.update({"item.weight": torch.zeros(3, 4)}), "item.weight"),
        (lambda w: w.update({"out.weight": torch.zeros(2, 17)}), "out.weight"),
    ):
        bad = {name: torch.full_like(value, 7) for name, value in weights.items()}
        change(bad)
        with pytest.raises(RuntimeError, match=message):
            adaloader.load_full_state_dict(model, bad if comm.rank == 0 else None)
        assert torch.all(model.scale == 2)
    with pytest.raises(RuntimeError, match="dict"):
        adaloader.load_full_state_dict(model, None)
    for change, message in (
        (lambda s: s["state"][1].pop("sum"), "'sum' of table 'user.weight' is missing"),
        (lambda s: s["state"][3].update(sum=torch.zeros(2, 4)), r"table 'item.weight' has shape \(2, 4\)"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"\[5\] parameters"),
        (lambda s: s.pop("state"), "state"),
    ):
        bad = copy.deepcopy(state)
        change(bad)
        with pytest.raises(ValueError, match=message):
            adaloader.load_full_optimizer_state_dict(model, optimizer, bad if comm.rank == 0 else None)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    train(model, optimizer, loader), train(twin, twin_optimizer, plain_loader)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    close(comm, loader)


def test_a_part_is_loaded_and_local_buffers_stay(comm, seed):
    """What rank 0's dictionary does not name is not touched, though ranks hold different values of a buffer."""
    model, optimizer, loader = managed(comm, OPTIMIZERS["sgd"], Visits(9, seed))
    model.scratch.fill_(comm.rank)
    model.scale.fill_(comm.rank)
    rows = torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    part = {"related.weight": rows, "out.bias": torch.full((1,), 3.0)}
    adaloader.load_full_state_dict(model, part if comm.rank == 0 else None, strict=False)
    assert model.scratch[0] == comm.rank and model.scale[0] == comm.rank
    assert model.out.bias.item() == 3.0
    ids = torch.arange(ITEMS)
    assert torch.equal(model.item(ids), rows) and torch.equal(model.related(ids), rows)
    close(comm, loader)


def test_too_little_memory_on_rank_0_is_said_on_every_rank(comm, seed, monkeypatch):
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(9, seed))
    needed = 8 * (USERS * 4 + WORDS * 3 + ITEMS * 4)
    monkeypatch.setattr(gathering, "free_bytes", lambda: needed - 1 if comm.rank == 0 else 1 << 60)
    for call in (
        lambda: adaloader.full_state_dict(model),
        lambda: adaloader.full_optimizer_state_dict(model, optimizer),
    ):
        with pytest.raises(MemoryError, match=f"{needed:,} bytes on rank 0, where {needed - 1:,} are free"):
            call()
    monkeypatch.setattr(gathering, "free_bytes", lambda: needed if comm.rank == 0 else 1)
    assert bool(adaloader.full_state_dict(model)) == (comm.rank == 0)
    close(comm, loader)


def test_hyperparameters_of_every_kind_come_from_rank_0(comm, seed):
    def make_optimizer(parameters):
        first, *rest = parameters
        groups = [{"params": rest, "lr": 0.05}, {"params": [first]}]
        return torch.optim.Adagrad(groups, lr=0.4, initial_accumulator_value=0.2)

    data = Visits(61, seed)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    schedule = torch.optim.lr_scheduler.ExponentialLR(twin_optimizer, 0.5)
    train(twin, twin_optimizer, plain_loader)
    schedule.step()
    saved = copy.deepcopy([twin.state_dict(), twin_optimizer.state_dict()])
    saved[1]["param_groups"][0]["note"] = ("text", [1, None, True], {"k": 0.1})
    model, optimizer, loader = managed(comm, make_optimizer, data, model_seed=3)
    adaloader.load_full_state_dict(model, saved[0] if comm.rank == 0 else None)
    adaloader.load_full_optimizer_state_dict(model, optimizer, saved[1] if comm.rank == 0 else None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.2]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 0.4]
    assert optimizer.param_groups[0].pop("note") == ("text", [1, None, True], {"k": 0.1})
    train(model, optimizer, loader), train(twin, twin_optimizer, plain_loader)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    close(comm, loader)


def test_two_models_export_beside_each_other(comm, seed):
    data = Visits(17, seed)
    first = managed(comm, OPTIMIZERS["sgd"], data)
    second = managed(comm, OPTIMIZERS["adagrad"], data, model_seed=4)
    weights = [adaloader.full_state_dict(m[0]) for m in (first, second)]
    adaloader.load_full_state_dict(second[0], weights[0])
    exported = adaloader.full_state_dict(second[0])
    if comm.rank == 0:
        assert not torch.equal(weights[0]["item.weight"], weights[1]["item.weight"])
        assert_same_tensors(exported, weights[0], 0)
    close(comm, first[2]), close(comm, second[2])


def test_a_model_without_dense_parameters_and_one_without_tables(comm, seed):
    for model in (nn.Embedding(30, 2), nn.Linear(2, 1)):
        optimizer = torch.optim.Adagrad(model.parameters())
        loader = AdaLoader(range(10), model=model, optimizer=optimizer, min_rows=1)
        new = {name: torch.full(value.shape, 2.0) for name, value in model.named_parameters()}
        adaloader.load_full_state_dict(model, new if comm.rank == 0 else None)
        state = adaloader.full_optimizer_state_dict(model, optimizer)
        adaloader.load_full_optimizer_state_dict(model, optimizer, state)
        exported = adaloader.full_state_dict(model)
        if comm.rank == 0:
            assert_same_tensors(exported, new, 0)
        close(comm, loader)


class Aside(Shop):
    """Looks the shelf up only when told to."""

    def forward(self, batch, aside=True):
        shelf = torch.zeros(len(batch["label"]), 2).double() if not aside else self.shelf[batch["item"] % SHELVES]
        parts = [self.user(batch["user"]), self.words(batch["words"]), self.item(batch["item"])]
        return self.out(torch.cat([*parts, self.related(batch["related"]), shelf], dim=1)).squeeze(1)


def test_a_bare_table_that_some_ranks_have_not_used_yet_is_exported_and_loaded(comm, seed):
    torch.manual_seed(0)
    model = Aside()
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = AdaLoader(Visits(63, seed), batch_size=BATCH, model=model, optimizer=optimizer, min_rows=1)
    torch.manual_seed(0)
    twin = Aside()
    twin_optimizer = OPTIMIZERS["adagrad"](twin.parameters())
    with torch.no_grad():
        batch = next(iter(loader))
        model(batch, aside=comm.rank == comm.size - 1)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    new = {name: value + 1 for name, value in twin.state_dict().items()}
    adaloader.load_full_state_dict(model, new if comm.rank == 0 else None)
    twin.load_state_dict(new)
    assert_full_state_is(comm, model, optimizer, twin, twin_optimizer)
    assert torch.equal(model.shelf[torch.arange(5)], twin.shelf[:5])
    close(comm, loader)


@pytest.mark.ranks(2)
def test_a_parameter_used_in_two_ways_before_the_first_step_is_dense_on_every_rank(comm, seed):
    model = Aside()
    loader = AdaLoader(Visits(63, seed), batch_size=BATCH, model=model, min_rows=1)
    model.shelf[torch.tensor([1])] if comm.rank == 0 else model.shelf.sum()
    whole = adaloader.full_state_dict(model)
    assert type(model.shelf) is torch.nn.Parameter
    if comm.rank == 0:
        assert torch.equal(whole["shelf"], model.shelf.detach())
    close(comm, loader)


def test_state_is_taken_before_the_last_loader_is_closed(comm, seed):
    """Ranks part there, and none can gather any more: one process has all rows, and goes on."""
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(61, seed))
    other = AdaLoader(Visits(17, seed), batch_size=BATCH, model=model, optimizer=optimizer, min_rows=1)
    train(model, optimizer, loader)
    close(comm, other)
    weights = adaloader.full_state_dict(model)
    state = adaloader.full_optimizer_state_dict(model, optimizer)
    loader.close()
    calls = [
        lambda: adaloader.full_state_dict(model),
        lambda: adaloader.full_optimizer_state_dict(model, optimizer),
        lambda: adaloader.load_full_state_dict(model, weights),
        lambda: adaloader.load_full_optimizer_state_dict(model, optimizer, state),
    ]
    for call in calls:
        if comm.size > 1:
            with pytest.raises(RuntimeError, match=rf"{comm.size} ranks .* have parted; call .* before loader.close"):
                call()
        else:
            call()
    if comm.size == 1:
        assert_same_tensors(adaloader.full_state_dict(model), weights, 0)


def test_the_next_loader_is_built_before_the_last_one_is_closed(comm, seed):
    data = Visits(61, seed)
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], data)
    train(model, optimizer, loader)

    def another(size):
        return AdaLoader(data, batch_size=size, model=model, optimizer=optimizer, min_rows=1)

    following = another(BATCH + 1)
    close(comm, loader)
    train(model, optimizer, following)
    close(comm, following)
    if comm.size == 1:
        last = another(BATCH + 2)
        train(model, optimizer, last)
        last.close()
        return
    with pytest.raises(RuntimeError, match=rf"{comm.size} ranks .* have parted: build the next loader before closing"):
        another(BATCH + 2)
    with pytest.raises(RuntimeError, match="was closed; close it after the model's last pass"):
        iter(following)
