"""Jobs that are killed, or asked to end, and resume: what they come to is what an uninterrupted job comes to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adaloader.checkpoint.inspecting import check
from adaloader.checkpoint.layout import complete_in
from tests.checkpointed_job import main
from tests.launch import ROOT, _environment, launch, mpirun
from tests.resuming import assert_identical

PROGRAM = Path(__file__).with_name("checkpointed_job.py")
LIMIT_SECONDS = 300
needs_mpi = pytest.mark.skipif(mpirun() is None, reason="no mpirun")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the job comes to on each number of ranks."""
    known = {}

    def state(ranks: int):
        if ranks not in known:
            out = tmp_path_factory.mktemp("whole") / "state"
            if ranks:
                result = launch(ranks, PROGRAM, str(out.parent / "run"), str(out), timeout_seconds=LIMIT_SECONDS)
                assert result.returncode == 0, result.stderr
            else:
                main(out.parent / "run", out)
            known[ranks] = torch.load(out)
        return known[ranks]

    return state


@needs_mpi
def test_killed_job_is_started_again_and_comes_to_the_same(tmp_path, uninterrupted):
    """Killed while a rank writes, before the index is in place, and in the midst of a batch; each time another rank."""
    pytest.importorskip("mpi4py")
    folder, out = tmp_path / "checkpoints", tmp_path / "state"
    harms = ["0:1:write:40:kill", "1:0:index:2:kill", "2:1:batch:4:kill"]
    command = [sys.executable, "-m", "adaloader", "run", "--restarts", "3", "--run-folder", str(tmp_path), "--"]
    job = [mpirun(), "-n", "2", sys.executable, str(PROGRAM), str(folder), str(out), *harms]
    result = subprocess.run(
        command + job, env=_environment(None), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr.count("starting again") == 3
    assert "rank 1 on" in result.stderr and "died without a word" in result.stderr
    assert result.stdout.count("resumed at step") >= 4
    assert_identical(torch.load(out), uninterrupted(2))
    for each in complete_in(folder):
        check(each)


@needs_mpi
def test_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path, uninterrupted):
    pytest.importorskip("mpi4py")
    folder, out = tmp_path / "run", tmp_path / "state"
    result = launch(2, PROGRAM, str(folder), str(out), "0:1:batch:5:SIGUSR1", timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == 0, result.stderr
    assert "saved" in result.stderr and "has finished" not in result.stdout and not out.exists()
    result = launch(2, PROGRAM, str(folder), str(out), timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == 0 and "resumed at step" in result.stdout
    assert_identical(torch.load(out), uninterrupted(2))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_one_process_ends_it_with_a_checkpoint(tmp_path, uninterrupted, name):
    folder, out = tmp_path / "run", tmp_path / "state"
    result = launch(0, PROGRAM, str(folder), str(out), f"0:0:batch:4:{name}", timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == 0 and f"{name}: saved {complete_in(folder)[-1]} after step" in result.stderr
    assert main(folder, out) is None
    assert_identical(torch.load(out), uninterrupted(0))


@pytest.mark.parametrize("between", ["", "SIGTERM", "SIGUSR1"])
def test_second_ctrl_c_ends_at_once(tmp_path, between):
    """The first comes in a step that does not end."""
    program = """
        import os, signal, sys, time
        from pathlib import Path
        from tests.resuming import Script
        script = Script(None).start()
        script.loader.checkpoint(Path(sys.argv[1]), every_steps=1)
        script.run(2)
        os.kill(os.getpid(), signal.SIGINT)
        if sys.argv[2]:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    """
    result = launch(0, program, str(tmp_path), between, timeout_seconds=LIMIT_SECONDS)
    assert result.returncode != 0 and "KeyboardInterrupt" in result.stderr and "Ctrl-C again" in result.stderr
    assert result.seconds < 60


AFTER_THE_LAST_BATCH = """
    import os, signal, sys
    from pathlib import Path
    from tests.resuming import Script
    folder, name, ending, ranks = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    comm = None
    if ranks:
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
    script = Script(comm).start()
    script.loader.checkpoint(folder, every_steps=1000)
    script.finish_pass()
    if comm is None or comm.rank == 1:
        os.kill(os.getpid(), getattr(signal, name))
    print("evaluated", flush=True)
    if ending == "another pass":
        script.finish_pass()
    elif ending == "close":
        script.close()
        assert comm is not None and comm.rank == 0
    elif ending == "exit":
        sys.exit(0)
"""


@pytest.mark.parametrize("ending", ["close", "exit", "end"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_after_the_last_batch_ends_the_process_when_the_loader_is_closed(tmp_path, name, ending):
    """By what the signal did before: a run that was asked to end, and has made no checkpoint, has not ended well."""
    result = launch(0, AFTER_THE_LAST_BATCH, str(tmp_path), name, ending, "0", timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == -getattr(signal, name), result.stderr
    assert f"{name} came after the last batch, so no checkpoint" in result.stderr and "evaluated" in result.stdout
    assert ("KeyboardInterrupt" in result.stderr) == (name == "SIGINT" and ending == "close")
    assert complete_in(tmp_path) == []


def test_signal_between_passes_is_acted_on_in_the_next(tmp_path):
    arguments = [str(tmp_path), "SIGTERM", "another pass", "0"]
    result = launch(0, AFTER_THE_LAST_BATCH, *arguments, timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == 0, result.stderr
    assert f"SIGTERM: saved {complete_in(tmp_path)[-1]} after step" in result.stderr


@needs_mpi
@pytest.mark.parametrize("ending", ["close", "exit"])
def test_signal_to_one_rank_after_the_last_batch_ends_the_job(tmp_path, ending):
    pytest.importorskip("mpi4py")
    result = launch(2, AFTER_THE_LAST_BATCH, str(tmp_path), "SIGTERM", ending, "2", timeout_seconds=LIMIT_SECONDS)
    assert result.returncode != 0 and "SIGTERM came after the last batch" in result.stderr


def test_signal_while_the_last_checkpoint_is_made_changes_nothing(tmp_path):
    """As of a scheduler that warns first, and then means it."""
    program = """
        import os, signal, sys
        from pathlib import Path
        from adaloader.checkpoint import writing
        from tests.resuming import Script
        write = writing.write_durably
        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            write(*args)
        writing.write_durably = interrupted
        script = Script(None).start().run(3)
        script.loader.checkpoint(Path(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            script.run(1)
        finally:
            script.close()
    """
    result = launch(0, program, str(tmp_path), timeout_seconds=LIMIT_SECONDS)
    assert result.returncode == 0 and len(complete_in(tmp_path)) == 1, result.stderr


@needs_mpi
def test_rank_that_is_slow_to_read_is_named_with_the_remedy(tmp_path):
    pytest.importorskip("mpi4py")
    program = """
        import sys, time
        from pathlib import Path
        from mpi4py import MPI
        from adaloader.checkpoint import restoring
        from tests.resuming import Script
        comm = MPI.COMM_WORLD
        script = Script(comm, options={"timeout_seconds": 2.0}).start().run(3)
        script.save(Path(sys.argv[1]))
        verify = restoring.verify_file
        restoring.verify_file = lambda *args: (time.sleep(8 * (comm.rank == 0)), verify(*args))[1]
        script.load(Path(sys.argv[1]))
    """
    result = launch(2, program, str(tmp_path), timeout_seconds=LIMIT_SECONDS)
    assert result.returncode != 0
    assert re.search(r"was read \(timeout_seconds=2\): .* for rank 0.*with more timeout_seconds", result.stderr)


@needs_mpi
def test_ctrl_c_to_run_ends_the_job_with_a_checkpoint(tmp_path):
    pytest.importorskip("mpi4py")
    folder, out = tmp_path / "checkpoints", tmp_path / "state"
    command = [sys.executable, "-m", "adaloader", "run", "--restarts", "3", "--run-folder", str(tmp_path), "--"]
    job = [mpirun(), "-n", "2", sys.executable, str(PROGRAM), str(folder), str(out), "0:1:batch:6:SIGSTOP"]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(command + job, env=_environment(None), stdout=said, stderr=said, cwd=ROOT)
        try:
            _until(lambda: complete_in(folder))  # rank 1 stops soon, so that the job cannot end before the signal
            stopped = _pid_of_rank(tmp_path, 1)
            _until(lambda: Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            os.kill(stopped, signal.SIGCONT)
            code = process.wait(LIMIT_SECONDS)
        finally:
            process.kill()
    said = (tmp_path / "said").read_text()
    assert code == 0, said
    assert "saved" in said and "starting again" not in said and not out.exists()


def _until(reached) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _pid_of_rank(folder: Path, rank: int) -> int:
    from adaloader.ranks.registry import read_entries

    return next(entry.pid for entry in read_entries(folder) if entry.rank == rank)


def test_run_says_what_failed_and_gives_up(tmp_path, capsys):
    from adaloader.command_line import main as command

    program = tmp_path / "program.py"
    program.write_text("raise SystemExit(3)")
    arguments = ["run", "--restarts", "9", "--run-folder", str(tmp_path / "run"), "--", sys.executable, str(program)]
    assert command(arguments) == 3
    said = capsys.readouterr().err
    assert "ended with code 3" in said and "no rank had registered" in said
    assert said.count("starting again") == 2 and "3 attempts ended without a new checkpoint" in said
    assert command(["run", "--", "no-such-program"]) == 2
    assert command(["run"]) == 2
