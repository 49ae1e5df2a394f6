"""Random sequences of training, saving, dying, resuming, and other numbers of ranks: never a difference.

    mpirun -n 4 python -m tests.stress.sequences --count 500
    mpirun -n 4 python -m tests.stress.sequences --seed 17 --count 1       one sequence again

Each sequence draws its optimizer, techniques, data and acts from its seed. One that keeps its number of ranks must come
to the bits of a run to which nothing happened; one that changes it, to one process's results, to rounding, and see each
sample once in each pass.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from adaloader.checkpoint.inspecting import check
from tests.resuming import OPTIMIZERS, Script, assert_close, assert_identical

GLOBAL_BATCH = 12  # which 1 to 4 ranks can share evenly
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Plan:
    """What one sequence is: `acts` are ("train", batches), ("save",), ("die", ranks to resume with)."""

    seed: int
    optimizer: str
    samples: int
    ranks: int
    changes_ranks: bool
    options: dict
    dropout: float
    asynchronous: bool
    acts: tuple[tuple, ...]

    @classmethod
    def random(cls, seed: int, most_ranks: int) -> Plan:
        rng = np.random.default_rng(seed)
        ranks, changes = int(rng.integers(1, most_ranks + 1)), bool(rng.integers(2)) and most_ranks > 1
        full, rest = int(rng.integers(1, 6)), int(rng.choice([0, 0, *range(4, GLOBAL_BATCH)]))
        options = {
            "techniques": str(rng.choice(["all", "relocation", "replication", "none"])),
            "lookahead": int(rng.choice([0, 1, 4])),
            "shuffle": bool(rng.integers(4)),
            "shared_memory": (True, False, 2)[rng.integers(3)],
            "num_workers": int(rng.random() < 0.08),
        }
        acts: list[tuple] = []
        is_saved = False
        for _ in range(int(rng.integers(3, 9))):
            what = rng.choice(["train", "train", "save", "die"] if is_saved else ["train", "save"])
            if what == "train":
                acts.append(("train", int(rng.integers(1, 8))))
            elif what == "save":
                acts.append(("save",))
                is_saved = True
            else:
                acts.append(("die", int(rng.integers(1, most_ranks + 1)) if changes else ranks))
        return cls(
            seed=seed,
            optimizer=str(rng.choice(sorted(OPTIMIZERS))),
            samples=full * GLOBAL_BATCH + rest,
            ranks=ranks,
            changes_ranks=changes,
            options=options,
            dropout=0.0 if changes else 0.2,
            asynchronous=bool(rng.integers(2)),
            acts=tuple(acts),
        )


class Sequence:
    """Carries one plan out on the ranks of a communicator; its methods are collective over all of them."""

    def __init__(self, comm, plan: Plan, folder: Path):
        self.comm, self.plan, self.folder = comm, plan, folder
        self.calls = 0
        self.seen: list[int] = []  # by this rank, since the beginning of the run's story
        self.losses: list[float] = []
        self.saved = (0, [], [])
        self.is_part, self.script, self.own_comm = False, None, None

    def run(self) -> None:
        self._start(self.plan.ranks, self.plan.seed)
        for act in self.plan.acts:
            getattr(self, "_" + act[0])(*act[1:])
        state = self.script.state() if self.is_part else {}
        self._end()
        self._compare(state)

    def _start(self, ranks: int, model_seed: int) -> None:
        self.is_part = self.comm.rank < ranks
        self.own_comm = self.comm.Split(0 if self.is_part else 1, self.comm.rank)
        if self.is_part:
            self.script = self._script(self.own_comm).start(model_seed)

    def _script(self, comm) -> Script:
        plan = self.plan
        size = GLOBAL_BATCH // comm.size
        return Script(
            comm, plan.optimizer, torch.float64, plan.dropout, plan.samples, size, plan.seed, dict(plan.options)
        )

    def _end(self) -> None:
        if self.is_part:
            self.script.close()
        self._free(self.own_comm)
        self.comm.Barrier()

    def _free(self, comm) -> None:
        """Leave the process group of `comm`, so that other ranks can have one."""
        if dist.is_initialized():
            dist.destroy_process_group()
        comm.Free()

    def _train(self, batches: int) -> None:
        if self.is_part:
            seen, losses = len(self.script.seen), len(self.script.losses)
            self.script.run(batches)
            self.seen += self.script.seen[seen:]
            self.losses += self.script.losses[losses:]
        self.calls += batches

    def _save(self) -> None:
        if self.is_part:
            self.script.save(self.folder / "saved", self.plan.asynchronous)
        everyones = self.comm.allgather(self.seen)
        self.saved = (self.calls, everyones, list(self.losses))

    def _die(self, ranks: int) -> None:
        self._end()
        if self.comm.rank == 0:
            check(self.folder / "saved")
        self._start(ranks, self.plan.seed + 1)
        if self.is_part:
            self.script.load(self.folder / "saved")
        self.calls, everyones, self.losses = self.saved[0], self.saved[1], list(self.saved[2])
        # What ranks that are no longer there have seen is rank 0's now.
        self.seen = sum(everyones, []) if self.comm.rank == 0 else []

    def _compare(self, state: dict[str, torch.Tensor]) -> None:
        everyones = self.comm.gather(self.seen)
        ranks = 1 if self.plan.changes_ranks else self.plan.ranks
        is_part = self.comm.rank < ranks
        comm = self.comm.Split(0 if is_part else 1, self.comm.rank)
        if is_part:
            whole = self._script(comm).start().run(self.calls)
            expected = whole.state()
            if not self.plan.changes_ranks:
                np.testing.assert_array_equal(whole.losses, self.losses)
            whole.close()
            if self.comm.rank == 0:
                self._compare_states(state, expected)
        self._free(comm)
        if self.comm.rank == 0:
            self._compare_samples(sum(everyones, []), whole.seen if self.plan.changes_ranks else None)

    def _compare_states(self, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        if self.plan.changes_ranks:
            assert_close(state, expected, TOLERANCE)
        else:
            del state["numpy"], expected["numpy"]
            assert_identical(state, expected)

    def _compare_samples(self, seen: list[int], expected: list[int] | None) -> None:
        if expected is not None:
            assert Counter(seen) == Counter(expected), "samples were lost or repeated"
        counts = Counter(seen)
        passes = {counts[at] for at in range(self.plan.samples)}
        assert max(passes) - min(passes) <= 1, f"samples were seen {sorted(passes)} times"


def run_one(comm, plan: Plan) -> None:
    """Carry a plan out in a folder of its own (collective)."""
    folder = Path(comm.bcast(tempfile.mkdtemp(prefix="adaloader-sequence-") if comm.rank == 0 else ""))
    try:
        Sequence(comm, plan, folder).run()
    finally:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)


def main() -> None:
    """Run what the command line asks for; a failure on any rank ends the job with a non-zero code."""
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="how many sequences (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the first one (default: drawn)")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    first = comm.bcast(args.seed if args.seed is not None else int(np.random.SeedSequence().entropy % 10**9))
    for number in tqdm(range(args.count), disable=comm.rank != 0, mininterval=10.0):
        plan = Plan.random(first + number, comm.size)
        try:
            run_one(comm, plan)
        except BaseException:
            print(f"rank {comm.rank}: --seed {first + number} --count 1 failed: {plan}", file=sys.stderr, flush=True)
            traceback.print_exc()
            comm.Abort(1)
    if comm.rank == 0:
        print(f"{args.count} sequences from seed {first} on {comm.size} ranks: no difference", flush=True)


if __name__ == "__main__":
    main()
