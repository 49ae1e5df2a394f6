"""kill -9 of a random rank of a click-through run at random moments, half of them while a checkpoint is being written.

    python -m tests.stress.killed_jobs --count 200
    python -m tests.stress.killed_jobs --seed 5 --count 10

Each killed job is started again until it ends by itself; then its weights must be the bits of those of a run that
nobody killed. No more steps may be lost than lie between two checkpoints, and the one that was being written.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from adaloader.checkpoint.inspecting import check
from adaloader.checkpoint.layout import INDEX, complete_in, read_index
from adaloader.ranks.registry import RUN_FOLDER, read_entries
from tests.launch import ROOT, _environment, mpirun

PROGRAM = Path(__file__).with_name("ctr_job.py")
EVERY_STEPS, STEPS = 4, 80
SECONDS_TO_START, SECONDS_TO_DIE, SECONDS_TO_END = 300.0, 60.0, 600.0


class Job:
    """One job on `ranks` ranks in a folder of its own, begun and killed again and again."""

    def __init__(self, folder: Path, options: list[str], ranks: int):
        self.folder, self.options, self.ranks = folder, options, ranks
        self.checkpoints, self.out = folder / "checkpoints", folder / "state"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        shutil.rmtree(self.folder / "ranks", ignore_errors=True)
        command = [mpirun(), "-n", str(self.ranks), sys.executable, str(PROGRAM), str(self.checkpoints), str(self.out)]
        environment = {**_environment(None), RUN_FOLDER: str(self.folder)}
        with open(self.folder / "said", "ab") as said:
            self.process = subprocess.Popen(
                command + self.options, env=environment, cwd=ROOT, stdout=said, stderr=said, start_new_session=True
            )

    def steps_taken(self) -> int:
        """Return how many steps the furthest rank has taken."""
        texts = [path.read_text() for path in self.folder.glob("steps-*")]
        return max([int(text) for text in texts if text], default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is begun and has no index yet."""
        return any(not (path.parent / INDEX).exists() for path in self.checkpoints.glob("step-*/data-*"))

    def kill(self, rank: int) -> bool:
        """Kill a rank; return whether the job was still running. It must end within seconds."""
        entry = next(entry for entry in read_entries(self.folder) if entry.rank == rank)
        is_running = self.process.poll() is None and entry.send(signal.SIGKILL)
        self.process.wait(SECONDS_TO_DIE if is_running else SECONDS_TO_END)
        return is_running

    def end(self) -> None:
        """Kill whatever of it still runs."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def newest(self) -> int:
        complete = complete_in(self.checkpoints)
        if complete:
            check(complete[-1])
        return read_index(complete[-1]).steps if complete else 0


def wait_for_moment(job: Job, rng: random.Random, while_saving: bool) -> None:
    """Wait until the job has gone on for some random steps and, if so asked, is saving."""
    begun, deadline = job.steps_taken(), time.monotonic() + SECONDS_TO_START
    target = begun + rng.randrange(1, 3 * EVERY_STEPS)
    while job.process.poll() is None and (job.steps_taken() < target or (while_saving and not job.is_saving())):
        assert time.monotonic() < deadline, f"no progress beyond step {job.steps_taken()}: see {job.folder / 'said'}"
        time.sleep(0.0005 if while_saving else 0.01)
    time.sleep(rng.random() * (0.01 if while_saving else 0.1))


def kill_once(job: Job, rng: random.Random, while_saving: bool) -> tuple[bool, bool, int]:
    """Start the job and kill it; return (whether it was killed, whether while saving, steps that were lost)."""
    job.start()
    wait_for_moment(job, rng, while_saving)
    is_saving = job.is_saving()
    if not job.kill(rng.randrange(job.ranks)):
        return False, False, 0
    lost = job.steps_taken() - job.newest()
    for counted in job.folder.glob("steps-*"):
        counted.write_text(str(job.newest()))
    return True, is_saving, lost


def run_job(rng: random.Random, folder: Path, options: list[str], ranks: int, kills: int, bar: tqdm) -> tuple[int, int]:
    """Run one job with about so many kills; return (kills, of which while saving)."""
    job, done, saving = Job(folder, options, ranks), 0, 0
    try:
        while done < kills:
            killed, was_saving, lost = kill_once(job, rng, while_saving=done % 2 == 0)
            if not killed:
                break
            # The furthest rank may be a step ahead; of two intervals one is that of the checkpoint being written.
            most = EVERY_STEPS * (2 if "--asynchronous" in options else 1) + 1
            assert lost <= most, f"{lost} steps were lost where {most} may be: see {folder}"
            done, saving = done + 1, saving + was_saving
            bar.update()
        if not job.out.exists():
            job.start()
            code = job.process.wait(SECONDS_TO_END)
            assert code == 0, f"the job ended with code {code}: see {folder / 'said'}"
    finally:
        job.end()
    return done, saving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many kills (%(default)s)")
    parser.add_argument("--of-each", type=int, default=10, help="kills of one job (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    rng, done, saving = random.Random(seed), 0, 0
    whole: dict[str, dict[str, torch.Tensor]] = {}
    folder = Path(tempfile.mkdtemp(prefix="adaloader-killed-"))
    with tqdm(total=args.count, mininterval=5.0) as bar:
        number = 0
        while done < args.count:
            optimizer = rng.choice(["Adagrad", "Adam"])
            options = ["--optimizer", optimizer, "--steps", str(STEPS), "--every-steps", str(EVERY_STEPS)]
            if optimizer not in whole:
                (folder / optimizer).mkdir()
                run_job(rng, folder / optimizer, options, args.ranks, 0, bar)
                whole[optimizer] = torch.load(folder / optimizer / "state")
            of_job = folder / f"job-{number}"
            of_job.mkdir()
            more = options + (["--asynchronous"] if rng.random() < 0.5 else [])
            counts = run_job(rng, of_job, more, args.ranks, min(args.of_each, args.count - done), bar)
            done, saving, number = done + counts[0], saving + counts[1], number + 1
            state = torch.load(of_job / "state")
            differing = [name for name, value in whole[optimizer].items() if not torch.equal(value, state[name])]
            assert not differing, f"{more}: {differing} differ from the run that nobody killed: see {of_job}"
            shutil.rmtree(of_job)
    shutil.rmtree(folder)
    print(f"seed {seed}: {done} kills, {saving} while saving: every job came to the weights of the undisturbed one")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
