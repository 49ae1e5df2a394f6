"""Jobs that fail: the whole job ends, soon, with the cause in stderr and a code that is not 0; and jobs that do not.

Each case is a job of its own under `mpirun`. They are started two at a time when the first test asks for one.
"""

from __future__ import annotations

import re
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import Result, launch, mpirun

pytest.importorskip("mpi4py", reason="no mpi4py")
pytestmark = pytest.mark.skipif(mpirun() is None, reason="no mpirun")

LIMIT_SECONDS = 60
"""For a job, start-up included. The loaders of these jobs wait for each other much longer, if nothing else is said."""

SOON_SECONDS = 20
"""From the failure of one rank to the end of the job: generous, for machines that are busy."""

PREAMBLE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
import adaloader
from adaloader import AdaLoader

RANK = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))

def now(what):
    with open(os.environ["EVENTS"], "a") as events:  # what is printed just before Ctrl-C gets lost
        print(what, RANK, os.getpid(), time.time(), file=events)

class Net(nn.Module):
    def __init__(self, dense=True):
        super().__init__()
        self.table = nn.Embedding(1500, 4)
        self.top = nn.Linear(4, 1) if dense else nn.Identity()
    def forward(self, ids):
        return self.top(self.table(ids)).mean()

class Ids(torch.utils.data.Dataset):
    def __init__(self, fail_at=None, n=400):
        self.fail_at, self.n = fail_at, n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        if self.fail_at is not None and i >= self.fail_at:
            now("FAIL")
            raise OSError(f"sample {i} cannot be read")
        return torch.tensor([i * 7 % 1500, i * 13 % 1500])

def make(dense=True, data=None, **options):
    torch.manual_seed(1)
    model = Net(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, AdaLoader(data or Ids(), batch_size=2, model=model, optimizer=optimizer, **options)

def train(model, optimizer, loader, at=None, do=None):
    for number, ids in enumerate(loader):
        if number == at:
            do()
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            now("STARTED")

def fail():
    now("FAIL")
    raise ArithmeticError("the cause")
"""

JOBS: dict[str, tuple[int, str]] = {
    "before any loader": (
        2,
        """
        if RANK == 1:
            time.sleep(0.5)  # the others are in MPI's start by then
            fail()
        train(*make())
        """,
    ),
    "in the loop": (3, "train(*make(), at=4, do=fail if RANK == 1 else int)"),
    "with a hook of the user's": (
        2,
        """
        parts = make()
        sys.excepthook = lambda kind, error, trace: print("my own report:", error, file=sys.stderr)
        train(*parts, at=4, do=fail if RANK == 1 else int)
        """,
    ),
    "in a worker process": (2, "train(*make(data=Ids(100 if RANK == 1 else None), num_workers=2))"),
    "in keys=": (
        2,
        """
        def keys(ids):
            if RANK == 1 and len(seen) == 6:
                fail()
            seen.append(ids)
            return ids
        seen = []
        train(*make(keys={"table": keys}))
        """,
    ),
    "id out of range on one rank": (
        2,
        """
        class Bad(Ids):
            def __getitem__(self, i):
                ids = super().__getitem__(i)
                if i == 101:
                    ids[1] = 1500
                return ids
        model, optimizer, loader = make(data=Bad())
        for ids in loader:
            if (ids == 1500).any():
                now("FAIL")
            model(ids).backward()
            optimizer.step()
        """,
    ),
    "in the background thread": (
        2,
        """
        parts = make()
        def broken(): fail()
        def stuck():
            if RANK == 1:
                adaloader.model.managed_model.managed_models[parts[0]].manager.transport.post(broken)
                time.sleep(300)  # this rank's own code notices nothing
        train(*parts, at=4, do=stuck)
        """,
    ),
    "Ctrl-C": (
        2,
        """
        def parent(pid):
            return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
        def interrupt():
            if RANK == 1:
                now("FAIL")
                os.killpg(os.getpgid(parent(parent(os.getpid()))), signal.SIGINT)
                time.sleep(300)
        train(*make(), at=4, do=interrupt)
        """,
    ),
    "SIGINT to one rank": (
        2,
        """
        def interrupt():
            now("FAIL")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(300)
        train(*make(), at=4, do=interrupt if RANK == 1 else int)
        """,
    ),
    "one rank exits early": (
        2,
        """
        def leave():
            now("FAIL")
            sys.exit(0)
        train(*make(), at=4, do=leave if RANK == 1 else int)
        """,
    ),
    "one rank passes over a batch": (
        2,
        """
        model, optimizer, loader = make()
        for number, ids in enumerate(loader):
            if number == 4 and RANK == 1:
                now("FAIL")
                continue
            optimizer.zero_grad()
            model(ids).backward()
            optimizer.step()
        """,
    ),
    "one rank has closed its output": (
        2,
        """
        def leave():
            os.close(1), os.close(2)
            fail()
        train(*make(), at=4, do=leave if RANK == 1 else int)
        """,
    ),
    "one rank has no output": (
        2,
        """
        def leave():
            sys.stdout = sys.stderr = None
            fail()
        train(*make(), at=4, do=leave if RANK == 1 else int)
        """,
    ),
    "one rank stalls": (
        2,
        """
        def stall():
            now("FAIL")
            time.sleep(300)
        train(*make(timeout_seconds=3.0), at=4, do=stall if RANK == 1 else int)
        """,
    ),
    "one rank stalls without dense parameters": (
        2,
        """
        def stall():
            now("FAIL")
            time.sleep(300)
        train(*make(dense=False, timeout_seconds=3.0), at=4, do=stall if RANK == 1 else int)
        """,
    ),
    "one rank is stopped": (
        2,
        """
        def stop():
            now("FAIL")
            os.kill(os.getpid(), signal.SIGSTOP)
        train(*make(timeout_seconds=3.0), at=4, do=stop if RANK == 1 else int)
        """,
    ),
    "one rank waits in a collective operation": (
        2,
        """
        model, optimizer, loader = make(timeout_seconds=3.0)
        train(model, optimizer, loader, at=4, do=int)
        if RANK == 1:
            now("FAIL")
            threading.Lock().acquire() and threading.Event().wait()
        adaloader.full_state_dict(model)
        """,
    ),
    "a worker process is stuck": (
        2,
        """
        class Stuck(Ids):
            def __getitem__(self, i):
                if RANK == 1 and i == 102:
                    now("FAIL")
                    time.sleep(300)
                return super().__getitem__(i)
        train(*make(data=Stuck(), num_workers=1, timeout_seconds=3.0))
        """,
    ),
    "a worker process is killed": (
        2,
        """
        class Killed(Ids):
            def __getitem__(self, i):
                if i == 101:
                    now("FAIL")
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(i)
        train(*make(data=Killed(), num_workers=1))
        """,
    ),
    "all well on 1": (0, "train(*make())\nnow('END')"),
    "all well on 4": (4, "train(*make(num_workers=1))\nnow('END')"),
    "many loaders left open": (
        3,
        """
        held = [make() for _ in range(6)]
        for model, optimizer, loader in held:
            train(model, optimizer, loader, 3, lambda: None)
        held = [held[(at + RANK) % 6] for at in range(6)]
        now("END")
        """,
    ),
    "a program that a rank has started fails": (
        2,
        """
        import subprocess
        parts = make()
        train(*parts)
        failing = [sys.executable, "-c", "import adaloader; raise ArithmeticError('of its own')"]
        ended = subprocess.run(failing, capture_output=True, text=True)
        assert ended.returncode == 1 and "ending the job" not in ended.stderr, ended
        train(*parts)
        now("END")
        """,
    ),
    "one is still evaluating": (
        2,
        """
        model, optimizer, loader = make(timeout_seconds=60)
        train(model, optimizer, loader)
        if RANK == 1:
            now("END")
            sys.exit(0)
        time.sleep(1.0)
        with torch.no_grad():
            for _ in range(20):
                rows = model.table(torch.randint(0, 1500, (50,)))
                assert rows.isfinite().all()
        now("END")
        """,
    ),
}


@dataclass(frozen=True)
class Event:
    """Something that a rank told of: its process, and when (seconds since 1970)."""

    what: str
    pid: int
    at: float


@dataclass(frozen=True)
class Job:
    """What became of a job: when it had ended, and what its ranks told before."""

    result: Result
    ended: float
    events: list[Event]

    def all(self, what: str) -> list[Event]:
        return [event for event in self.events if event.what == what]


class Jobs:
    """Every job is started once, however many tests look at it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(2)
        self._running: dict[str, Future] = {}

    def start(self, names) -> None:
        for name in names:
            if name not in self._running:
                self._running[name] = self._pool.submit(self._run, name)

    def _run(self, name: str) -> Job:
        ranks, body = JOBS[name]
        path = self._folder / name.replace(" ", "-")
        path.touch()
        environment = {"EVENTS": str(path)}
        result = launch(ranks, PREAMBLE + textwrap.dedent(body), env=environment, timeout_seconds=LIMIT_SECONDS)
        events = [line.split() for line in path.read_text().splitlines()]
        return Job(result, time.time(), [Event(what, int(pid), float(at)) for what, _, pid, at in events])

    def __getitem__(self, name: str) -> Job:
        self.start([name])
        return self._running[name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    started = Jobs(tmp_path_factory.mktemp("jobs"))
    wanted = [item.callspec.params["name"] for item in request.session.items if _is_case(item)]
    started.start(wanted)
    yield started
    started.close()


def _is_case(item) -> bool:
    return item.path.samefile(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", {})


def _outlives(pid: int) -> bool:
    """Whether the process is still there after a while, and no zombie that only waits to be counted."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


FAILING = {
    "before any loader": ["ArithmeticError: the cause", "rank 1 of 2 failed (ArithmeticError)"],
    "in the loop": ["in fail", "ArithmeticError: the cause", "rank 1 of 3 failed (ArithmeticError)"],
    "with a hook of the user's": ["my own report: the cause", "rank 1 of 2 failed (ArithmeticError)"],
    "in a worker process": ["OSError: sample 1", "in __getitem__", "rank 1 of 2 failed (OSError)"],
    "in keys=": ["in keys", "ArithmeticError: the cause", "rank 1 of 2 failed (ArithmeticError)"],
    "id out of range on one rank": ["IndexError: id 1500 is out of range for table 'table.weight'", "0 to 1499"],
    "in the background thread": ["in broken", "ArithmeticError: the cause", "rank [01] of 2 failed"],
    "SIGINT to one rank": ["KeyboardInterrupt", "rank 1 of 2 failed (KeyboardInterrupt)"],
    "Ctrl-C": [],
    "one rank exits early": ["PeerError|RuntimeError", "[Rr]ank 1[^0-9].*has closed its loader or ended"],
    "one rank passes over a batch": [
        r"step 5: ranks train on different batches: number 5 on rank 0, number 6 on rank 1[.]"
    ],
    "one rank has closed its output": [],
    "one rank has no output": [],
    "one rank stalls": [
        "Rank 0 waits for rank 1, which has taken 4 optimizer steps and begun 4 sums",
        r"Rank 1 is at .*program\.py:[0-9]+ in stall",
    ],
    "one rank stalls without dense parameters": [
        "rank 0 waited 3 s",
        r"Rank 1 is on host .*, PID [0-9]+",
        r"Rank 1 is at .*program\.py:[0-9]+ in stall",
    ],
    "one rank is stopped": [
        "Rank 1 does not answer: its process is stopped",
        r"heard of [0-9]+ s ago, and had applied [0-9]+ optimizer steps",
        r"Rank 1 is on host .*, PID [0-9]+",
    ],
    "one rank waits in a collective operation": [r"Rank 1 is at .*program\.py:[0-9]+ in <module>"],
    "a worker process is stuck": [r"Rank 1 is at .*program\.py:[0-9]+ in train", r"Rank 1 is on host .*, PID [0-9]+"],
    "a worker process is killed": ["DataLoader worker .* (is|was) killed by signal|exited unexpectedly"],
}


@pytest.mark.parametrize("name", FAILING)
def test_job_that_fails(jobs, name):
    job = jobs[name]
    result = job.result
    assert result.returncode != 0
    for text in FAILING[name]:
        pattern = text if "|" in text or "[" in text else re.escape(text)
        assert re.search(pattern, result.stderr), f"{text!r} is not in\n{result.stderr[-6000:]}"
    failed = job.all("FAIL")
    assert failed, result.stderr[-6000:]
    assert job.ended - failed[0].at < SOON_SECONDS
    for event in job.all("STARTED"):
        assert not _outlives(event.pid), "a rank outlived its job"


@pytest.mark.parametrize("name", ["in the loop", "in keys=", "in a worker process", "one rank exits early"])
def test_other_ranks_add_no_traceback_of_the_ending(jobs, name):
    """What is printed is the cause, and not what its end did to others."""
    result = jobs[name].result
    assert result.stderr.count("ending the job") == 1, result.stderr[-6000:]


@pytest.mark.parametrize(
    "name",
    [
        "all well on 1",
        "all well on 4",
        "many loaders left open",
        "a program that a rank has started fails",
        "one is still evaluating",
    ],
)
def test_job_that_ends_without_closing_its_loader(jobs, name):
    job = jobs[name]
    result = job.result
    assert (result.returncode, result.stderr) == (0, "")
    ends = job.all("END")
    assert len(ends) == max(1, JOBS[name][0])
    assert job.ended - max(end.at for end in ends) < SOON_SECONDS
