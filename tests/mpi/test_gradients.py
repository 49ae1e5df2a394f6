"""Gradients of tables as user code sees them on several ranks: what plain PyTorch on one process gives."""

import pytest

from tests import gradient_loops
from tests.loops import Case
from tests.mpi.test_loops import SAMPLES


@pytest.mark.parametrize("name", gradient_loops.ALL)
def test_loop_is_plain(name, comm, seed):
    """Where the last batch is shared unevenly: with ranks that have no part of it, or parts of two sizes."""
    for samples in SAMPLES.get(comm.size, (4 * comm.size * 3 + 1,)):
        Case(samples, seed=seed, comm=comm).compare(gradient_loops.ALL[name])
