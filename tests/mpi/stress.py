"""Random programs on a `pm.ParameterManager`, one after the other, for as long as is asked.

mpirun -n 3 python -m tests.mpi.stress --minutes 10
mpirun -n 3 python -m tests.mpi.stress --seed 17          one program again
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tests.parameter_programs import Program, Run


def stress(comm, seconds: float, first_seed: int) -> tuple[int, int]:
    """Run programs until the time is over; return how many, and how many keys were read (collective)."""
    started, programs, reads = time.monotonic(), 0, 0
    goes_on = np.array([1])
    while goes_on[0]:
        program = Program.random(first_seed + programs, comm.size)
        try:
            reads += Run(comm, program).run().reads
        except BaseException:
            print(f"rank {comm.rank}: seed {first_seed + programs} failed: {program}", flush=True)
            raise
        programs += 1
        goes_on[0] = time.monotonic() - started < seconds
        comm.Bcast(goes_on)
    return programs, reads


def main() -> None:
    """Run what the command line asks for; a failure on any rank ends the job."""
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description="Stress for the parameter manager.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="run this program only")
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    try:
        if args.seed is not None:
            result = 1, Run(comm, Program.random(args.seed, comm.size)).run().reads
        else:
            result = stress(comm, 60.0 * args.minutes, args.first_seed)
    except BaseException:
        import traceback

        traceback.print_exc()
        comm.Abort(1)
    print(f"rank {comm.rank}: {result[0]} programs, {result[1]} keys read, no violation", flush=True)


if __name__ == "__main__":
    main()
