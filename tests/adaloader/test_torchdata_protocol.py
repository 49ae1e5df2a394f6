"""An `AdaLoader` does what torchdata's `StatefulDataLoader` does: argument by argument, faults of workers, and state.

Each without a model and, where the argument concerns batches, with one that looks up what they hold.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from adaloader import AdaLoader

ROWS = 50
SAMPLES = 23


class Ids(Dataset):
    """Sample i holds ids, and who made it: the worker and its random draw."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"ids": torch.tensor([at, (at * 7) % ROWS]), "at": torch.tensor(at)}


class Drawing(Ids):
    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(at), "draw": torch.rand(2), "seed": torch.tensor(torch.initial_seed() % 2**31)}


class Stream(IterableDataset):
    """Numbers, shared out among workers, with a position of its own."""

    def __init__(self, samples: int = SAMPLES):
        self.samples, self.next = samples, None

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        self.next = first if self.next is None else self.next
        while self.next < self.samples:
            at, self.next = self.next, self.next + step
            yield {"ids": torch.tensor([at, (at * 3) % ROWS]), "at": torch.tensor(at)}
        self.next = None

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Counted(IterableDataset):
    """A stream without a state of its own: torchdata reads it again up to the position."""

    def __iter__(self):
        return iter([{"ids": torch.tensor([at % ROWS])} for at in range(SAMPLES)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ROWS, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, batch):
        return self.out(self.emb(batch["ids"]).sum(-2)).sum()


class Plain:
    """torchdata's loader, and the loops over it."""

    def __init__(self, dataset, *args, **kwargs):
        self.loader = StatefulDataLoader(dataset, *args, **kwargs)

    def work(self, batch) -> None:
        """What the loop does with a batch."""

    def close(self) -> None:
        """Nothing to do."""


class PyTorch(Plain):
    """PyTorch's own loader, which shuffles otherwise than torchdata's."""

    def __init__(self, dataset, *args, **kwargs):
        self.loader = DataLoader(dataset, *args, **kwargs)


class Ours(Plain):
    def __init__(self, dataset, *args, **kwargs):
        self.loader = AdaLoader(dataset, *args, **kwargs)


class Training(Plain):
    """An AdaLoader with a model that is trained on the batches."""

    lookahead = 3

    def __init__(self, dataset, *args, **kwargs):
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        options = {"model": self.model, "optimizer": self.optimizer, "min_rows": 1, "lookahead": self.lookahead}
        self.loader = AdaLoader(dataset, *args, **kwargs, **options)

    def work(self, batch) -> None:
        if isinstance(batch, dict) and batch["ids"].ndim > 1:
            self.optimizer.zero_grad()
            self.model(batch).backward()
            self.optimizer.step()

    def close(self) -> None:
        self.loader.close()


class TrainingWithoutLookahead(Training):
    lookahead = 0


KINDS = [Ours, Training, TrainingWithoutLookahead]


def oracle(kind, kwargs) -> type[Plain]:
    """Return whose order a loader has: with a model that of PyTorch's loader, which it replaces."""
    return PyTorch if issubclass(kind, Training) and ("shuffle" in kwargs or "generator" in kwargs) else Plain


def epochs(kind, make_dataset, count: int = 2, seed: int = 5, **kwargs) -> list:
    """Return the batches of `count` passes, the length, and the random state that is left."""
    torch.manual_seed(seed)
    run = kind(make_dataset(), **{name: value() if callable(value) else value for name, value in kwargs.items()})
    torch.manual_seed(seed + 1)
    seen = []
    for _ in range(count):
        for batch in run.loader:
            seen.append(batch)
            run.work(batch)
    try:
        length = len(run.loader)
    except TypeError as error:
        length = type(error)
    run.close()
    return [*seen, length, torch.get_rng_state()]


def assert_same(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


def count_up(samples):
    return {"ids": torch.stack([s["ids"] for s in samples]), "n": len(samples), "list": [s["at"] for s in samples]}


def seed_worker(worker: int) -> None:
    torch.manual_seed(1000 + worker)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(77)


def forked():
    return multiprocessing.get_context("fork")


ARGUMENTS = {
    "dataset": (Ids, {}),
    "dataset, iterable": (Stream, {"batch_size": 4}),
    "dataset, a list": (lambda: [{"ids": torch.tensor([at])} for at in range(7)], {"batch_size": 2}),
    "batch_size": (Ids, {"batch_size": 4}),
    "batch_size=None": (Ids, {"batch_size": None}),
    "batch_size=None, iterable": (Stream, {"batch_size": None}),
    "shuffle": (Ids, {"batch_size": 4, "shuffle": True}),
    "shuffle, workers that draw": (Drawing, {"batch_size": 4, "shuffle": True, "num_workers": 2}),
    "sampler": (Ids, {"batch_size": 4, "sampler": [5, 3, 3, 9, 1, 0, 22]}),
    "sampler, a Sampler": (Ids, {"batch_size": 4, "sampler": lambda: SequentialSampler(range(9))}),
    "batch_sampler": (Ids, {"batch_sampler": [[1, 2], [3], [4, 5, 6, 1]]}),
    "batch_sampler, a BatchSampler": (
        Ids,
        {"batch_sampler": lambda: BatchSampler(SequentialSampler(range(SAMPLES)), 5, drop_last=True)},
    ),
    "num_workers": (Ids, {"batch_size": 4, "num_workers": 2}),
    "num_workers, iterable": (Stream, {"batch_size": 4, "num_workers": 2}),
    "num_workers, a draw per sample": (Drawing, {"batch_size": 4, "num_workers": 2}),
    "collate_fn": (Ids, {"batch_size": 4, "collate_fn": lambda: count_up}),
    "collate_fn in workers": (Ids, {"batch_size": 4, "collate_fn": lambda: count_up, "num_workers": 2}),
    "drop_last": (Ids, {"batch_size": 4, "drop_last": True}),
    "drop_last, iterable": (Stream, {"batch_size": 4, "drop_last": True}),
    "timeout": (Ids, {"batch_size": 4, "timeout": 20.0, "num_workers": 1}),
    "worker_init_fn": (Drawing, {"batch_size": 4, "num_workers": 2, "worker_init_fn": lambda: seed_worker}),
    "multiprocessing_context": (Ids, {"batch_size": 4, "num_workers": 2, "multiprocessing_context": "fork"}),
    "multiprocessing_context, an object": (
        Ids,
        {"batch_size": 4, "num_workers": 2, "multiprocessing_context": forked},
    ),
    "generator": (Ids, {"batch_size": 4, "shuffle": True, "generator": generator}),
    "generator, with workers": (Drawing, {"batch_size": 4, "shuffle": True, "generator": generator, "num_workers": 2}),
    "generator, without shuffling": (Drawing, {"batch_size": 4, "generator": generator}),
    "prefetch_factor": (Drawing, {"batch_size": 4, "shuffle": True, "num_workers": 2, "prefetch_factor": 4}),
    "persistent_workers": (
        Drawing,
        {"batch_size": 4, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    ),
    "pin_memory": (Ids, {"batch_size": 4, "pin_memory": True}),
    "in_order": (Ids, {"batch_size": 4, "num_workers": 1, "in_order": False}),
    "snapshot_every_n_steps": (Stream, {"batch_size": 4, "num_workers": 2, "snapshot_every_n_steps": 3}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_argument(argument, kind):
    make_dataset, kwargs = ARGUMENTS[argument]
    theirs = epochs(oracle(kind, kwargs), make_dataset, **kwargs)
    ours = epochs(kind, make_dataset, **kwargs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", [Ours, Training])
def test_out_of_order_batches_are_the_same_ones(kind):
    run = kind(Slow(), 2, num_workers=2, in_order=False)
    seen = []
    for batch in run.loader:
        seen += batch["at"].tolist()
        run.work(batch)
    run.close()
    assert sorted(seen) == list(range(8)) and seen != list(range(8))  # worker 1's first batch overtakes worker 0's


class Slow(Ids):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int):
        time.sleep(0.5 * (at < 2))
        return super().__getitem__(at)


REFUSED = [
    {"batch_size": 0},
    {"batch_size": -2},
    {"batch_size": 2, "batch_sampler": [[0]]},
    {"shuffle": True, "sampler": [0]},
    {"batch_size": None, "drop_last": True},
    {"num_workers": -1},
    {"timeout": -1},
    {"prefetch_factor": 2},
    {"persistent_workers": True},
    {"num_workers": 1, "prefetch_factor": -1},
    {"num_workers": 1, "multiprocessing_context": "threads"},
    {"num_workers": 0, "multiprocessing_context": "fork"},
    {"no_such_argument": 1},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Ours, Training], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kwargs", REFUSED, ids=str)
def test_bad_arguments_are_refused_alike(kwargs, kind):
    with pytest.raises((ValueError, TypeError)) as theirs:
        Plain(Ids(), **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        kind(Ids(), **kwargs)
    if "no_such_argument" not in kwargs:
        assert str(ours.value) == str(theirs.value)


# --- faults ---


class Faulty(Ids):
    def __getitem__(self, at: int):
        if at == 9:
            raise KeyError("sample nine is broken")
        return super().__getitem__(at)


class Deadly(Ids):
    def __getitem__(self, at: int):
        if at == 9 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(at)


class Stuck(Ids):
    def __getitem__(self, at: int):
        if at == 9:
            time.sleep(6)  # on a busy machine the loop comes to wait for it seconds later
        return super().__getitem__(at)


def until_it_fails(kind, dataset, **kwargs):
    """Return what was seen before the error, and the error."""
    run = kind(dataset, 2, **kwargs)
    seen = []
    try:
        for batch in run.loader:
            seen.append(batch["at"].tolist())
            run.work(batch)
    except Exception as error:
        return seen, error.with_traceback(None)  # whose frames hold the workers
    finally:
        run.close()
    raise AssertionError("no error")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_worker_comes_with_its_traceback(kind, num_workers):
    theirs = until_it_fails(Plain, Faulty(), num_workers=num_workers)
    ours = until_it_fails(kind, Faulty(), num_workers=num_workers)
    assert ours[0] == theirs[0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert type(ours[1]) is type(theirs[1]) is KeyError
    assert "sample nine is broken" in str(ours[1])
    if num_workers:
        assert "worker process 0" in str(ours[1]) and "in __getitem__" in str(ours[1])


KILLED = """
from tests.adaloader.test_torchdata_protocol import *
run = {kind}(Deadly(), 2, num_workers=1)
for batch in run.loader:
    run.work(batch)
"""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_killed_worker_is_an_error(kind):
    """In a process of its own, for PyTorch's handler of the signal raises wherever the process is; or the pipe that the
    worker sends its batches by breaks first."""
    code = KILLED.format(kind=kind.__name__)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    causes = "killed by signal", "Connection reset", "exited unexpectedly", "EOFError"
    assert any(said in done.stderr for said in causes), done.stderr


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_worker_that_takes_too_long_is_an_error(kind):
    theirs = until_it_fails(Plain, Stuck(), num_workers=1, timeout=1.5)
    ours = until_it_fails(kind, Stuck(), num_workers=1, timeout=1.5)
    assert type(ours[1]) is type(theirs[1]) is RuntimeError
    assert ours[0] == theirs[0] and "timed out after 1.5 seconds" in str(ours[1])


# --- state ---

SOURCES = {
    "map": (Ids, {"shuffle": True}),
    "map with workers": (Ids, {"shuffle": True, "num_workers": 2}),
    "stream": (Stream, {}),
    "stream with workers": (Stream, {"num_workers": 2}),
    "stream with workers, snapshots now and then": (Stream, {"num_workers": 2, "snapshot_every_n_steps": 3}),
    "stream without a state": (Counted, {}),
    "sampler": (Ids, {"sampler": list(range(20, 3, -1))}),
    "batch sampler": (Ids, {"batch_sampler": [[at, at + 1] for at in range(9)]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("stop_after", [1, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_state_in_mid_epoch_is_that_of_the_batch_handed_out(source, stop_after, kind):
    """What comes after resuming is what comes without a break, whatever was read ahead."""
    make_dataset, kwargs = SOURCES[source]
    kwargs = kwargs if "batch_sampler" in kwargs else {"batch_size": 3, **kwargs}

    def resumed(kind):
        torch.manual_seed(3)
        run = kind(make_dataset(), **kwargs)
        for number, batch in enumerate(run.loader, 1):
            run.work(batch)
            if number == stop_after:
                state = run.loader.state_dict()
                break
        run.close()
        torch.manual_seed(4)
        again = kind(make_dataset(), **kwargs)
        again.loader.load_state_dict(state)
        torch.manual_seed(5)
        rest = []
        for _ in range(2):
            for batch in again.loader:
                rest.append(batch)
                again.work(batch)
        again.close()
        return rest

    torch.manual_seed(3)
    whole = oracle(kind, kwargs)(make_dataset(), **kwargs)
    if issubclass(kind, Training):
        Training(make_dataset(), **kwargs).close()  # draws what making a model draws
    unbroken = list(whole.loader)[stop_after:]
    ours = resumed(kind)
    assert_same(ours[: len(unbroken)], unbroken)
    if oracle(kind, kwargs) is Plain:
        assert_same(ours, resumed(Plain))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["map", "stream", "stream with workers", "stream without a state"])
def test_without_a_model_states_are_torchdatas(source):
    """Either's state can be loaded by the other."""
    make_dataset, kwargs = SOURCES[source]

    def state_of(kind):
        torch.manual_seed(3)
        loader = kind(make_dataset(), batch_size=3, **kwargs).loader
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        return loader.state_dict()

    def rest(kind, state):
        loader = kind(make_dataset(), batch_size=3, **kwargs).loader
        loader.load_state_dict(state)
        return list(loader)

    ours, theirs = state_of(Ours), state_of(Plain)
    assert_same(list(ours), list(theirs))
    assert_same(rest(Plain, ours), rest(Ours, theirs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Ours, Training], ids=lambda kind: kind.__name__)
def test_no_worker_is_left_behind(kind):
    before = set(multiprocessing.active_children())
    run = kind(Ids(), 3, num_workers=2)
    for batch in run.loader:
        run.work(batch)
        break
    run.close()
    del run
    for _ in range(50):
        if set(multiprocessing.active_children()) <= before:
            return
        time.sleep(0.1)
    raise AssertionError(multiprocessing.active_children())
