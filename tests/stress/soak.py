"""Train a click-through model for long, with saves, rows that move and validation, and see that nothing grows.

    mpirun -n 2 python -m tests.stress.soak --minutes 30

Every half minute each rank notes its resident memory, threads, open files and memory maps, and rank 0 those of all in
a table. It ends with code 1 if, after a warm-up of a fifth of the time, any of them has grown: the median of the last
fifth over that of the fifth after the warm-up by more than 2 % of memory, or by more than one of the others.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

import adaloader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from ctr_data import make_synthetic  # noqa: E402
from ctr_models import WideAndDeep  # noqa: E402
from runs import as_is  # noqa: E402

WHAT = ("resident MB", "threads", "files", "maps", "shared MB")
MOST_GROWTH = (0.02, 1, 1, 8, 0.02)  # a share of memory, a number of the others: glibc splits maps now and then


def resources() -> list[float]:
    """Return what this process holds, in the order of WHAT."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    megabytes = [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssShmem")]
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    return [megabytes[0], int(status["Threads"]), len(os.listdir("/proc/self/fd")), maps, megabytes[1]]


def train(args: argparse.Namespace, comm: MPI.Comm, folder: Path) -> list[np.ndarray]:
    """Train for `--minutes`; return what all ranks held, `[ranks, 5]`, at each sample."""
    torch.manual_seed(args.seed)
    model = WideAndDeep(args.rows, 8, dropout=0.1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    data = make_synthetic(args.samples, args.rows, args.seed)
    held_out = make_synthetic(args.samples // 10, args.rows, args.seed + 1)
    options = {"collate_fn": as_is, "model": model, "optimizer": optimizer, "shared_memory": False}
    options |= {"num_workers": args.workers, "staleness": args.staleness}
    loader = adaloader.AdaLoader(data, 128, shuffle=True, **options)
    validation = adaloader.AdaLoader(held_out, 256, **options)
    loader.checkpoint(folder, every_steps=args.every_steps, asynchronous=not args.synchronous, signals=False)
    started, samples, epoch = time.monotonic(), [], 0
    while True:
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses = [loss_of(model, batch).item() for batch in validation]
        epoch += 1
        elapsed = time.monotonic() - started
        now = np.array([*resources(), elapsed])
        everyones = np.empty((comm.size, len(now)))
        comm.Allgather(now, everyones)
        if everyones[0, -1] >= args.every_seconds * (len(samples) + 1):
            samples.append(everyones[:, :-1])
            if comm.rank == 0:
                stats = loader.stats()
                print(
                    f"{elapsed / 60:6.1f} min, epoch {epoch}, step {stats['steps']}, loss {np.mean(losses):.4f}, "
                    f"{stats['saves']['begun']} saves, {stats['relocations']} relocations: "
                    + ", ".join(
                        f"{name} {values.round(1).tolist()}" for name, values in zip(WHAT, samples[-1].T, strict=True)
                    ),
                    flush=True,
                )
        if everyones[0, -1] >= args.minutes * 60:
            break
    validation.close()
    loader.close()
    return samples


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["dense"], batch["sparse"])
    return nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])


def grown(samples: list[np.ndarray]) -> list[str]:
    """Say of all that has grown what, on which rank, and from what to what."""
    fifth = len(samples) // 5
    before, after = (np.median(part, axis=0) for part in (samples[fifth : 2 * fifth], samples[-fifth:]))
    found = []
    for at, (name, most) in enumerate(zip(WHAT, MOST_GROWTH, strict=True)):
        for rank, (was, now) in enumerate(zip(before[:, at], after[:, at], strict=True)):
            if now - was > (most * was + 1 if most < 1 else most):
                found.append(f"{name} of rank {rank}: {was:g} to {now:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-seconds", type=float, default=30.0, help="between samples (%(default)s)")
    parser.add_argument("--every-steps", type=int, default=25, help="between checkpoints (%(default)s)")
    parser.add_argument("--synchronous", action="store_true", help="save synchronously")
    parser.add_argument("--staleness", type=lambda text: None if text == "none" else int(text), default=0)
    parser.add_argument("--workers", type=int, default=0, help="worker processes that read data (%(default)s)")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=12_800, help="of a pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD.Dup()
    with tempfile.TemporaryDirectory(prefix="adaloader-soak-") as folder:
        shared = Path(comm.bcast(folder))
        samples = train(args, comm, shared)
        comm.Barrier()  # its folder goes with rank 0
    if len(samples) < 10:
        parser.error(f"only {len(samples)} samples were taken: --minutes or --every-seconds must leave room for 10")
    found = grown(samples)
    if comm.rank == 0:
        print("nothing has grown" if not found else "grown: " + "; ".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
