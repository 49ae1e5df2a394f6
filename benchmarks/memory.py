"""How much memory a table takes whose rows have all been looked up and updated: bytes a row, beside the record's own.

    python benchmarks/memory.py                    33,762,588 rows of 16 floats under Adagrad, as many as Criteo has
    python benchmarks/memory.py --rows 1000000

One process looks each row up once, in an order that jumps through the table, and takes a step with each batch. Measured
is what the kernel says of the process's resident memory, after a first step and after the last: records, index, and
whatever else grew. The peak is the kernel's too: an index that grows is there twice for a moment.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from adaloader import AdaLoader, deferred_init

IDS_IN_SAMPLE = 4096


class EveryRow(torch.utils.data.Dataset):
    """Samples of `IDS_IN_SAMPLE` ids, in which each row of a table comes once, far from those before it."""

    def __init__(self, rows: int):
        self.rows = rows
        self.step = next(step for step in range(int(rows * 0.618), 2 * rows + 2) if math.gcd(step, rows) == 1)

    def __len__(self):
        return -(-self.rows // IDS_IN_SAMPLE)

    def __getitem__(self, number):
        places = torch.arange(number * IDS_IN_SAMPLE, (number + 1) * IDS_IN_SAMPLE).clamp_(max=self.rows - 1)
        return places * self.step % self.rows


def resident_bytes(field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (the most so far) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=33_762_588, help="rows of the table (%(default)s)")
    parser.add_argument("--dim", type=int, default=16, help="floats in a row (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help=f"samples of {IDS_IN_SAMPLE} ids (%(default)s)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with deferred_init():
        table = torch.nn.Embedding(args.rows, args.dim, sparse=True)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    started, before = time.perf_counter(), None
    loader = AdaLoader(EveryRow(args.rows), args.batch, model=table, optimizer=optimizer)
    for ids in loader:
        table(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = before or resident_bytes("VmRSS")
    after, peak = resident_bytes("VmRSS"), resident_bytes("VmHWM")
    record_bytes = 2 * 4 * args.dim + 8  # value, sum of squares, last step
    fresh_rows = args.rows - min(args.rows, args.batch * IDS_IN_SAMPLE)
    figures = {
        "arguments": vars(args),
        "record_bytes": record_bytes,
        "bytes_per_row": (after - before) / max(fresh_rows, 1),
        "peak_bytes_per_row": (peak - before) / max(fresh_rows, 1),
        "counted_bytes_per_row": loader.stats()["memory_bytes"] / args.rows,
        "seconds": time.perf_counter() - started,
    }
    text = json.dumps(figures)
    print(
        f"{args.rows:,} rows x {args.dim}: {figures['bytes_per_row']:.1f} bytes a row, of which {record_bytes} are the "
        f"record ({figures['counted_bytes_per_row']:.1f} by the manager's own count); at the peak "
        f"{figures['peak_bytes_per_row']:.1f}; {figures['seconds']:.0f} s\n{text}",
        flush=True,
    )
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
