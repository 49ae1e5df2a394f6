"""A rank whose end fails ends the job: the others would wait for it for ever."""

from __future__ import annotations

import pytest

from tests.launch import launch, mpirun

pytest.importorskip("mpi4py", reason="no mpi4py")
pytestmark = pytest.mark.skipif(mpirun() is None, reason="no mpirun")

PROGRAM = """
import torch
from adaloader import AdaLoader
import pm
from mpi4py import MPI

model = torch.nn.Embedding(50, 4, sparse=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = AdaLoader(torch.arange(40), batch_size=4, model=model, optimizer=optimizer, min_rows=1)
for batch in loader:
    model(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

def close(self, **how):
    raise OSError("no room to say goodbye")

if MPI.COMM_WORLD.rank == 1:
    pm.SynchronousManager.close = close
"""


def test_failure_while_closing_at_exit_is_printed_and_ends_the_job():
    result = launch(3, PROGRAM, timeout_seconds=60)
    assert result.returncode not in (0, None)
    assert "no room to say goodbye" in result.stderr
    assert "rank 1 of 3 failed (OSError)" in result.stderr
