"""Checkpoints on one process: what is in them, and leaving and coming back by them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader, CheckpointError, full_state_dict
from adaloader.checkpoint.layout import complete_in, read_index
from tests.resuming import OPTIMIZERS, Script, assert_close, assert_identical, begun, with_draws


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


def test_files_are_such_as_the_safetensors_library_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    script = begun("adagrad")
    script.save(tmp_path)
    index = read_index(tmp_path)
    tensors = safetensors.load_file(tmp_path / index.data / index.files[0].name)
    rows = tensors["rows/built.weight"]
    assert torch.equal(tensors["values/built.weight"], full_state_dict(script.model)["built.weight"][rows])
    script.close()


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
