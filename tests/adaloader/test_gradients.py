"""Gradients of tables as user code sees them on one rank; `tests/mpi/test_gradients.py` has more ranks."""

import pytest

from tests import gradient_loops
from tests.loop_cases import Case


@pytest.mark.parametrize("optimizer", ["adagrad", "two"])
@pytest.mark.parametrize("name", gradient_loops.ALL)
def test_loop_is_plain(name, optimizer, seed):
    Case(26, seed=seed, optimizer=optimizer).compare(gradient_loops.ALL[name])
