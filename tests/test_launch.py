"""The harness itself: jobs end, say why, and leave nothing behind."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.launch import launch, mpirun

pytest.importorskip("mpi4py", reason="no mpi4py")
needs_mpirun = pytest.mark.skipif(mpirun() is None, reason="no mpirun")

SUITE = """
import sys, time
import pytest

def test_order(comm, seed, shared_path):
    import numpy as np
    got = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(np.array([seed]), got)
    assert (got == seed).all()
    (shared_path / str(comm.rank)).touch()
    comm.Barrier()
    assert len(list(shared_path.iterdir())) == comm.size

@pytest.mark.ranks(2)
def test_two(comm):
    assert comm.size >= 2

def test_body(comm):
    BODY
"""


@pytest.fixture
def suite(tmp_path: Path):
    """Run a small suite under the harness's conftest on `n` ranks, with a given last test."""
    conftest = (Path(__file__).parent / "mpi" / "conftest.py").read_text()

    def run(n: int, body: str, **options):
        (tmp_path / "conftest.py").write_text(conftest)
        (tmp_path / "test_suite.py").write_text(SUITE.replace("BODY", body))
        arguments = ["-q", "-p", "no:cacheprovider", str(tmp_path)]
        return launch(n, f"import pytest; raise SystemExit(pytest.main({arguments!r}))", **options)

    return run


def alive(marker: str) -> list[str]:
    """Processes whose command line holds `marker`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
        except OSError:  # it ended while we looked
            continue
        if marker in command:
            found.append(command)
    return found


@needs_mpirun
@pytest.mark.parametrize("n", [0, 1, 3])
def test_runs_on_n_ranks_and_returns_output(n):
    token = str(random.getrandbits(40))
    source = """
        import os, sys
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
        said = [comm.rank, comm.size, sys.argv[1], os.environ["OMP_NUM_THREADS"], os.environ["EXTRA"]]
        sys.stdout.write(" ".join(map(str, said)) + "\\n")  # in one piece, whatever other ranks write meanwhile
        print("to stderr", file=sys.stderr)
        sys.exit(0)
    """
    result = launch(n, source, token, env={"EXTRA": "extra"})
    assert result.returncode == 0, result.stderr
    ranks = max(n, 1)
    assert sorted(result.stdout.splitlines()) == [f"{rank} {ranks} {token} 1 extra" for rank in range(ranks)]
    assert result.stderr.count("to stderr") == ranks
    assert result.seconds > 0


@needs_mpirun
def test_launch_inside_a_job_is_a_job_of_its_own():
    source = """
        from tests.launch import launch
        inner = launch(2, "from mpi4py import MPI; import sys; sys.stdout.write(f'inner {MPI.COMM_WORLD.size}\\\\n')")
        assert inner.returncode == 0, inner.stderr
        print(inner.stdout)
    """
    result = launch(1, source)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["inner", "2"] * 2


@needs_mpirun
def test_path_and_missing_path(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("print('from a path')")
    assert launch(1, program).stdout == "from a path\n"
    assert launch(1, str(program)).stdout == "from a path\n"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        launch(1, tmp_path / "nowhere.py")


@needs_mpirun
def test_exit_code_of_a_failing_rank():
    result = launch(2, "import sys; from mpi4py import MPI; sys.exit(7 if MPI.COMM_WORLD.rank else 0)")
    assert result.returncode != 0


@needs_mpirun
@pytest.mark.parametrize("n", [0, 2])
def test_timeout_kills_every_process(n):
    token = f"hangs-{random.getrandbits(40)}"
    with pytest.raises(TimeoutError, match=r"(?s)did not end within 3\.0 s.*I hang"):
        launch(n, "import time; print('I hang'); time.sleep(600)", token, timeout_seconds=3.0)
    deadline = time.monotonic() + 10
    while alive(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(token) == []


@needs_mpirun
def test_interrupt_reaches_the_job():
    result = launch(0, "import time; print('on'); time.sleep(600)", interrupt_after_seconds=1.5, timeout_seconds=30)
    assert result.returncode != 0
    assert "KeyboardInterrupt" in result.stderr


@needs_mpirun
@pytest.mark.parametrize("n", [0, 1, 3])
def test_suite_passes_on_every_rank_and_is_reported_once(suite, n):
    result = suite(n, "assert comm.size == comm.size")
    assert result.returncode == 0, result.stdout + result.stderr
    passed = "3 passed" if n > 1 else "2 passed, 1 skipped"
    assert result.stdout.count(passed) == 1, result.stdout


@needs_mpirun
def test_failure_on_one_rank_ends_the_job_with_its_trace(suite):
    body = "if comm.rank == 1: raise ValueError('only I')\n    comm.Barrier()"
    result = suite(2, body, timeout_seconds=60)
    assert result.returncode != 0
    assert "[1] E" in result.stderr and "only I" in result.stderr
    assert "test_body failed in call" in result.stderr


@needs_mpirun
def test_failure_on_all_ranks_and_at_one_rank(suite):
    assert suite(2, "assert 1 == 2").returncode != 0
    alone = suite(1, "assert 1 == 2")
    assert alone.returncode == 1
    assert "1 failed, 1 passed, 1 skipped" in alone.stdout


@needs_mpirun
def test_watchdog_ends_a_test_that_hangs(suite):
    body = "time.sleep(600) if comm.rank else comm.Barrier()"
    result = suite(2, body, env={"ADALOADER_TEST_LIMIT_SECONDS": "2"}, timeout_seconds=60)
    assert result.returncode != 0
    assert "test_body took longer than 2.0 s" in result.stderr
    assert result.stderr.count("in test_body") >= 2, "every rank shows where it was"


@needs_mpirun
def test_ranks_that_collect_different_tests_are_told(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "mpi" / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(
        "import pytest\nfrom mpi4py import MPI\n"
        "@pytest.mark.parametrize('x', [MPI.COMM_WORLD.rank])\ndef test_x(x): pass\n"
    )
    source = f"import pytest; raise SystemExit(pytest.main(['-q', {str(tmp_path)!r}]))"
    result = launch(2, source, timeout_seconds=60)
    assert result.returncode != 0
    assert "ranks [1] collected other tests" in result.stderr


def test_mpirun_beside_the_interpreter_wins():
    beside = Path(sys.executable).parent / "mpirun"
    if beside.exists():
        assert mpirun() == str(beside)
    else:
        assert mpirun() is None or os.access(mpirun(), os.X_OK)
