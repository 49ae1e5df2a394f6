"""What deriving keys costs on the click-through example: the share of a step, by thread.

    python benchmarks/derivation.py             Wide & Deep, 1 rank, batches of 1024

A step is that of `examples/ctr.py`: fetch a batch, forward, backward, `optimizer.step()`, `zero_grad()`. Timed apart,
by wrapping the functions that do it: on the planner's thread replaying what was learned (`derive`, processor time of
that thread) and all that it does (`plan`: with copying ids, finding unique rows and announcing them); on the trainer's
thread comparing what each lookup uses with what was intended (`check`), waiting for a batch's keys (`wait`), and the
watched step beyond a later one (`watch`, once). Warm-up steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adaloader import AdaLoader
from adaloader.lookups.batch_rows import BatchRows
from adaloader.planning import planner
from adaloader.reading.iteration import Iteration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from ctr_data import make_synthetic
from ctr_models import MODELS
from runs import as_is


class Timers:
    """Seconds by name, of functions that are wrapped while the benchmark runs."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: type, function: str, name: str, clock) -> None:
        """Have calls of `owner.function` counted under `name`."""
        inner = getattr(owner, function)

        def timed(*args, **kwargs):
            started = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += clock() - started

        setattr(owner, function, timed)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Train, print the table and the JSON, and return the figures."""
    args = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    timers = Timers()
    timers.wrap(planner.Planner, "_derive", "derive", time.thread_time)
    timers.wrap(planner.Planner, "_tables_of", "plan", time.thread_time)
    timers.wrap(BatchRows, "place_of", "check", time.perf_counter)
    timers.wrap(Iteration, "_wait_for_keys", "wait", time.perf_counter)
    clicks = make_synthetic((args.warmup + args.steps) * args.batch, args.rows, args.seed)
    model = MODELS[args.model](args.rows, args.dim)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    loader = AdaLoader(clicks, args.batch, collate_fn=as_is, model=model, optimizer=optimizer, min_rows=1)
    step_seconds, first_seconds = train(model, optimizer, loader, args.warmup, timers)
    figures = collect(args, step_seconds, first_seconds, timers, loader)
    report(figures)
    loader.close()
    return figures


def train(model, optimizer, loader, warmup: int, timers: Timers) -> tuple[list[float], float]:
    """Return the seconds of each counted step, and those of the watched one."""
    loss_fn = nn.BCEWithLogitsLoss()
    steps: list[float] = []
    started = time.perf_counter()
    cpu_started = 0.0
    for number, batch in enumerate(loader):
        loss = loss_fn(model(batch["dense"], batch["sparse"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ended = time.perf_counter()
        steps.append(ended - started)
        started = ended
        if number + 1 == warmup:
            timers.seconds.clear()
            cpu_started = time.process_time()
    timers.seconds["cpu"] = time.process_time() - cpu_started
    return steps[warmup:], steps[0]


def collect(args, step_seconds: list[float], first_seconds: float, timers: Timers, loader) -> dict[str, object]:
    count, per_step = len(step_seconds), float(np.mean(step_seconds))
    milliseconds = {name: 1e3 * timers.seconds[name] / count for name in ("derive", "plan", "check", "wait", "cpu")}
    return {
        "arguments": vars(args),
        "step_milliseconds": 1e3 * per_step,
        "watched_step_milliseconds": 1e3 * first_seconds,
        "milliseconds": milliseconds,
        "share_of_step": {name: milliseconds[name] / (1e3 * per_step) for name in milliseconds},
        "share_of_cpu": {name: milliseconds[name] / milliseconds["cpu"] for name in ("derive", "plan", "check")},
        "intent_coverage": loader.stats()["intent_coverage"],
    }


def report(figures: dict) -> None:
    arguments = figures["arguments"]
    print(f"{arguments['model']}, {arguments['batch']} samples a batch, {arguments['steps']} steps, 1 rank")
    print(f"{'':<10}{'thread':<12}{'ms a step':>10}{'of step':>10}{'of CPU':>10}")
    threads = {"derive": "planner", "plan": "planner", "check": "trainer", "wait": "trainer"}
    for name, thread in threads.items():
        of_cpu = f"{figures['share_of_cpu'][name]:>10.2%}" if name in figures["share_of_cpu"] else ""
        share = figures["share_of_step"][name]
        print(f"{name:<10}{thread:<12}{figures['milliseconds'][name]:>10.3f}{share:>10.2%}{of_cpu}")
    watched = figures["watched_step_milliseconds"]
    print(f"a step takes {figures['step_milliseconds']:.2f} ms, the watched one {watched:.2f} ms")
    print(json.dumps(figures))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="wdl")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table")
    parser.add_argument("--dim", type=int, default=16, help="elements of a row")
    parser.add_argument("--batch", type=int, default=1024, help="samples a batch")
    parser.add_argument("--steps", type=int, default=100, help="steps that are counted")
    parser.add_argument("--warmup", type=int, default=20, help="steps before them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
