"""How much longer a script takes to its first step with AdaLoader than with plain PyTorch, each in a new process.

    python benchmarks/startup.py                 the first run, whose kernels are compiled, and later ones
    python benchmarks/startup.py --repeats 9

A script imports, builds a model with one table, takes one step and ends. Sides come in turns; shown are medians, in
seconds, of wall time and of the processor time of all threads. Numba's cache is a new folder, so that the first run of
AdaLoader is what a user's first is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PLAIN = """
import torch
model = torch.nn.Embedding(100_000, 16, sparse=True)
optimizer = torch.optim.{optimizer}(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.arange(64_000) % 100_000, 1024)
for ids in loader:
    model(ids).square().mean().backward()
    optimizer.step()
    break
"""
MANAGED = PLAIN.replace("import torch\n", "import torch\nfrom adaloader import AdaLoader\n").replace(
    "torch.utils.data.DataLoader(torch.arange(64_000) % 100_000, 1024)",
    "AdaLoader(torch.arange(64_000) % 100_000, 1024, model=model, optimizer=optimizer)",
)


def run(script: str, cache: str) -> tuple[float, float]:
    """Return (wall seconds, processor seconds) of a Python that runs `script`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": path}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write JSON where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side after the first (%(default)s)")
    parser.add_argument("--optimizer", choices=["SGD", "Adagrad"], default="Adagrad")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1 is needed")
    plain, managed = (script.format(optimizer=args.optimizer) for script in (PLAIN, MANAGED))
    with tempfile.TemporaryDirectory(prefix="adaloader-startup-") as cache:
        run(plain, cache)  # brings PyTorch from the disk, for both
        first = run(managed, cache)
        rows = [(*run(plain, cache), *run(managed, cache)) for _ in tqdm(range(args.repeats), desc="runs")]
    medians = np.median(np.array(rows), axis=0).tolist()
    seconds = {"plain": medians[:2], "AdaLoader, first run": list(first), "AdaLoader, later runs": medians[2:]}
    print(f"{'seconds':<24}{'wall':>8}{'CPU':>8}{'more than plain':>18}")
    for name, (wall, cpu) in seconds.items():
        more = "" if name == "plain" else f"{wall - medians[0]:>+10.2f}{cpu - medians[1]:>+8.2f}"
        print(f"{name:<24}{wall:>8.2f}{cpu:>8.2f}{more}")
    figures = {"arguments": vars(args), "seconds": seconds, "later_over_plain": medians[2] - medians[0]}
    text = json.dumps(figures)
    print(text, flush=True)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
