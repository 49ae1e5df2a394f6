"""Loading what may not fit: plain tensors, other models, and other optimizers, their options and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader, CheckpointError, full_state_dict
from tests.resuming import Script, begun


@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "state_dict"])
def test_plain_tensors_are_loaded(tmp_path, seed, kind):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(seed)
    script = begun(batches=2)
    state = full_state_dict(script.model)
    plain = {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in state.items()}
    path = tmp_path / "plain"
    if kind == "safetensors":
        safetensors.save_file(plain, path)
    else:
        torch.save(plain, path)
    restored = adaloader.load(plain if kind == "state_dict" else path, script.loader)
    assert restored == {} and restored.report == []
    after = full_state_dict(script.model)
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    script.run(2).close()


def test_plain_tensors_that_do_not_fit_are_refused_or_reported(tmp_path):
    script = begun(batches=1)
    plain = dict(full_state_dict(script.model))
    plain["built.weight"] = torch.zeros(3, 3, dtype=torch.float64)
    plain["surplus"] = plain.pop("out.bias")
    before = full_state_dict(script.model)
    with pytest.raises(CheckpointError, match="lacks 'out.bias'.*'built.weight' has shape.*'surplus' is not in"):
        adaloader.load(plain, script.loader)
    assert all(torch.equal(value, full_state_dict(script.model)[name]) for name, value in before.items())
    assert len(adaloader.load(plain, script.loader, strict=False).report) == 3
    script.close()


class Other(nn.Module):
    """Like the script's model, and not the same."""

    def __init__(self, rows=37, dim=3, dtype=torch.float64, extra=False):
        super().__init__()
        self.built = nn.Embedding(rows, dim, dtype=dtype)
        self.out = nn.Linear(9, 1, dtype=dtype)
        if extra:
            self.more = nn.Linear(2, 2, dtype=dtype)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "'declared.weight' is not in the model"),
        ({"rows": 40}, r"'built.weight' has shape \[37, 3\] in it and \[40, 3\]"),
        ({"dtype": torch.float32}, "'built.weight' has dtype float64 in it and torch.float32"),
        ({"extra": True}, "the model's 'more.weight' is not in it"),
    ],
)
def test_other_model_is_refused_and_left_as_it_was(tmp_path, options, message):
    begun().save(tmp_path)
    model = Other(**options)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = AdaLoader([{"x": 1}], 1, model=model, optimizer=optimizer, min_rows=20)
    before = {name: value.clone() for name, value in full_state_dict(model).items()}
    with pytest.raises(CheckpointError, match=message):
        adaloader.load(tmp_path, loader)
    after = full_state_dict(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    if options in ({}, {"extra": True}):
        restored = adaloader.load(tmp_path, loader, strict=False)
        assert any("declared.weight" in line for line in restored.report)
        assert not torch.equal(full_state_dict(model)["built.weight"], before["built.weight"])
    loader.close()


def test_other_optimizer_is_refused_and_its_state_begins_anew_without_strict(tmp_path):
    saved = begun("adagrad")
    saved.save(tmp_path)
    other = Script(None, "adam").start()
    with pytest.raises(CheckpointError, match="'declared.weight' was trained under 'adagrad'.*'adam' now"):
        other.load(tmp_path)
    other.load(tmp_path, strict=False)
    values, expected = full_state_dict(other.model), full_state_dict(saved.model)
    assert torch.equal(values["declared.weight"], expected["declared.weight"])
    other.run(3).close(), saved.close()


SGD, Adam, Adagrad, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop


def with_optimizer(kind, dtype=torch.float32, min_rows=1, **options):
    """Return a model of a table and dense parameters, its optimizer and its loader, trained for some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 4, dtype=dtype), nn.Linear(4, 1, dtype=dtype))
    optimizer = kind(model.parameters(), lr=0.1, **options)
    loader = AdaLoader(torch.arange(30), 5, model=model, optimizer=optimizer, min_rows=min_rows)
    return model, optimizer, loader


def one_pass(model, optimizer, loader):
    for ids in loader:
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "kind, saved, now, min_rows",
    [
        (Adam, {}, {"amsgrad": True}, 1),
        (Adam, {"amsgrad": True}, {}, 1),
        (SGD, {}, {"momentum": 0.9}, 1),
        (SGD, {"momentum": 0.9}, {}, 1),
        (RMSprop, {}, {"centered": True}, 1),
        (Adam, {}, {"amsgrad": True}, 99),
    ],
)
def test_optimizer_whose_options_need_other_state_keeps_its_own_without_strict(tmp_path, kind, saved, now, min_rows):
    model, optimizer, loader = with_optimizer(kind, min_rows=min_rows, **saved)
    one_pass(model, optimizer, loader)
    adaloader.save(tmp_path, loader)
    loader.close()
    model, optimizer, loader = with_optimizer(kind, min_rows=min_rows, **now)
    with pytest.raises(CheckpointError, match=f"optimizer 0 is {kind.__name__}.*which has other state"):
        adaloader.load(tmp_path, loader)
    report = adaloader.load(tmp_path, loader, strict=False).report
    assert any("which has other state" in line for line in report)
    name = next(iter({**saved, **now}))
    assert optimizer.param_groups[0][name] == now.get(name, 0)
    one_pass(model, optimizer, loader)
    loader.close()


def test_table_that_was_dense_when_it_was_saved_is_trained_under_its_own_options(tmp_path):
    saved = with_optimizer(SGD, min_rows=99)
    one_pass(*saved)
    adaloader.save(tmp_path, saved[2])
    model, optimizer, loader = with_optimizer(SGD, momentum=0.9)
    assert len(adaloader.load(tmp_path, loader, strict=False).report) == 2
    one_pass(model, optimizer, loader)
    saved[2].close(), loader.close()


@pytest.mark.parametrize("kind", [Adam, Adagrad, SGD])
def test_state_of_parameters_of_another_dtype_begins_anew_without_strict(tmp_path, kind):
    saved = with_optimizer(kind)
    one_pass(*saved)
    adaloader.save(tmp_path, saved[2])
    model, optimizer, loader = with_optimizer(kind, torch.float64)
    report = adaloader.load(tmp_path, loader, strict=False).report
    assert [line for line in report if "dtype" in line] == report and len(report) == 3
    weight = full_state_dict(saved[0])["1.weight"]
    assert torch.equal(model[1].weight, weight.double())
    one_pass(model, optimizer, loader)
    assert all(v.dtype == torch.float64 for v in optimizer.state[model[1].weight].values() if v.ndim)
    saved[2].close(), loader.close()
