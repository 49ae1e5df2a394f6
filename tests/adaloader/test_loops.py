"""Every loop of `tests/loops.py` on one process: what it logs and leaves is what plain PyTorch logs and leaves."""

import pytest

from tests import loops
from tests.loop_cases import Case


@pytest.mark.parametrize("loop", loops.ALL, ids=lambda loop: loop.__name__)
def test_loop_is_plain(loop, seed):
    case = Case(samples=26, seed=seed)
    case.compare(loop)
    case.compare(loop, keys=None, lookahead=0)


@pytest.mark.parametrize("loop", loops.ALL, ids=lambda loop: loop.__name__)
def test_loop_is_plain_with_two_optimizers_and_schedules(loop, seed):
    Case(samples=26, seed=seed, optimizer="two", with_schedule=True).compare(loop, lookahead=50)
