"""Worker processes of a loader that die while a batch of theirs is read."""

import time
from multiprocessing import get_context
from threading import Timer

import pytest
from torch.utils.data import DataLoader, Dataset

from adaloader.reading import data_workers
from adaloader.reading.data_workers import read_batch


class _Broken:
    """An iterator whose read fails as PyTorch's does when a worker goes while its batch is fetched."""

    def __init__(self, error: Exception, workers: int, seconds: float = 60):
        self._error = error
        context = get_context("spawn")
        self._workers = [context.Process(target=time.sleep, args=(seconds,), daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def __iter__(self):
        return self

    def __next__(self):
        raise self._error

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "socket")])
def test_worker_that_is_still_dying_is_named(error):
    broken = _Broken(error, 2)
    death = Timer(0.2, broken._workers[0].kill)
    death.start()
    try:
        with pytest.raises(RuntimeError, match=r"exit code -9\) exited unexpectedly") as raised:
            read_batch(broken)
        assert str(broken._workers[0].pid) in str(raised.value)
        assert str(broken._workers[1].pid) not in str(raised.value)
        assert raised.value.__cause__ is error
    finally:
        death.join()
        broken.close()


def test_error_of_living_workers_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(data_workers, "_DYING_SECONDS", 0.5)
    error = FileNotFoundError(2, "no such sample")
    broken = _Broken(error, 1)
    try:
        with pytest.raises(FileNotFoundError) as raised:
            read_batch(broken)
        assert raised.value is error
    finally:
        broken.close()


class _Absent(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, at):
        raise FileNotFoundError(2, f"no sample {at}")


def test_error_raised_in_a_worker_comes_at_once(monkeypatch):
    """Nobody is dying then: to look for that would take as long as it may take."""
    monkeypatch.setattr(data_workers, "wait", None)
    with pytest.raises(FileNotFoundError, match="no sample 0"):
        read_batch(iter(DataLoader(_Absent(), 4, num_workers=1)))


def test_worker_that_ended_in_order_is_not_the_cause():
    error = FileNotFoundError(2, "no such sample")
    broken = _Broken(error, 1, seconds=0)
    broken._workers[0].join()
    with pytest.raises(FileNotFoundError) as raised:
        read_batch(broken)
    assert raised.value is error


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such sample"), ValueError("bad sample"), StopIteration()])
def test_error_without_workers_is_left_as_it_is(error):
    broken = _Broken(error, 0)
    with pytest.raises(type(error)) as raised:
        read_batch(broken)
    assert raised.value is error
