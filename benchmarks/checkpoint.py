"""Time of a checkpoint against the disk's plain write speed, measured beside it.

    python benchmarks/checkpoint.py [--rows N] [--dim D] [--folder DIR]

One process, a table with Adagrad's state. Prints seconds, the ratio of each to writing and syncing as many bytes, and
for how long training stood still while a checkpoint was written in the background, as a share of a synchronous save.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader

_CHUNK_BYTES = 4 << 20


def plain_write_seconds(path: Path, size: int) -> float:
    """Return the time of writing so many bytes to a new file and having them on the disk."""
    chunk = np.random.default_rng(0).bytes(_CHUNK_BYTES)
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, _CHUNK_BYTES):
            file.write(chunk[: min(_CHUNK_BYTES, size - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def stall_of_asynchronous(path: Path, loader: AdaLoader, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Train while a checkpoint is written; return the seconds for which training stood still."""
    saving = adaloader.save(path, loader, asynchronous=True)
    batches = iter(loader)
    while not saving.done:
        ids = next(batches, None)
        if ids is None:
            batches = iter(loader)
            continue
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return saving.wait().stall_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    model = nn.Embedding(args.rows, args.dim)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = AdaLoader(torch.arange(1000), batch_size=10, model=model, optimizer=optimizer)
    for number, ids in enumerate(loader):
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 3:
            break
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        for _ in range(args.repeat):
            saved = adaloader.save(folder / "saved", loader)
            plain = plain_write_seconds(folder / "plain", saved.bytes)
            stall = stall_of_asynchronous(folder / "saved", loader, model, optimizer)
            started = time.perf_counter()
            adaloader.load(folder / "saved", loader)
            loaded = time.perf_counter() - started
            print(
                f"{saved.bytes / 1e6:,.0f} MB: plain write {plain:.3f} s; save {saved.seconds:.3f} s "
                f"({plain / saved.seconds:.0%} of its speed); load {loaded:.3f} s ({plain / loaded:.0%}); "
                f"asynchronous save: training stood still for {stall:.3f} s "
                f"({stall / saved.seconds:.0%} of the synchronous one)"
            )
    finally:
        shutil.rmtree(folder)
        loader.close()


if __name__ == "__main__":
    main()
