"""Checkpoints on 1 to 4 ranks: a resumed run is the uninterrupted one; other numbers of ranks go on with the rest."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader
from adaloader.checkpoint.layout import complete_in, open_file, read_index
from tests.resuming import OPTIMIZERS, Script, assert_close, assert_identical, with_draws

CASES = [
    # optimizer, dtype, batches before the save, options of the loader, dropout
    ("adagrad", torch.float64, 3, {"techniques": "all"}, 0.3),
    ("sgd", torch.float32, 0, {"techniques": "none"}, 0.0),
    ("momentum", torch.float64, 7, {"techniques": "relocation", "num_workers": 1}, 0.2),
    ("adam", torch.float32, 9, {"techniques": "replication", "lookahead": 0}, 0.0),
    ("rowwise", torch.float64, 26, {"techniques": "all", "lookahead": 9}, 0.0),
    ("adagrad", torch.float64, 5, {"collate_fn": with_draws, "lookahead": 6}, 0.3),
]


@pytest.fixture
def folder(shared_path: Path) -> Path:
    return shared_path


@pytest.mark.parametrize("optimizer, dtype, before, options, dropout", CASES)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(
    comm, seed, folder, optimizer, dtype, before, options, dropout
):
    def script():
        return Script(
            comm, optimizer, dtype, dropout, samples=4 * 11 * comm.size + comm.size, seed=seed, options=options
        )

    whole = script().start().run(before)
    whole.save(folder / "saved")
    done = len(whole.losses)
    whole.run(14)
    expected = whole.state()
    whole.close()

    resumed = script().start(model_seed=seed + 1)
    restored = resumed.load(folder / "saved")
    assert restored["losses"] == whole.losses[:done] and restored.steps == resumed.loader.stats()["steps"]
    resumed.run(14)
    assert resumed.losses == whole.losses[done:] and resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert_identical(resumed.state(), expected)
    resumed.close()


@pytest.mark.parametrize("optimizer, num_workers", [("adagrad", 0), ("adam", 0), ("sgd", 1)])
@pytest.mark.parametrize("from_one", [True, False])
@pytest.mark.parametrize("own_generator", [False, True])
def test_other_number_of_ranks_goes_on_with_the_rest_of_the_pass(
    comm, seed, folder, optimizer, num_workers, from_one, own_generator
):
    """From one rank to all of them, or back: each sample once, and one process's results for the same batches, in the
    pass after it too."""
    from mpi4py import MPI

    samples, each = 4 * comm.size * 6 + 5, 4

    def script(ranks):
        size = each * comm.size // ranks
        options = {"num_workers": num_workers}
        if own_generator:
            options["generator"] = torch.Generator().manual_seed(seed)
        own = MPI.COMM_SELF if ranks == 1 else comm
        return Script(own, optimizer, torch.float64, 0.0, samples, size, seed, options)

    first, second = (1, comm.size) if from_one else (comm.size, 1)
    seen, expected = [], {}
    if first > 1 or comm.rank == 0:
        begun = script(first).start().run(2)
        begun.save(folder / "saved")
        seen = begun.seen
        begun.close()
    if comm.rank == 0:
        plain = script(1).start().finish_pass().finish_pass()
        expected = plain.state()
        plain.close()
    comm.Barrier()
    state = {}
    if second > 1 or comm.rank == 0:
        resumed = script(second).start(model_seed=seed + 5)
        resumed.load(folder / "saved")
        resumed.finish_pass()
        seen = seen + resumed.seen
        resumed.finish_pass()
        state = resumed.state()
        resumed.close()
    everyones = comm.gather(seen)
    if comm.rank == 0:
        assert sorted(at for of_rank in everyones for at in of_rank) == list(range(samples))
        assert_close(state, expected, 1e-9)
    comm.Barrier()


def test_resumes_under_another_technique_and_staleness(comm, seed, folder):
    begun = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed, options={"techniques": "all"}).start().run(5)
    begun.save(folder / "saved")
    before = begun.state()
    begun.close()
    apart = {"staleness": None, "shared_memory": False}
    for options in (
        {"techniques": "none"},
        {"techniques": "replication"},
        {"staleness": 2},
        {"staleness": None},
        apart,
    ):
        again = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed, options=options).start(
            model_seed=seed + 2
        )
        again.load(folder / "saved")
        after = again.state()
        for name in before:
            if name not in ("draw", "numpy"):
                assert torch.equal(before[name], after[name]), (options, name)
        again.finish_pass()
        again.save(folder / "again")
        again.close()


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
def test_stale_run_is_saved_and_resumed(comm, seed, folder, shared_memory):
    options = {"staleness": None, "shared_memory": shared_memory}
    begun = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed, options=options).start().run(6)
    begun.save(folder / "saved")
    before = begun.state()
    begun.close()
    again = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed, options=options).start(model_seed=seed + 2)
    again.load(folder / "saved")
    after = again.state()
    for name in before:
        if name not in ("draw", "numpy"):
            torch.testing.assert_close(before[name], after[name], rtol=1e-12, atol=1e-12)
    again.finish_pass().close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("most", ["first", "last"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "nadam"])
def test_owners_that_took_other_steps_are_saved_as_they_are(comm, seed, folder, optimizer, most):
    rows = torch.arange(60)
    batches = [rows]

    def start():
        torch.manual_seed(seed)
        model = nn.Embedding(len(rows), 2, dtype=torch.float64)
        of_table = OPTIMIZERS[optimizer](model.parameters())
        loader = AdaLoader.wrap(batches, model=model, optimizer=of_table, min_rows=1, staleness=None)
        return model, of_table, loader

    def finish_pass() -> None:
        for ids in loader:
            model(ids).pow(2).sum().backward()
            of_table.step()
            of_table.zero_grad()

    def state() -> dict[str, torch.Tensor]:
        entry = adaloader.full_optimizer_state_dict(model, of_table).get("state", {}).get(0, {})
        whole = {name: tensor for name, tensor in entry.items() if torch.is_tensor(tensor) and tensor.ndim}
        return adaloader.full_state_dict(model) | whole

    model, of_table, loader = start()
    finish_pass()
    managed = loader._session.managed
    own = rows[managed.manager.rows_owned(managed.tables[0].table, rows.numpy())]
    place = comm.rank if most == "last" else comm.size - 1 - comm.rank
    draws = torch.Generator().manual_seed(seed + comm.rank)
    batches[:] = [own[torch.randint(len(own), (4,), generator=draws)] for _ in range(2 + 2 * place)]
    finish_pass()
    before = state()
    adaloader.save(folder / "saved", loader)
    loader.close()
    model, of_table, loader = start()
    adaloader.load(folder / "saved", loader)
    assert_identical(state(), before)
    loader.close()


def test_failing_to_write_is_an_error_on_every_rank_and_the_run_goes_on(comm, seed, folder):
    script = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed).start().run(2)
    script.save(folder / "saved")
    (folder / "file").write_text("no folder")
    with pytest.raises(adaloader.CheckpointError, match="Not a directory|File exists"):
        script.save(folder / "file")
    unsavable = {"what": object()} if comm.rank == comm.size - 1 else {}
    with pytest.raises(adaloader.CheckpointError, match="own/extra/what.*builtins.object"):
        adaloader.save(folder / "saved", script.loader, unsavable)
    script.run(2)
    again = Script(comm, "adagrad", samples=36 * comm.size + 1, seed=seed).start()
    assert len(again.load(folder / "saved")["losses"]) == 2
    comm.Barrier()
    again.close(), script.close()


def test_save_while_a_rank_has_run_out_of_batches_is_an_error_at_once(comm, seed, folder):
    """The last batch has one sample, which is rank 0's; whoever has none follows, and can save after the pass."""
    script = Script(comm, seed=seed, samples=4 * comm.size * 3 + 1, options={"timeout_seconds": 60.0}).start().run(3)
    script.save(folder / "saved")
    if comm.rank == 0:
        script.one_batch()
        if comm.size > 1:
            with pytest.raises(adaloader.CheckpointError, match="rank 1.* has run out of batches"):
                script.save(folder / "saved")
    script.finish_pass()
    assert read_index(folder / "saved").steps == 3
    script.save(folder / "after")
    assert read_index(folder / "after").steps == 4
    script.run(2)
    script.close()


def test_rows_of_a_rank_are_those_that_it_owns_and_somebody_touched(comm, seed, folder):
    script = Script(comm, "adam", seed=seed, samples=8).start().run(2)
    script.save(folder / "saved")
    index = read_index(folder / "saved")
    rows = []
    for rank in range(index.ranks):
        with open_file(folder / "saved", index, rank) as file:
            rows.append(file.array("rows/declared.weight"))
    every = np.concatenate(rows)
    assert len(np.unique(every)) == len(every) == index.tables["declared.weight"].held
    seen = comm.allgather(script.seen)
    touched = script.loader.dataset.ids[[at for of_rank in seen for at in of_rank]].unique().numpy()
    assert np.isin(touched, every).all() and len(every) < 211
    script.close()


@pytest.mark.parametrize("lookahead", [0, 4])
def test_periodic_checkpoints_over_passes_with_uneven_ends_all_resume(comm, seed, folder, lookahead):
    """The last batch has one sample, so that all ranks but one have run out of batches by then."""
    each = 4 * comm.size

    def script():
        return Script(comm, "adagrad", samples=each * 5 + 1, seed=seed, options={"lookahead": lookahead})

    whole = script().start()
    extra = {"scheduler": whole.scheduler}
    whole.loader.checkpoint(folder, every_steps=2, keep=99, extra=lambda: {**extra, "losses": list(whole.losses)})
    whole.finish_pass().finish_pass()
    expected = whole.state()
    whole.close()
    complete = complete_in(folder)
    assert [read_index(path).steps for path in complete][:2] == [2, 4] and len(complete) >= 4
    for path in (complete[1], complete[-1]):
        resumed = script().start(model_seed=seed + 3)
        done = len(resumed.load(path)["losses"])
        resumed.finish_pass()
        if read_index(path).steps < 6:
            resumed.finish_pass()
        assert resumed.losses == whole.losses[done:], path
        assert_identical(resumed.state(), expected)
        resumed.close()


def test_signal_to_one_rank_is_heard_by_all_wherever_they_are(comm, seed, folder):
    """Ranks come to their next batch at other times; all end after the same step, with one checkpoint."""
    script = Script(comm, "sgd", samples=4 * comm.size * 50, seed=seed).start()
    script.loader.checkpoint(folder)
    before = signal.getsignal(signal.SIGUSR1)
    steps = 0
    with pytest.raises(SystemExit) as ended:
        for _ in range(50):
            if comm.rank == comm.size - 1 and steps == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.002 * ((comm.rank + steps) % 3))
            script.one_batch()
            steps += 1
    assert ended.value.code == 0
    taken = comm.allgather(script.loader.stats()["steps"])
    assert len(set(taken)) == 1 and 5 <= taken[0] <= 9
    assert [read_index(path).steps for path in complete_in(folder)] == taken[:1]
    script.close()
    assert signal.getsignal(signal.SIGUSR1) is not before
