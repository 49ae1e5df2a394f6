"""Why a rank says that it waits in vain: only of what can no longer come."""

from types import SimpleNamespace

import pytest

from pm.exact.missing import Missing
from pm.exact.peers import Peers


def of_rank_0(applied: int, steps: int, arrived: dict[int, object]) -> SimpleNamespace:
    """What `Missing` asks of the manager of rank 0 of 2, of which rank 1 has closed after its last step."""
    others = Peers(0, 2)
    others.ended.add(1)
    return SimpleNamespace(
        rank=0,
        applied=applied,
        steps=steps,
        others=others,
        inbox=SimpleNamespace(first_waiting=list),
        serving=SimpleNamespace(round_of=arrived.get),
    )


@pytest.mark.parametrize("arrived", [{}, {1: SimpleNamespace(stepped={0: None}, sums=None)}])
def test_a_closed_rank_without_a_step_is_named(arrived):
    reason = Missing(of_rank_0(applied=1, steps=2, arrived=arrived)).why_no_step()
    assert "step 1 of rank 1" in reason


def test_a_step_that_is_applied_at_this_moment_is_not_missed():
    """The background thread applies it, and forgets what had arrived for it, while the trainer's thread looks."""
    manager = of_rank_0(applied=1, steps=2, arrived={})

    def round_of(step):
        manager.applied = step + 1

    manager.serving.round_of = round_of
    assert Missing(manager).why_no_step() is None
