"""Loops that do more than a step to a model leave what they leave in plain PyTorch."""

import pytest

from tests.loop_cases import Case
from tests.trick_loops import ALL


@pytest.mark.parametrize("optimizer", ["adagrad", "two"])
@pytest.mark.parametrize("name", ALL)
def test_loop_is_plain(name, optimizer, seed):
    Case(23, seed=seed, optimizer=optimizer).compare(ALL[name])
