"""Every loop of `tests/loops.py` on several ranks, where the last batch is shared unevenly: equal to plain PyTorch."""

import pytest

from tests import loops
from tests.loop_cases import Case

SAMPLES = {1: (26,), 2: (25, 27), 3: (25, 29), 4: (33, 39)}
"""By number of ranks, with 4 samples a rank and batch: ranks without a part in the last batch; parts of two sizes."""


def samples_for(loop, ranks):
    """Loops that take batches ahead get both; to save time the others get one each."""
    if loop in loops.NEED_EVEN_BATCHES:
        return (ranks * 4 * 4,)
    samples = SAMPLES.get(ranks, (4 * ranks * 3 + 1,))
    return samples if "prefetching" in loop.__name__ else samples[loops.ALL.index(loop) % len(samples) :][:1]


@pytest.mark.parametrize("loop", loops.ALL, ids=lambda loop: loop.__name__)
def test_loop_is_plain(loop, comm, seed):
    for samples in samples_for(loop, comm.size):
        Case(samples, seed=seed, comm=comm, with_schedule=True).compare(loop)


WITHOUT_KEYS = [
    loops.usual,
    loops.prefetching,
    loops.prefetching_in_the_middle,
    loops.accumulating,
    loops.skipping,
    loops.again_after_the_step,
    loops.evaluating_another_loader_in_mid_step,
    loops.unused_on_some_ranks,
]


@pytest.mark.parametrize("loop", WITHOUT_KEYS, ids=lambda loop: loop.__name__)
def test_loop_is_plain_without_keys(loop, comm, seed):
    """Which batch a backward belongs to must then be told from the loop's behaviour."""
    Case(SAMPLES.get(comm.size, (26,))[0], seed=seed, comm=comm).compare(loop, keys=None, lookahead=1)


@pytest.mark.parametrize("loop", [loops.usual, loops.prefetching, loops.accumulating, loops.forward_only_sometimes])
def test_loop_is_plain_with_two_optimizers(loop, comm, seed):
    case = Case(SAMPLES.get(comm.size, (26,))[0], seed=seed, comm=comm, optimizer="two", with_schedule=True)
    case.compare(loop, lookahead=50)


@pytest.mark.parametrize("loop", [loops.evaluating_another_loader, loops.evaluating_without_no_grad, loops.two_loaders])
def test_the_loader_for_validation_may_know_the_optimizer(loop, comm, seed):
    case = Case(SAMPLES.get(comm.size, (26,))[0], seed=seed, comm=comm)
    case.compare(loop, validation_options={"with_optimizer": True})


def test_loops_with_worker_processes(comm, seed):
    workers = {"num_workers": 2, "persistent_workers": True}
    case = Case(SAMPLES.get(comm.size, (26,))[0], seed=seed, comm=comm)
    for loop in (loops.usual, loops.prefetching):
        case.compare(loop, plain_options=workers, **workers)
