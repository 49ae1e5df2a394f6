"""A click-through run with frequent checkpoints, for `killed_jobs.py`: `ctr_job.py FOLDER OUT --steps N ...`.

It goes on from the newest checkpoint in FOLDER. Each rank counts its steps in a file of FOLDER's parent, which whoever
kills it can read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import adaloader
from adaloader.checkpoint.layout import complete_in

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from ctr_data import make_synthetic  # noqa: E402
from ctr_models import WideAndDeep  # noqa: E402
from runs import as_is  # noqa: E402

ROWS, DIM, SAMPLES, GLOBAL_BATCH = 20_000, 8, 4_000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every-steps", type=int, default=4)
    parser.add_argument("--optimizer", choices=["Adagrad", "Adam"], default="Adagrad")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = WideAndDeep(ROWS, DIM, dropout=0.1)
    optimizer = getattr(torch.optim, args.optimizer)(model.parameters(), lr=0.01)
    from mpi4py import MPI

    ranks, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
    data = make_synthetic(SAMPLES, ROWS, args.seed)
    options = {"shuffle": True, "collate_fn": as_is, "model": model, "optimizer": optimizer}
    loader = adaloader.AdaLoader(data, GLOBAL_BATCH // ranks, **options)
    if complete_in(args.folder):
        restored = adaloader.load(args.folder, loader)
        print(f"rank {rank} resumed at step {restored.steps}", flush=True)
    loader.checkpoint(args.folder, every_steps=args.every_steps, asynchronous=args.asynchronous, signals=False)
    train(args, model, optimizer, loader, args.folder.parent / f"steps-{rank}")
    state = adaloader.full_state_dict(model)
    if rank == 0:
        torch.save(state, args.out)
    loader.close()


def train(args: argparse.Namespace, model: nn.Module, optimizer, loader, counted: Path) -> None:
    """Train until `--steps` optimizer steps were taken since the very beginning."""
    taken = loader.stats()["steps"]
    while True:
        for batch in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(batch["dense"], batch["sparse"]), batch["label"]
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            counted.write_text(str(taken))
            if taken >= args.steps:
                return


if __name__ == "__main__":
    main()
