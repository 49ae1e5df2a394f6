"""One process: state_dict() and load_state_dict() of the model and the optimizer are those of plain PyTorch."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import adaloader
from adaloader import AdaLoader
from adaloader.memory import free_memory
from adaloader.model import gathering
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_optimizer_state, assert_same_tensors, step, train


@pytest.fixture(params=sorted(OPTIMIZERS))
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def managed(make_optimizer, data, batch_size=5, model_seed=0, **options):
    torch.manual_seed(model_seed)
    model = Shop()
    optimizer = make_optimizer(model.parameters())
    return (
        model,
        optimizer,
        AdaLoader(data, batch_size=batch_size, model=model, optimizer=optimizer, min_rows=1, **options),
    )


def plain(make_optimizer, data, batch_size=5, model_seed=0):
    torch.manual_seed(model_seed)
    model = Shop()
    return model, make_optimizer(model.parameters()), DataLoader(data, batch_size=batch_size)


def both(make_optimizer, seed, **options):
    data = Visits(33, seed)
    return managed(make_optimizer, data, **options), plain(make_optimizer, data)


def test_state_dicts_are_those_of_plain_training(make_optimizer, seed):
    ours, theirs = both(make_optimizer, seed)
    assert_same_tensors(ours[0].state_dict(), theirs[0].state_dict(), 0)
    assert_same_optimizer_state(ours[1].state_dict(), theirs[1].state_dict(), 0)
    train(*ours), train(*theirs)
    assert_same_tensors(ours[0].state_dict(), theirs[0].state_dict())
    assert_same_tensors(ours[0].state_dict(prefix="a."), theirs[0].state_dict(prefix="a."))
    assert_same_tensors(ours[0].item.state_dict(), theirs[0].item.state_dict())
    assert_same_optimizer_state(ours[1].state_dict(), theirs[1].state_dict())
    assert_same_tensors(adaloader.full_state_dict(ours[0]), theirs[0].state_dict())
    assert_same_optimizer_state(adaloader.full_optimizer_state_dict(*ours[:2]), theirs[1].state_dict())


def test_what_is_saved_continues_in_plain_pytorch(make_optimizer, seed):
    (model, optimizer, loader), theirs = both(make_optimizer, seed)
    train(model, optimizer, loader), train(*theirs)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = plain(make_optimizer, loader.dataset, model_seed=7)
    again[0].load_state_dict(weights)
    again[1].load_state_dict(state)
    train(*again), train(*theirs), train(model, optimizer, loader)
    assert_same_tensors(again[0].state_dict(), theirs[0].state_dict())
    assert_same_tensors(model.state_dict(), theirs[0].state_dict())


@pytest.mark.parametrize("when", ["before the loader", "after the loader", "by the collective forms"])
def test_what_plain_pytorch_saved_continues_here(make_optimizer, seed, when):
    data = Visits(33, seed)
    theirs = plain(make_optimizer, data)
    train(*theirs)
    saved = copy.deepcopy([theirs[0].state_dict(), theirs[1].state_dict()])
    torch.manual_seed(8)
    model = Shop()
    optimizer = make_optimizer(model.parameters())

    def load():
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])

    if when == "before the loader":
        load()
    loader = AdaLoader(data, batch_size=5, model=model, optimizer=optimizer, min_rows=1)
    if when == "after the loader":
        load()
    if when == "by the collective forms":
        adaloader.load_full_state_dict(model, saved[0])
        adaloader.load_full_optimizer_state_dict(model, optimizer, saved[1])
    assert_same_tensors(model.state_dict(), saved[0], 0)
    assert_same_optimizer_state(optimizer.state_dict(), saved[1], 0)
    train(*theirs), train(model, optimizer, loader)
    assert_same_tensors(model.state_dict(), theirs[0].state_dict())
    assert_same_optimizer_state(optimizer.state_dict(), theirs[1].state_dict())


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
def test_loading_between_steps_is_seen_by_the_next_lookup(make_optimizer, seed, lookahead):
    ours, theirs = both(make_optimizer, seed, lookahead=lookahead)
    torch.manual_seed(9)
    other = Shop()
    saved = [other.state_dict(), make_optimizer(other.parameters()).state_dict()]
    outputs = []
    for model, optimizer, loader in (ours, theirs):
        seen = []
        for number, batch in enumerate(loader):
            seen.append(model(batch))
            if number in (2, 4):  # after a lookup of this batch, and with others read ahead
                model.load_state_dict(saved[0])
                seen.append(model(batch))
            if number == 3:
                optimizer.load_state_dict(copy.deepcopy(saved[1]))  # PyTorch keeps its tensors
            step(model, optimizer, batch)
        outputs.append(torch.cat(seen))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    assert_same_tensors(ours[0].state_dict(), theirs[0].state_dict())
    assert_same_optimizer_state(ours[1].state_dict(), theirs[1].state_dict())


def test_a_saved_state_does_not_change_with_training(make_optimizer, seed):
    model, optimizer, loader = managed(make_optimizer, Visits(33, seed))
    train(model, optimizer, loader)
    weights, state = model.state_dict(), optimizer.state_dict()
    before = copy.deepcopy([weights["user.weight"], weights["item.weight"], state["state"]])
    train(model, optimizer, loader)
    assert torch.equal(weights["user.weight"], before[0]) and torch.equal(weights["item.weight"], before[1])
    if state["state"]:
        assert torch.equal(state["state"][0]["sum"], before[2][0]["sum"])


def test_a_dictionary_that_does_not_fit_is_refused_before_anything_changes(seed):
    model, optimizer, loader = managed(OPTIMIZERS["adagrad"], Visits(33, seed))
    train(model, optimizer, loader)
    weights, state = model.state_dict(), optimizer.state_dict()
    for change, message in (
        (lambda w: w.pop("user.weight"), "user.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra"),
        (lambda w: w.update({"item.weight": torch.zeros(3, 4)}), "item.weight"),
        (lambda w: w.update({"out.bias": torch.zeros(2)}), "out.bias"),
    ):
        bad = {name: torch.full_like(value, 7) for name, value in weights.items()}
        change(bad)
        with pytest.raises(RuntimeError, match=message):
            adaloader.load_full_state_dict(model, bad)
        assert_same_tensors(model.state_dict(), weights, 0)
    for change, message in (
        (lambda s: s["state"][1].pop("sum"), "'sum' of table 'user.weight' is missing"),
        (lambda s: s["state"].pop(0), "'sum' of table 'shelf' is missing"),
        (lambda s: s["state"][3].update(sum=torch.zeros(2, 4)), r"table 'item.weight' has shape \(2, 4\)"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"\[5\] parameters"),
        (lambda s: s.pop("state"), "state"),
    ):
        bad = copy.deepcopy(state)
        for entry in bad["state"].values():
            entry["sum"] += 1
        change(bad)
        with pytest.raises(ValueError, match=message):
            adaloader.load_full_optimizer_state_dict(model, optimizer, bad)
        if "state" in bad:
            with pytest.raises(ValueError):
                optimizer.load_state_dict(bad)
        assert_same_optimizer_state(optimizer.state_dict(), state, 0)


def test_a_part_is_loaded_without_strict(seed):
    ours, theirs = both(OPTIMIZERS["sgd"], seed)
    part = {
        "related.weight": torch.randn(53, 4, dtype=torch.float64),
        "out.bias": torch.ones(1).double(),
        "x": torch.ones(1),
    }
    theirs[0].load_state_dict(part, strict=False)
    adaloader.load_full_state_dict(ours[0], part, strict=False)
    assert_same_tensors(ours[0].state_dict(), theirs[0].state_dict(), 0)


def test_hooks_that_rename_entries_are_respected(seed):
    model, optimizer, loader = managed(OPTIMIZERS["sgd"], Visits(9, seed))

    def rename(module, state_dict, prefix, *_):
        if prefix + "old" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")

    model.user.register_load_state_dict_pre_hook(rename)
    weights = model.state_dict()
    weights["user.old"] = weights.pop("user.weight") + 1
    adaloader.load_full_state_dict(model, weights)
    assert torch.equal(model.state_dict()["user.weight"], weights["user.old"])


def test_float32_values_are_converted(seed):
    model, _, _ = managed(OPTIMIZERS["sgd"], Visits(9, seed))
    weights = {name: value.float() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    assert_same_tensors(model.state_dict(), {name: value.double() for name, value in weights.items()}, 0)


def test_groups_and_schedules_survive(seed):
    def make_optimizer(parameters):
        first, *rest = parameters
        groups = [{"params": rest, "lr": 0.05}, {"params": [first]}]
        return torch.optim.Adagrad(groups, lr=0.4, initial_accumulator_value=0.2)

    ours, theirs = both(make_optimizer, seed)
    for model, optimizer, loader in (ours, theirs):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, optimizer, loader)
        schedule.step()
    assert_same_optimizer_state(ours[1].state_dict(), theirs[1].state_dict())
    again = managed(make_optimizer, Visits(33, seed), model_seed=5)
    adaloader.load_full_state_dict(again[0], theirs[0].state_dict())
    adaloader.load_full_optimizer_state_dict(*again[:2], copy.deepcopy(theirs[1].state_dict()))
    assert [group["lr"] for group in again[1].param_groups] == [0.025, 0.2]
    train(*again), train(*theirs)
    assert_same_tensors(again[0].state_dict(), theirs[0].state_dict())


def test_only_what_a_loader_manages_can_be_exported(seed):
    model, optimizer, loader = managed(OPTIMIZERS["sgd"], Visits(9, seed))
    with pytest.raises(ValueError, match="no AdaLoader manages this Shop"):
        adaloader.full_state_dict(Shop())
    with pytest.raises(ValueError, match="no AdaLoader manages this Linear"):
        adaloader.load_full_state_dict(nn.Linear(1, 1), {})
    stranger = torch.optim.SGD(model.out.parameters(), lr=1)
    for call in (adaloader.full_optimizer_state_dict, lambda m, o: adaloader.load_full_optimizer_state_dict(m, o, {})):
        with pytest.raises(ValueError, match="this SGD was given to no AdaLoader"):
            call(model, stranger)


def test_gathering_says_what_it_takes_and_stops_short_of_it(seed, monkeypatch, caplog):
    model, optimizer, loader = managed(OPTIMIZERS["adagrad"], Visits(9, seed))
    needed = 8 * (41 * 4 + 30 * 3 + 53 * 4)
    with caplog.at_level(logging.INFO, "adaloader"):
        adaloader.full_state_dict(model)
    assert f"takes {needed:,} bytes" in caplog.text
    monkeypatch.setattr(gathering, "free_bytes", lambda: needed - 1)
    for call in (
        lambda: adaloader.full_state_dict(model),
        lambda: adaloader.full_optimizer_state_dict(model, optimizer),
    ):
        with pytest.raises(MemoryError, match=f"{needed:,} bytes on rank 0, where {needed - 1:,} are free"):
            call()
    monkeypatch.setattr(gathering, "free_bytes", lambda: needed)
    assert len(adaloader.full_state_dict(model)) == 8
    monkeypatch.setattr(gathering, "free_bytes", lambda: -1)  # a system that does not say
    assert len(adaloader.full_state_dict(model)) == 8


@pytest.mark.parametrize("names", free_memory._CGROUP_FILES)
def test_a_containers_limit_counts(tmp_path, monkeypatch, names):
    limit, usage = (tmp_path / name for name in names)
    limit.write_text("1000000\n"), usage.write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50000\nactive_file 1000\n")
    monkeypatch.setattr(free_memory, "_CGROUPS", (str(tmp_path / "absent"), str(tmp_path)))
    assert free_memory.free_bytes() == 751000
    limit.write_text("max\n")
    assert free_memory.free_bytes() > 751000


def test_loading_keeps_a_pending_gradient_and_the_optimizers_state(seed):
    ours, theirs = both(OPTIMIZERS["adagrad"], seed)
    torch.manual_seed(3)
    other = Shop().state_dict()
    for model, optimizer, loader in (ours, theirs):
        for number, batch in enumerate(loader):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch), batch["label"]).backward()
            if number == 3:
                model.load_state_dict(other)
            optimizer.step()
    assert_same_tensors(ours[0].state_dict(), theirs[0].state_dict())
    assert_same_optimizer_state(ours[1].state_dict(), theirs[1].state_dict())
