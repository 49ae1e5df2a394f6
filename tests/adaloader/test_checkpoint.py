"""Checkpoints on one process: what is in them, leaving by them, coming from plain tensors, and what does not fit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader, CheckpointError, full_state_dict
from adaloader.checkpoint.layout import complete_in, read_index
from adaloader.command_line import main
from tests.resuming import OPTIMIZERS, Script, assert_close, assert_identical, with_draws


def begun(optimizer="adagrad", batches=5, **options) -> Script:
    return Script(None, optimizer, **options).start().run(batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, seed, optimizer, dtype):
    before = random.Random(seed).randrange(20)
    whole = Script(None, optimizer, dtype, 0.2, seed=seed).start().run(before)
    whole.save(tmp_path / "saved")
    done = len(whole.losses)
    whole.run(20)
    expected = whole.state()
    resumed = Script(None, optimizer, dtype, 0.2, seed=seed).start(model_seed=seed + 1)
    resumed.load(tmp_path / "saved")
    resumed.run(20)
    assert resumed.losses == whole.losses[done:]
    assert_identical(resumed.state(), expected)
    whole.close(), resumed.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_goes_back_to_its_checkpoint_repeats_itself(tmp_path, seed, optimizer):
    run = Script(None, optimizer, torch.float64, seed=seed).start().run(7)
    run.save(tmp_path / "saved")
    done = len(run.losses)
    run.run(9)
    expected, losses = run.state(), run.losses[done:]
    run.load(tmp_path / "saved")
    run.iterator, done = None, len(run.losses)  # the loop that was under way is over
    run.run(9)
    assert run.losses[done:] == losses
    assert_identical(run.state(), expected)
    run.close()


@pytest.mark.parametrize("lookahead", [0, 1, 5, 40])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_reading_draws_is_drawn_again(tmp_path, seed, lookahead, shuffle):
    """A `collate_fn` that draws, and dropout, which draws from the same generator; resumed twice, over passes."""
    options = {"collate_fn": with_draws, "lookahead": lookahead, "shuffle": shuffle}
    rng = random.Random(seed)
    parts = [rng.randrange(20) for _ in range(3)]
    whole = Script(None, "adagrad", torch.float64, 0.2, seed=seed, options=options).start().run(parts[0])
    whole.save(tmp_path / "0")
    done = len(whole.losses)
    whole.run(parts[1]).run(parts[2])
    expected, losses = whole.state(), []
    for at, batches in enumerate(parts[1:]):
        resumed = Script(None, "adagrad", torch.float64, 0.2, seed=seed, options=options).start(model_seed=at)
        resumed.load(tmp_path / str(at))
        resumed.run(batches)
        losses += resumed.losses
        if at == 0:
            resumed.save(tmp_path / "1")
            resumed.close()
    assert losses == whole.losses[done:], parts
    assert_identical(resumed.state(), expected)
    whole.close(), resumed.close()


def test_a_checkpoint_before_the_resumed_run_has_read_again_keeps_the_draws(tmp_path, seed):
    options = {"collate_fn": with_draws, "lookahead": 4}
    whole = Script(None, "sgd", torch.float64, 0.2, seed=seed, options=options).start().run(6)
    whole.save(tmp_path / "first")
    whole.run(9)
    between = Script(None, "sgd", torch.float64, 0.2, seed=seed, options=options).start()
    between.load(tmp_path / "first")
    between.save(tmp_path / "second")
    resumed = Script(None, "sgd", torch.float64, 0.2, seed=seed, options=options).start()
    resumed.load(tmp_path / "second")
    resumed.run(9)
    assert resumed.losses == whole.losses[6:]
    whole.close(), between.close(), resumed.close()


def test_a_new_pass_after_an_abandoned_resumption_draws_anew(tmp_path, seed):
    options = {"collate_fn": with_draws, "lookahead": 4, "shuffle": False}
    saved = Script(None, "sgd", torch.float64, seed=seed, options=options).start().run(6)
    saved.save(tmp_path / "saved")
    resumed = Script(None, "sgd", torch.float64, seed=seed, options=options).start()
    resumed.load(tmp_path / "saved")
    iter(resumed.loader)  # and nothing is taken from it
    seen = []
    for loader in (resumed.loader, torch.utils.data.DataLoader(resumed.loader.dataset, 4, collate_fn=with_draws)):
        batches = iter(loader)
        torch.manual_seed(seed), np.random.seed(seed % 2**31), random.seed(seed)
        seen.append([next(batches)["ids"] for _ in range(5)])
    assert all(map(torch.equal, *seen))
    saved.close(), resumed.close()


def test_saving_changes_nothing(tmp_path, seed):
    one, other = (Script(None, "adam", torch.float32, 0.2, seed=seed).start() for _ in range(2))
    states = []
    for script, saves in ((one, True), (other, False)):
        script.start()
        for _ in range(9):
            script.run(3)
            if saves:
                script.save(tmp_path / "saved")
        states.append(script.state())
    assert one.losses == other.losses
    assert_identical(*states)
    one.close(), other.close()


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "momentum"])
def test_exported_file_is_the_state_dict(tmp_path, seed, optimizer):
    safetensors = pytest.importorskip("safetensors.torch")
    script = begun(optimizer, 7, seed=seed, samples=40)
    script.save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out.safetensors")]) == 0
    exported = safetensors.load_file(tmp_path / "out.safetensors")
    expected = full_state_dict(script.model)
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.safetensors", "saved"]
    script.close()


@pytest.mark.parametrize(
    "out, message",
    [
        ("", "is a folder"),
        (".", "is a folder"),
        ("/", "is a folder"),
        ("nowhere/..", "is a folder"),
        ("folder", "is a folder and would be replaced"),
        ("pipe", "is a device, pipe or socket and would be replaced"),
        ("link", "is a link and would be replaced"),
        ("run/step-000000000002/index.json", "lies in the checkpoint"),
        ("run/step-000000000004/new", "lies in the checkpoint"),
        ("aside/new", "lies in the checkpoint"),
        ("file/new", "cannot be written"),
        ("x" * 254, "cannot be written"),
    ],
)
def test_export_replaces_nothing_but_files(tmp_path, monkeypatch, capsys, out, message):
    script = begun(batches=0)
    script.loader.checkpoint(tmp_path / "run", every_steps=2)
    script.run(5)
    script.close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("of somebody")
    (tmp_path / "aside").symlink_to("run/step-000000000002")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", "run", out]) == 1
    said = capsys.readouterr().err
    assert message in said and f"adaloader: {os.path.normpath(out or '.')[:20]}" in said.replace("nowhere/..", ".")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["inspect", "run/step-000000000002"]) == 0
    assert main(["export", "run", "file"]) == 0
    assert (tmp_path / "file").stat().st_size > 100


def test_inspect_of_a_file_says_so(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file, not a folder: pass the folder" in capsys.readouterr().err


def test_inspect_ends_quietly_when_nobody_reads_on(tmp_path):
    script = begun()
    script.save(tmp_path)
    script.close()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "adaloader", "inspect", str(tmp_path)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_files_are_such_as_the_safetensors_library_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    script = begun("adagrad")
    script.save(tmp_path)
    index = read_index(tmp_path)
    tensors = safetensors.load_file(tmp_path / index.data / index.files[0].name)
    rows = tensors["rows/built.weight"]
    assert torch.equal(tensors["values/built.weight"], full_state_dict(script.model)["built.weight"][rows])
    script.close()


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


def test_extra_comes_back_as_it_was(tmp_path):
    script = begun()
    extra = {
        "numbers": [1, -2.5, float("inf"), float("-inf"), None, True, 10**30],
        "nested": {"a": (1, {"b": torch.arange(3, dtype=torch.int16)}), 3: "three", (1, 2): b"bytes\x00"},
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "number": np.float64(0.1),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "text": "ä/../\n",
        "scheduler": script.scheduler,
    }
    adaloader.save(tmp_path, script.loader, extra)
    got = adaloader.load(tmp_path, script.loader)
    assert got["numbers"] == extra["numbers"] and got["text"] == extra["text"]
    assert got["nested"][3] == "three" and got["nested"][1, 2] == b"bytes\x00"
    assert torch.equal(got["nested"]["a"][1]["b"], extra["nested"]["a"][1]["b"])
    assert np.array_equal(got["array"], extra["array"]) and got["number"].dtype == np.float64
    assert torch.equal(got["half"], extra["half"]) and got["empty"].shape == (0, 3)
    assert got["scheduler"] == script.scheduler.state_dict()
    script.close()


@pytest.mark.parametrize("what", [object(), {"deep": [lambda: 0]}, np.array(["a"], object)])
def test_what_cannot_be_saved_is_named(tmp_path, what):
    script = begun()
    with pytest.raises(CheckpointError, match="own/extra/what.* cannot be saved"):
        adaloader.save(tmp_path / "saved", script.loader, {"what": what})
    assert not (tmp_path / "saved").exists()
    script.close()


def test_inspect_lists_and_verifies(tmp_path, capsys):
    script = begun("adam")
    script.save(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for text in ("5 steps, saved by 1 rank(s)", "of 211 rows x 4 float64, adam with exp_avg, exp_avg_sq", "out.weight"):
        assert text in said
    assert "extra: scheduler, losses" in said and "verified" in said
    script.close()


def test_saving_again_leaves_one_checkpoint(tmp_path):
    script = begun()
    for _ in range(3):
        script.save(tmp_path)
        script.run(1)
    assert len(list(tmp_path.iterdir())) == 2  # the index, and its data
    script.close()


def test_loop_that_is_under_way_is_over(tmp_path, seed):
    script = begun(batches=3, seed=seed)
    script.save(tmp_path)
    first = script.run(4).losses[3:]
    script.load(tmp_path)
    script.iterator = None
    assert script.run(4).losses[7:] == first
    script.close()


def test_rows_touched_before_the_load_are_forgotten(tmp_path, seed):
    begun(batches=1, seed=seed).save(tmp_path)
    used = begun(batches=9, seed=seed + 1)
    used.load(tmp_path)
    state = used.state()
    fresh = Script(None, seed=seed).start()
    fresh.load(tmp_path)
    assert_identical(state, fresh.state())
    used.close(), fresh.close()


@pytest.mark.parametrize("ahead", [0, 1])
def test_periodic_checkpoints_resume_where_the_loop_was(tmp_path, seed, ahead):
    """Also of loops that hold the next batch while they work on one."""

    def loop(script, most):
        done, held = 0, []
        for batch in script.loader:
            held.append(batch)
            if len(held) > ahead:
                work(script, held.pop(0))
                done += 1
                if done == most:
                    return
        for batch in held:
            work(script, batch)

    def work(script, batch):
        script.optim.zero_grad()
        loss = nn.functional.mse_loss(script.model(batch), batch["label"])
        loss.backward()
        script.optim.step()
        script.scheduler.step()
        script.losses.append(loss.item())
        script.seen += batch["at"].tolist()

    first = Script(None, seed=seed).start()
    first.loader.checkpoint(tmp_path, every_steps=3, keep=2, extra=lambda: {"scheduler": first.scheduler})
    loop(first, 10 + ahead)
    names = [each.name for each in complete_in(tmp_path)]
    assert names == ["step-000000000006", "step-000000000009"]
    whole = Script(None, seed=seed).start()
    loop(whole, 100)
    resumed = Script(None, seed=seed).start(model_seed=seed + 1)
    assert resumed.load(tmp_path).steps == 9
    loop(resumed, 100)
    assert resumed.losses == whole.losses[9:] and resumed.seen == whole.seen[36:]
    first.close(), whole.close(), resumed.close()


def test_periodic_checkpoints_wait_for_the_step(tmp_path, seed):
    """A loop that accumulates two batches has a gradient that is not saved after each first."""
    script = Script(None, seed=seed).start()
    script.loader.checkpoint(tmp_path, every_minutes=1e-9, keep=99)
    for number, batch in enumerate(script.loader):
        nn.functional.mse_loss(script.model(batch), batch["label"]).backward()
        if number % 2:
            script.optim.step()
            script.optim.zero_grad()
    indices = [read_index(each) for each in complete_in(tmp_path)]
    assert len(indices) > 3
    for index in indices:
        position = json.dumps(index.of_ranks[0]["position"])
        assert f'["_num_yielded", {2 * index.steps}]' in position
    script.close()


def test_full_disk_is_said_and_the_run_goes_on(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    script = Script(None).start()
    script.loader.checkpoint(tmp_path, every_steps=2)
    script.run(3)
    before = [each.name for each in complete_in(tmp_path)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large.*intact"):
            script.save(tmp_path / "by hand")
        script.run(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.name for each in complete_in(tmp_path)] == before
    assert "the run goes on" in capsys.readouterr().err
    script.run(3)
    assert len(complete_in(tmp_path)) == 2
    script.close()


def test_argument_errors(tmp_path):
    script = begun()
    for options in ({"every_steps": 0}, {"every_minutes": -1}, {"keep": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            script.loader.checkpoint(tmp_path, **options)
    with pytest.raises(ValueError, match="manages no model"):
        adaloader.save(tmp_path, AdaLoader([1, 2]))
    with pytest.raises(CheckpointError, match="does not exist"):
        adaloader.load(tmp_path / "nowhere", script.loader)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        adaloader.load(tmp_path, script.loader)
    script.save(tmp_path)
    with pytest.raises(CheckpointError, match="nothing was saved as extra"):
        adaloader.load(tmp_path, script.loader, extra={"other": script.scheduler})
    script.close()


def test_wrapped_loader_goes_on(tmp_path, seed):
    def make():
        torch.manual_seed(seed)
        model = nn.Embedding(50, 3)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        batches = [torch.randint(0, 50, (4,), generator=torch.Generator().manual_seed(at)) for at in range(9)]
        return model, optimizer, AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1)

    def train(model, optimizer, loader, at=None):
        for number, ids in enumerate(loader):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
            if number == at:
                adaloader.save(tmp_path, loader)
        return full_state_dict(model)["weight"]

    expected = train(*(first := make()), at=4)
    second = make()
    adaloader.load(tmp_path, second[2])
    assert torch.equal(train(*second), expected)
    first[2].close(), second[2].close()


def test_close_states_are_told_apart():
    """The comparison that these tests rest on sees one bit."""
    with pytest.raises(AssertionError):
        assert_identical({"a": torch.tensor(1.0)}, {"a": torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))})
    with pytest.raises(AssertionError):
        assert_close({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.1)}, 1e-3)
