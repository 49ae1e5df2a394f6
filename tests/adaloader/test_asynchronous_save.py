"""Checkpoints that are written while training goes on: what is in them is what there was, to the bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import adaloader
from adaloader.checkpoint import tensor_file, writing
from adaloader.checkpoint.layout import complete_in, open_file, read_index
from tests.resuming import OPTIMIZERS, Script, assert_identical

UNHURRIED = {"lookahead": 0}
"""Reading ahead makes records of rows that are soon needed, at times that are not the same in two saves."""


def contents(folder) -> dict[str, bytes]:
    """Every tensor of every file of a checkpoint, and what the index says but for times and names of folders."""
    index = read_index(folder)
    found = {"index": repr((index.steps, index.configuration, index.tables, index.trees, index.of_ranks))}
    for rank in range(index.ranks):
        with open_file(folder, index, rank) as file:
            found |= {f"{rank}/{name}": file.tensor(name).numpy().tobytes() for name in file.tensors}
    return found


class Gate:
    """Once shut, holds the writing thread at each part until it is let on."""

    def __init__(self, monkeypatch):
        self.changed, self.allowed, self.is_shut = threading.Condition(), 0, False
        write = tensor_file.TensorFileWriter.write

        def held(writer, name, part):
            with self.changed:
                self.changed.wait_for(lambda: not self.is_shut or self.allowed > 0)
                self.allowed -= 1
            write(writer, name, part)

        monkeypatch.setattr(tensor_file.TensorFileWriter, "write", held)

    def shut(self) -> None:
        self.allowed, self.is_shut = 0, True

    def let(self, parts: int) -> None:
        with self.changed:
            self.allowed += parts
            self.changed.notify_all()

    def open(self) -> None:
        self.is_shut = False
        self.let(0)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_bit_equal_to_a_synchronous_one_while_rows_are_updated(tmp_path, seed, monkeypatch, gate, optimizer, dtype):
    """One record at a time is written, so that most are updated before it is their turn."""
    monkeypatch.setattr("adaloader.checkpoint.tables._CHUNK_BYTES", 1)
    script = Script(None, optimizer, dtype, seed=seed, options=UNHURRIED).start().run(3)
    script.save(tmp_path / "one")
    gate.shut()
    saving = script.save(tmp_path / "other", asynchronous=True)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        gate.let(int(rng.integers(0, 15)))
        script.run(1)
    assert not saving.done
    gate.open()
    assert saving.wait().path == tmp_path / "other"
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    script.loader.close()


@pytest.mark.parametrize("spare_bytes", [0, 1000])
def test_memory_for_rows_that_change_is_bounded_and_updates_wait_for_it(tmp_path, seed, monkeypatch, gate, spare_bytes):
    monkeypatch.setattr("adaloader.checkpoint.tables._CHUNK_BYTES", 1)
    script = Script(None, "adagrad", seed=seed, options=UNHURRIED).start().run(3)
    expected = script.save(tmp_path / "one") and contents(tmp_path / "one")
    gate.shut()
    saving = adaloader.save(
        tmp_path / "other",
        script.loader,
        {"scheduler": script.scheduler, "losses": script.losses},
        asynchronous=True,
        spare_bytes=spare_bytes,
    )
    before = len(script.losses)
    training = threading.Thread(target=lambda: script.run(3))
    training.start()
    training.join(0.2)
    assert training.is_alive() and len(script.losses) < before + 3
    gate.open()
    training.join()
    saved = saving.wait()
    assert saved.stall_seconds > 0 and contents(tmp_path / "other") == expected
    script.loader.close()


def test_run_goes_on_to_the_bit_from_a_checkpoint_written_meanwhile(tmp_path, seed):
    whole = Script(None, "adam", dropout=0.2, seed=seed).start().run(5)
    saving = whole.save(tmp_path / "saved", asynchronous=True)
    whole.run(20)
    saving.wait()
    expected = whole.state()
    resumed = Script(None, "adam", dropout=0.2, seed=seed).start(model_seed=seed + 1)
    resumed.load(tmp_path / "saved")
    resumed.run(20)
    assert resumed.losses == whole.losses[5:]
    assert_identical(resumed.state(), expected)
    whole.loader.close(), resumed.loader.close()


def test_failure_is_raised_by_the_next_save_once_and_nothing_is_lost(tmp_path, seed, monkeypatch):
    script = Script(None, seed=seed).start().run(2)
    script.save(tmp_path / "saved")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(writing, "TensorFileWriter", full)
        saving = script.save(tmp_path / "saved", asynchronous=True)
        while not saving.done:
            script.run(1)
    with pytest.raises(adaloader.CheckpointError, match="No space left.*saved before is intact"):
        script.save(tmp_path / "saved", asynchronous=True)
    assert read_index(tmp_path / "saved").steps == 2 and len(list((tmp_path / "saved").iterdir())) == 2
    script.save(tmp_path / "saved", asynchronous=True)
    script.loader.close()
    assert read_index(tmp_path / "saved").steps == script.loader.stats()["steps"]


def test_failure_is_raised_by_close_and_the_loader_is_closed(tmp_path, seed, monkeypatch):
    script = Script(None, seed=seed).start().run(2)
    monkeypatch.setattr(writing, "write_durably", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    script.save(tmp_path / "saved", asynchronous=True)
    with pytest.raises(adaloader.CheckpointError, match="Input/output error"):
        script.loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        iter(script.loader)


def test_loader_makes_them_by_itself_and_keeps_as_many_as_asked(tmp_path, seed):
    script = Script(None, seed=seed).start()
    script.loader.checkpoint(tmp_path, every_steps=3, keep=2, asynchronous=True, signals=False)
    script.run(14)
    assert script.loader.stats()["saves"]["begun"] >= 3
    script.loader.close()
    complete = complete_in(tmp_path)
    assert len(complete) == 2 and sorted(complete) == sorted(tmp_path.iterdir())
    assert read_index(complete[-1]).steps == 12


def test_first_step_of_a_table_is_waited_for(tmp_path, seed):
    script = Script(None, seed=seed).start()
    saving = script.save(tmp_path / "saved", asynchronous=True)
    assert saving.done and saving.wait().bytes > 0
    script.loader.close()


def test_table_that_gets_another_rule_waits_for_what_is_being_written(tmp_path, seed, gate):
    """A table that no optimizer held comes into one while its rows are being written."""
    with adaloader.deferred_init(seed=seed, min_rows=1):
        model = torch.nn.Embedding(50, 4)
    loader = adaloader.AdaLoader(torch.arange(20), 5, model=model, min_rows=1)
    with torch.no_grad():
        for ids in loader:
            model(ids)
    adaloader.save(tmp_path / "one", loader)
    gate.shut()
    saving = adaloader.save(tmp_path / "other", loader, asynchronous=True)
    threading.Timer(0.2, gate.open).start()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    training = adaloader.AdaLoader(torch.arange(20), 5, model=model, optimizer=optimizer, min_rows=1)
    for ids in training:
        model(ids).sum().backward()
        optimizer.step()
    saving.wait()
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    training.close(), loader.close()


def test_process_that_ends_waits_for_what_is_being_written(tmp_path):
    from tests.launch import launch

    program = """
        import sys, time
        from pathlib import Path
        from adaloader.checkpoint import writing
        from tests.resuming import Script
        write = writing.write_durably
        writing.write_durably = lambda *args: (time.sleep(0.5), write(*args))
        Script(None).start().run(3).save(Path(sys.argv[1]) / "saved", asynchronous=True)
    """
    result = launch(0, program, str(tmp_path), timeout_seconds=120)
    assert result.returncode == 0, result.stderr
    assert read_index(tmp_path / "saved").steps == 3


@pytest.mark.parametrize("refused", ["adaloader-checkpoint", ""], ids=["one", "all"])
def test_process_ends_after_a_save_for_which_no_thread_could_be_started(tmp_path, refused):
    """As where a limit on processes is reached: the save is made at once if it can be, and the run goes on if not."""
    from tests.launch import launch

    program = """
        import sys, threading
        from pathlib import Path
        import adaloader
        from tests.resuming import Script
        path, name = Path(sys.argv[1]) / "saved", sys.argv[2]
        script = Script(None).start().run(3)
        start = threading.Thread.start
        def limited(thread):
            if thread.name.endswith(name):
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = limited
        saving = script.save(path, asynchronous=True)
        threading.Thread.start = start
        assert saving.done
        try:
            print(saving.wait())
        except adaloader.CheckpointError as error:
            print(error)
        script.run(1).save(path.with_name("next"), asynchronous=True)
    """
    result = launch(0, program, str(tmp_path), refused, timeout_seconds=60)
    assert result.returncode == 0, result.stderr
    assert read_index(tmp_path / "next").steps == 4
    if refused:
        assert read_index(tmp_path / "saved").steps == 3
    else:
        assert "could not be written: rank 0" in result.stdout and "can't start new thread" in result.stdout


def test_forked_process_ends_and_leaves_the_save_to_its_parent(tmp_path):
    from tests.launch import launch

    program = """
        import os, sys, threading
        from pathlib import Path
        import adaloader
        from adaloader.checkpoint import writing
        from tests.resuming import Script
        write, may_write = writing.write_durably, threading.Event()
        writing.write_durably = lambda *args: (may_write.wait(), write(*args))
        script = Script(None).start().run(3)
        saving = script.save(Path(sys.argv[1]) / "saved", asynchronous=True)
        child = os.fork()
        if child == 0:
            try:
                saving.wait()
            except adaloader.CheckpointError as error:
                print(error, flush=True)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not saving.done
        may_write.set()
        saving.wait()
    """
    result = launch(0, program, str(tmp_path), timeout_seconds=60)
    assert result.returncode == 0, result.stderr
    assert read_index(tmp_path / "saved").steps == 3
    assert "of which this one is a fork" in result.stdout
