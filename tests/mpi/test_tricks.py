"""Loops that do more than a step to a model leave, on several ranks, what one process leaves in plain PyTorch."""

import pytest

from tests.loop_cases import Case
from tests.trick_loops import ALL


@pytest.mark.parametrize("optimizer", ["adagrad", "two"])
@pytest.mark.parametrize("name", ALL)
def test_loop_is_plain(name, optimizer, comm, seed):
    """All ranks have as many batches: writes to tables are made by all of them together."""
    Case(4 * comm.size * 4 + comm.size * 2, seed=seed, optimizer=optimizer, comm=comm).compare(ALL[name])
