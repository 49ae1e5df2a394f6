"""The harness of the tests that run on several ranks.

`mpirun -n N python -m pytest tests/mpi` starts the same pytest session on every rank; in a plain `pytest
tests` these tests run as one rank. What holds:

- All ranks run the same tests in the same order, and start each together.
- Rank 0 prints the report. Another rank speaks only when a test fails on it.
- A failure on any rank of several ends the whole job with exit code 1, for the other ranks would wait for
  ever.
- A test that takes longer than `LIMIT_SECONDS` ends the job, with a trace of every thread of every rank.

Test modules take the communicator from the fixture `comm` and import mpi4py, where they must, inside
functions: then they can be collected, and are skipped, where there is no MPI.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library that it could load
    MPI = None
    WHY_NO_MPI = f"no MPI: {error}"
else:
    HARNESS = MPI.COMM_WORLD.Dup()  # the harness's own messages must never meet those of a test

RANK = HARNESS.rank if MPI else 0
RANKS = HARNESS.size if MPI else 1
HERE = Path(__file__).parent
LIMIT_SECONDS = float(os.environ.get("ADALOADER_TEST_LIMIT_SECONDS", "120"))
SECONDS_FOR_OTHERS = 0.5
"""After a failure: how long the other ranks have to print theirs, one of which may be the cause."""


# --- the session: one order of tests, one report ---


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(n): the test needs at least n MPI ranks")
    if RANK > 0:
        root = Path(tempfile.gettempdir()) / f"pytest-rank-{RANK}"  # ranks that tidy up one folder of old files collide
        root.mkdir(exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(root)
        for name in ("terminalreporter", "lfplugin", "nfplugin"):  # the two last write one cache file
            plugin = config.pluginmanager.get_plugin(name)
            if plugin is not None:
                config.pluginmanager.unregister(plugin)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and RANKS > 1:
        _end_job(f"collecting {report.nodeid} failed", report.longreprtext)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        needed = max((mark.args[0] for mark in item.iter_markers("ranks")), default=1)
        if MPI is None:
            item.add_marker(pytest.mark.skip(reason=WHY_NO_MPI))
        elif needed > RANKS:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} ranks, runs on {RANKS}: mpirun -n {needed}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if RANKS == 1:
        return
    names = "\n".join(item.nodeid for item in session.items)
    digest = np.frombuffer(hashlib.blake2b(names.encode(), digest_size=16).digest(), dtype=np.uint8)
    digests = np.empty((RANKS, digest.size), dtype=np.uint8)
    HARNESS.Allgather(digest, digests)
    differing = [rank for rank in range(RANKS) if (digests[rank] != digests[0]).any()]
    if differing and RANK in (0, differing[0]):
        _end_job(f"ranks {differing} collected other tests, or in another order, than rank 0; mine", names)


# --- one test: start together, end in time, fail together ---


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    if MPI is None:
        return (yield)
    _meet()
    watchdog = _Watchdog(item)
    try:
        return (yield)
    finally:
        watchdog.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed and RANKS > 1:
        sections = "".join(f"\n--- {title}\n{text}" for title, text in report.sections)
        _end_job(f"{item.nodeid} failed in {report.when}", report.longreprtext + sections)
    return report


def _meet() -> None:
    """Wait, asleep, until every rank is here: one that spins in a barrier slows the one that it waits for."""
    request = HARNESS.Ibarrier()
    while not request.Test():
        time.sleep(0.0005)


def _end_job(what: str, text: str) -> None:
    """Print what went wrong on this rank, leave the other ranks a moment to print theirs, and end the whole
    job.
    """
    lines = [f"[rank {RANK} of {RANKS}] {what}", *text.splitlines()]
    os.write(2, ("\n" + "\n".join(f"[{RANK}] {line}" for line in lines) + "\n").encode())
    sys.stdout.flush()
    time.sleep(SECONDS_FOR_OTHERS)
    HARNESS.Abort(1)


class _Watchdog:
    """Ends the job, with a trace of every thread, when a test takes longer than `LIMIT_SECONDS`.

    A thread in Python leaves every rank the time for its trace; should a kernel hold the interpreter's lock,
    faulthandler's own thread ends the process ten seconds later.
    """

    def __init__(self, item: pytest.Item) -> None:
        capture = item.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            self._stderr = os.dup(2)
        self._name = item.nodeid
        self._timer = threading.Timer(LIMIT_SECONDS, self._end)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(LIMIT_SECONDS + 10, exit=True, file=self._stderr)

    def _end(self) -> None:
        os.write(self._stderr, f"\n[{RANK}] {self._name} took longer than {LIMIT_SECONDS} s\n".encode())
        faulthandler.dump_traceback(file=self._stderr, all_threads=True)
        time.sleep(2 * SECONDS_FOR_OTHERS)
        HARNESS.Abort(1)

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)


# --- fixtures ---


@pytest.fixture(scope="session", autouse=True)
def one_thread_each():
    """PyTorch uses one thread on every rank: the ranks share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def comm():
    """`MPI.COMM_WORLD`."""
    return MPI.COMM_WORLD


@pytest.fixture
def managers(comm):
    """A function that makes managers, all of them closed when the test is over."""
    import pm
    from tests.mpi.worlds import SHARED_MEMORY, TECHNIQUES, TIMEOUT

    made = []

    def make(timeout_seconds: float = TIMEOUT, techniques: str = TECHNIQUES, **options) -> pm.SynchronousManager:
        options.setdefault("shared_memory", SHARED_MEMORY)
        made.append(pm.SynchronousManager(comm, timeout_seconds, techniques, **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
    for manager in made:
        manager.close(linger=True)
        assert not manager.transport.alive


@pytest.fixture
def own_stores(monkeypatch):
    """Each rank has the rows of which it is the home in a store of its own, which others read.

    So it is where tables are too large for one store of all ranks.
    """
    monkeypatch.setattr("pm.colocated.shared_tables.most_keys", lambda: 0)


@pytest.fixture(params=["one store", "own stores"])
def stores(request):
    """Rows of ranks of one machine are in a store of all, or in stores of each."""
    if request.param == "own stores":
        request.getfixturevalue("own_stores")
    return request.param


@pytest.fixture
def seed() -> int:
    """A fresh seed, equal on all ranks, shown when the test fails; `ADALOADER_TEST_SEED` gives it again."""
    drawn = int(os.environ.get("ADALOADER_TEST_SEED", secrets.randbits(31)))
    if RANKS > 1:
        box = np.array([drawn], dtype=np.int64)
        HARNESS.Bcast(box)
        drawn = int(box[0])
    print(f"ADALOADER_TEST_SEED={drawn}")
    return drawn


@pytest.fixture
def shared_path(tmp_path: Path) -> Path:
    """A fresh folder that every rank sees: rank 0's `tmp_path`."""
    if RANKS == 1:
        return tmp_path
    text = np.zeros(4096, dtype=np.uint8)
    if RANK == 0:
        encoded = os.fsencode(tmp_path)
        text[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    HARNESS.Bcast(text)
    return Path(os.fsdecode(text.tobytes().rstrip(b"\0")))


@pytest.fixture
def moving_at_once(monkeypatch):
    """Rows move as soon as they may, whatever it costs: tests of moving see more of it."""
    at_any_stage = 1, np.ones(4, bool)
    monkeypatch.setattr("pm.exact.reuse.Reuse.worth_a_move", lambda reuse, rank, store: at_any_stage)
    monkeypatch.setattr("pm.exact.moving._FEW", 0)
    monkeypatch.setattr("pm.exact.moving._SELDOM", 1)


@pytest.fixture
def ranks(comm, seed):
    """What tests of dense gradients need of their ranks."""
    from tests.mpi.dense_ranks import Ranks

    return Ranks(comm, seed)
