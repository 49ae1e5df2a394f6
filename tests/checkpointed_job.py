"""A job that makes checkpoints and resumes, and comes to harm as its command line says; see `test_checkpoint_jobs.py`.

    checkpointed_job.py FOLDER OUT [ATTEMPT:RANK:WHERE:COUNT ...]

In its ATTEMPT-th start, RANK comes to harm when it is at WHERE for the COUNT-th time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

import adaloader
from adaloader.checkpoint import layout, writing
from adaloader.checkpoint.tensor_file import TensorFileWriter
from tests.resuming import Script

EPOCHS = 2


def world():
    if "PMI_RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


def harm(kind: str) -> None:
    if kind == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else getattr(signal, kind))


def after(count: int, kind: str, call):
    """Return `call`, which does harm when it is called for the count-th time, before it does anything else."""
    left = [count]

    def counted(*args, **keywords):
        left[0] -= 1
        if left[0] == 0:
            harm(kind)
        return call(*args, **keywords)

    return counted


def arm(script: Script, where: str, count: int, kind: str) -> None:
    if where == "batch":
        script.one_batch = after(count, kind, script.one_batch)
    elif where == "write":
        TensorFileWriter.write = after(count, kind, TensorFileWriter.write)
    elif where == "close":
        TensorFileWriter.close = after(count, kind, TensorFileWriter.close)
    elif where == "index":
        writing.write_durably = after(count, kind, layout.write_durably)
    elif where == "remove":
        writing.remove_other_data = after(count, kind, layout.remove_other_data)
    else:
        raise ValueError(where)


def main(folder: Path, out: Path, *harms: str) -> None:
    comm = world()
    rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
    attempts = out.with_name(f"attempts-{rank}")
    attempt = len(attempts.read_text()) if attempts.exists() else 0
    attempts.write_text("x" * (attempt + 1))
    script = Script(comm, "adam", torch.float64, 0.1, samples=16 * 9 + 3, batch_size=16 // ranks, seed=7).start()
    epoch = 0
    if layout.complete_in(folder):
        restored = script.load(folder)
        epoch = restored["epoch"]
        print(f"rank {rank} resumed at step {restored.steps}", flush=True)
    extra = {"scheduler": script.scheduler}
    script.loader.checkpoint(folder, every_steps=2, extra=lambda: {**extra, "epoch": epoch})
    for each in harms:
        at, of_rank, where, count, kind = each.split(":")
        if (int(at), int(of_rank)) == (attempt, rank):
            arm(script, where, int(count), kind)
    while epoch < EPOCHS:
        script.finish_pass()
        epoch += 1
    state = script.state()
    if rank == 0:
        torch.save(state, out)
    script.close()
    print(f"rank {rank} has finished", flush=True)


if __name__ == "__main__":
    assert adaloader.save
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
