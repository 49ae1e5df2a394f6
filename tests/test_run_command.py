"""`python -m adaloader run`: a job ends with the command that started it, and its code says how the ranks ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from adaloader.checkpoint.layout import complete_in
from adaloader.command_line import main
from adaloader.ranks.registry import read_entries
from tests.launch import ROOT, _environment, mpirun

LIMIT_SECONDS = 120
needs_mpi = pytest.mark.skipif(mpirun() is None, reason="no mpirun")
RANKS = [0, pytest.param(2, marks=needs_mpi)]

ENDLESS = """
import os, sys
from tests.resuming import Script

comm = None
if "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
script = Script(comm, batch_size=8).start()
script.loader.checkpoint(every_steps=20)
while True:
    script.finish_pass()
"""

ONE_PASS = """
import multiprocessing, os, sys, time
import torch
from adaloader import AdaLoader

def train(at_batch):
    model = torch.nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(torch.arange(40), batch_size=4, model=model, optimizer=optimizer, min_rows=1)
    for at, batch in enumerate(loader):
        at_batch(at)
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    loader.close()

def nothing(at):
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Run a program under the command in this process, and return its code."""

    def run(body: str, *options: str, ranks: int = 0) -> int:
        program = tmp_path / "program.py"
        program.write_text(ONE_PASS + textwrap.dedent(body))
        launcher = [mpirun(), "-n", str(ranks)] if ranks else []
        folder = str(tmp_path / "run")
        return main(["run", *options, "--run-folder", folder, "--", *launcher, sys.executable, str(program)])

    return run


@pytest.fixture
def endless(tmp_path):
    """Start a job that does not end by itself, and return the command's process once it has made a checkpoint."""
    processes = []

    def start(ranks: int, **options) -> subprocess.Popen:
        program = tmp_path / "program.py"
        program.write_text(ENDLESS)
        launcher = [mpirun(), "-n", str(ranks)] if ranks else []
        command = [sys.executable, "-m", "adaloader", "run", "--run-folder", str(tmp_path), "--restarts", "1", "--"]
        with open(tmp_path / "said", "wb") as said:
            process = subprocess.Popen(
                [*command, *launcher, sys.executable, str(program)],
                env=_environment(None),
                stdout=said,
                stderr=said,
                cwd=ROOT,
                **options,
            )
        processes.append(process)
        until(lambda: complete_in(tmp_path / "checkpoints") or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "said").read_text()
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    for entry in read_entries(tmp_path):
        entry.end_here()


def until(reached) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(folder: Path) -> list[int]:
    return [entry.rank for entry in read_entries(folder) if entry.is_alive_here]


@pytest.mark.parametrize("ranks, name", [(0, "SIGQUIT"), pytest.param(2, "SIGHUP", marks=needs_mpi)])
def test_closed_terminal_ends_the_job_with_a_checkpoint(tmp_path, endless, ranks, name):
    process = endless(ranks, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process.send_signal(getattr(signal, name))
    code = process.wait(LIMIT_SECONDS)
    said = (tmp_path / "said").read_text()
    assert code == 0, said
    assert "SIGTERM: saved" in said and "starting again" not in said
    assert alive(tmp_path) == []


@pytest.mark.parametrize("ranks", RANKS)
def test_killed_command_takes_its_job_along(tmp_path, endless, ranks):
    process = endless(ranks)
    assert len(alive(tmp_path)) == max(1, ranks)
    process.kill()
    until(lambda: not alive(tmp_path))


def test_job_under_nohup_goes_on_when_its_terminal_closes(tmp_path, endless):
    process = endless(0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    before = complete_in(tmp_path / "checkpoints")[-1]
    until(lambda: complete_in(tmp_path / "checkpoints")[-1] > before)
    assert alive(tmp_path) == [0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_SECONDS) == 0


@pytest.mark.parametrize("ranks", RANKS)
def test_rank_that_vanishes_with_code_0_is_reported_and_started_again(run, tmp_path, capsys, ranks):
    """A launcher takes code 0 for a good end."""
    body = f"""
        rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        vanishing = {str(tmp_path / "vanished")!r}

        def vanish(at):
            if at == 3 and int(rank) == {max(ranks, 1) - 1} and not os.path.exists(vanishing):
                open(vanishing, "w").close()
                os._exit(0)

        train(vanish)
    """
    assert run(body, "--restarts", "1", ranks=ranks) == 0
    said = capsys.readouterr().err
    assert said.count("starting again") == 1
    assert f"rank {max(ranks, 1) - 1} on {os.uname().nodename}" in said and "died without a word" in said
    (tmp_path / "vanished").unlink()
    assert run(body, ranks=ranks) != 0
    assert "died without a word" in capsys.readouterr().err


GOOD_ENDS = {
    "a whole pass": "train(nothing)",
    "sys.exit": "train(nothing); sys.exit(0)",
    "without a loader": "os._exit(0)",
    "in a forked process": """
        child = multiprocessing.get_context("fork").Process(target=train, args=(nothing,))
        child.start()
        child.join()
        time.sleep(6)  # longer than the others of a job have when one is lost
    """,
}


@pytest.mark.parametrize("case", GOOD_ENDS)
def test_good_end_has_code_0(run, capsys, case):
    assert run(GOOD_ENDS[case], "--restarts", "1") == 0
    assert capsys.readouterr().err == ""


@needs_mpi
def test_good_end_of_ranks_has_code_0(run, capsys):
    assert run("train(nothing)", "--restarts", "1", ranks=2) == 0
    assert capsys.readouterr().err == ""


def test_failure_that_the_launcher_hides_has_a_code(run, capsys):
    body = """
        def fail(at):
            raise ValueError("at once")

        child = multiprocessing.get_context("fork").Process(target=train, args=(fail,))
        child.start()
        child.join()
    """
    assert run(body) == 1
    assert "failed: ValueError" in capsys.readouterr().err


@pytest.mark.parametrize("restarts", ["-1", "some", "1.5"])
def test_restarts_are_counted(capsys, restarts):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--restarts", restarts, "--", "true"])
    assert ended.value.code == 2
    assert f"--restarts: {restarts!r} is not 0, 1, 2" in capsys.readouterr().err


def test_job_that_cannot_be_started(tmp_path, capsys):
    script = tmp_path / "script"
    script.write_text("no program\n")
    script.chmod(0o755)
    assert main(["run", "--run-folder", str(tmp_path / "run"), "--", str(script)]) == 2
    assert capsys.readouterr().err.startswith(f"adaloader: '{script}' cannot be started (Exec format error): ")
    for folder in (script, script / "run"):
        assert main(["run", "--run-folder", str(folder), "--", "true"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"adaloader: the run folder {folder} cannot be made or written (")
        assert "--run-folder" in said and said.count("\n") == 1
