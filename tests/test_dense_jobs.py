"""Jobs in which dense gradients cannot be reduced: they end, soon, and say why."""

from __future__ import annotations

import pytest

from tests.launch import launch, mpirun

pytest.importorskip("mpi4py", reason="no mpi4py")
pytestmark = pytest.mark.skipif(mpirun() is None, reason="no mpirun")

PREAMBLE = """
import os, sys, time, traceback
import torch
import torch.distributed as dist
from mpi4py import MPI
from adaloader.dense.parameters import DenseReducer
from adaloader.dense.process_group import process_group

comm = MPI.COMM_WORLD

def end_job(*error):
    traceback.print_exception(*error, file=sys.__stderr__)  # torch.distributed buffers sys.stderr here
    time.sleep(0.5)  # what was printed needs a moment to reach mpirun
    comm.Abort(1)

sys.excepthook = end_job
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))

def reducer(**options):
    options |= {"weights": lambda: (1.0, None), "on_reduced": lambda scale: None}
    return DenseReducer(model.named_parameters(), process_group(comm), **options)

def backward():
    model(torch.ones(2, 4)).sum().backward()
"""


@pytest.mark.parametrize("last", ["backward()", "made.finish_step()"])
def test_a_job_that_ends_at_once_leaves_no_trace(last):
    """The threads of the last collective are busy when the interpreter begins to end."""
    body = "made = reducer(); backward(); made.finish_step(); assert 'GLOO_SOCKET_IFNAME' not in os.environ\n"
    for _ in range(2):
        result = launch(3, PREAMBLE + body + last)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_group_of_the_user_s_is_used(tmp_path):
    body = """
store = dist.FileStore(sys.argv[1], comm.size)
dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
assert process_group(comm) is dist.group.WORLD
reducer(); backward()
dist.destroy_process_group()
"""
    result = launch(2, PREAMBLE + body, str(tmp_path / "store"))
    assert (result.returncode, result.stderr) == (0, "")


def test_group_on_some_ranks_only():
    body = """
if comm.rank:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
process_group(comm)
"""
    result = launch(2, PREAMBLE + body)
    assert result.returncode != 0
    assert "rank 0 of 2 has not initialised torch.distributed and others have" in result.stderr


def test_rank_that_goes_on_after_its_backward_raised():
    body = """
made = reducer(bucket_bytes=1, first_bucket_bytes=1)
backward(); made.finish_step()
if comm.rank == 1:
    def fail(grad):
        raise ArithmeticError("midway")
    handle = model[0].weight.register_hook(fail)
    try:
        backward()
    except ArithmeticError:
        handle.remove()
backward()
"""
    result = launch(3, PREAMBLE + body, timeout_seconds=60)
    assert result.returncode != 0
    assert "another rank's backward raised in reduction 0 of step 1, and it went on" in result.stderr


def test_rank_that_ends_is_noticed():
    result = launch(2, PREAMBLE + "made = reducer()\nif comm.rank: os._exit(5)\nbackward()", timeout_seconds=60)
    assert result.returncode != 0


def test_rank_that_does_not_come():
    body = """
made = reducer(timeout_seconds=2.0, describe_peers=lambda: "I wait for rank 1.")
if comm.rank:
    time.sleep(60)
backward()
"""
    result = launch(2, PREAMBLE + body, timeout_seconds=50)
    assert result.returncode != 0
    assert "summing dense gradients failed in reduction 0 of step 0" in result.stderr
    assert "I wait for rank 1." in result.stderr
    assert result.seconds < 45
