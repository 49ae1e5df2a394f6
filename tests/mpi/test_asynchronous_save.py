"""Checkpoints that ranks write while they train on: to the bit what a synchronous one holds, however rows move."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import adaloader
import pm
from adaloader.checkpoint import tensor_file, writing
from adaloader.checkpoint.layout import complete_in, read_index
from tests.resuming import Script, assert_identical

CASES = [
    ("adagrad", {"techniques": "all"}),
    ("adam", {"techniques": "all", "shared_memory": False}),
    ("sgd", {"techniques": "none", "lookahead": 0}),
    ("momentum", {"techniques": "relocation", "shared_memory": False}),
    ("rowwise", {"techniques": "replication"}),
    ("rmsprop", {"techniques": "relocation"}),
]


@pytest.fixture
def folder(shared_path: Path) -> Path:
    return shared_path


@pytest.fixture
def gate(monkeypatch):
    """An event that what is written waits for."""
    is_open = threading.Event()
    is_open.set()
    write = tensor_file.TensorFileWriter.write

    def held(writer, name, part):
        is_open.wait()
        write(writer, name, part)

    monkeypatch.setattr(tensor_file.TensorFileWriter, "write", held)
    yield is_open
    is_open.set()


@pytest.mark.parametrize("optimizer, options", CASES)
def test_resumed_run_is_the_one_that_went_on_while_it_was_saved(
    comm, seed, folder, monkeypatch, gate, optimizer, options
):
    monkeypatch.setattr("adaloader.checkpoint.tables._CHUNK_BYTES", 400)

    def script():
        samples = 4 * 15 * comm.size
        return Script(comm, optimizer, torch.float64, 0.2, samples, seed=seed, options=options)

    whole = script().start().run(4)
    gate.clear()
    saving = whole.save(folder / "saved", asynchronous=True)
    whole.run(3)
    assert not saving.done
    gate.set()
    whole.run(9)
    saved = saving.wait()
    assert saved.path == folder / "saved" and saved.stall_seconds < saved.seconds
    expected = whole.state()
    whole.close()
    resumed = script().start(model_seed=seed + 1)
    assert len(resumed.load(folder / "saved")["losses"]) == 4
    resumed.run(12)
    assert resumed.losses == whole.losses[4:]
    assert_identical(resumed.state(), expected)
    resumed.close()


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("staleness", [2, None])
def test_stale_run_is_what_it_was_at_the_cut(comm, seed, folder, monkeypatch, gate, staleness, shared_memory):
    monkeypatch.setattr("adaloader.checkpoint.tables._CHUNK_BYTES", 400)
    options = {"staleness": staleness, "shared_memory": shared_memory}
    script = Script(comm, "adagrad", samples=4 * 20 * comm.size, seed=seed, options=options).start().run(4)
    before = script.state()
    gate.clear()
    saving = script.save(folder / "saved", asynchronous=True)
    script.run(5)
    gate.set()
    saving.wait()
    script.close()
    again = Script(comm, "adagrad", samples=4 * 20 * comm.size, seed=seed, options=options).start(seed + 1)
    again.load(folder / "saved")
    after = again.state()
    for name in before:
        if name not in ("draw", "numpy"):
            assert torch.equal(before[name], after[name]), name
    again.close()


def test_failure_on_one_rank_is_every_rank_s_at_the_next_save(comm, seed, folder, monkeypatch):
    script = Script(comm, seed=seed, samples=4 * 20 * comm.size).start().run(2)
    script.save(folder / "saved")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        if comm.rank == comm.size - 1:
            failing.setattr(writing, "TensorFileWriter", full)
        saving = script.save(folder / "saved", asynchronous=True)
        script.run(2)
        while not saving.done:
            time.sleep(0.01)
    with pytest.raises(adaloader.CheckpointError, match=f"rank {comm.size - 1}: .*No space left"):
        script.save(folder / "saved", asynchronous=True)
    assert read_index(folder / "saved").steps == 2
    script.save(folder / "saved", asynchronous=True)
    script.close()
    assert read_index(folder / "saved").steps == 4


def test_loader_makes_them_by_itself_over_passes(comm, seed, folder):
    def script():
        return Script(comm, "adagrad", samples=4 * comm.size * 5 + 1, seed=seed)

    whole = script().start()
    whole.loader.checkpoint(folder, every_steps=2, keep=99, asynchronous=True, extra=lambda: {"s": whole.scheduler})
    whole.finish_pass().finish_pass()
    expected = whole.state()
    whole.close()
    path = complete_in(folder)[1]
    resumed = script().start(model_seed=seed + 3)
    adaloader.load(path, resumed.loader, extra={"s": resumed.scheduler})
    resumed.finish_pass()
    if read_index(path).steps < 6:
        resumed.finish_pass()
    assert_identical(resumed.state(), expected)
    resumed.close()


def test_rank_whose_disk_is_slow_is_named_with_the_remedy(comm, seed, folder, gate):
    """Those that have written wait for rank 0 no longer than for any other rank; the save goes on all the same."""
    script = Script(comm, seed=seed, options={"timeout_seconds": 2.0}).start().run(3)
    if comm.rank == 0:
        gate.clear()
        threading.Timer(4.0, gate.set).start()
    saving = script.save(folder / "saved", asynchronous=True)
    if comm.rank:
        with pytest.raises(pm.PeerError, match=r"=2\) for rank 0 to write its part; .*build the loader with more tim"):
            saving.wait()
    saving.wait()
    assert read_index(folder / "saved").steps == 3
    script.close()
