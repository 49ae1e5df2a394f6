"""Bytes that cross the network per training step, counted, for each way of managing rows, on four workloads.

    python benchmarks/traffic.py                                  simulated ranks: 2, 4, 8, 16, at staleness None
    python benchmarks/traffic.py --staleness 0                    the same, exact (needs mpi4py)
    python benchmarks/traffic.py --ranks 64 --samples 64          many ranks, smaller batches
    mpirun -n 2 python benchmarks/traffic.py --mpi                real ranks, over `pm.ParameterManager`
    mpirun -n 2 python benchmarks/traffic.py --mpi --staleness 0  real ranks, over a loader that is exact

The simulated ranks run the protocols' own code (`pm.simulated.simulation`, and `pm.lockstep_simulator` at staleness 0)
and pack every message as it would travel, so all bytes are counted: intents, locations, acknowledgements, records,
changes, headers. `none` keeps each row at its home rank and fetches and pushes on demand; `full` is computed: every
rank holds every row, and sends the changes of the rows of each batch (id and record) to every other rank. A step is one
batch on every rank; bytes are those that all ranks send.

With `--staleness 0` they are those of an `AdaLoader` that is exact: a step then sends gradients and new values, not
changes of records; `full` sends every rank the gradients of all others. There `--machine-ranks 2` has each two
simulated ranks on one machine, and counts what crosses between machines (kinds of message are those of all ranks).

Counted are `--steps` steps. With `--warmup` that many others go before, and as many as the lookahead come after, so
that at the beginning and at the end of what is counted the same has been done ahead; without, a run is counted whole.

The workloads (`workloads.py`) have a batch of `--samples` per rank, and intents `--lookahead` steps ahead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from workloads import WORKLOADS

from pm.asynchronous.node import CLOCKS_PER_MOVE_OF_LOADERS, CLOCKS_PER_REFRESH_OF_LOADERS, ROUNDS_TO_ANSWER_OF_LOADERS
from pm.simulated.schedules import Recording
from pm.simulated.simulated_network import Setting
from pm.simulated.simulation import Simulation

TECHNIQUES = ("all", "relocation", "replication", "none")
ID_BYTES = 4
VALUE_BYTES = 4


def record(name: str, args: argparse.Namespace, ranks: int) -> Recording:
    """Return what `ranks` ranks look up in a workload."""
    entries = []
    for rank in range(ranks):
        rng = np.random.default_rng([args.seed, rank])
        for clock in range(args.all_steps):
            entries.append((rank, clock, WORKLOADS[name](rng, args.rows, args.samples, rank, ranks)))
    return Recording.of(entries)


def full_replication(recording: Recording, args: argparse.Namespace, ranks: int) -> float:
    """Return the bytes per step that all ranks send where every rank holds every row."""
    words = args.width // 2 if args.staleness == "0" else args.width  # gradients, or changes of whole records
    counted = (recording.clocks >= args.warmup) & (recording.clocks < args.warmup + args.steps)
    rows = int(np.diff(recording.offsets)[counted].sum())
    return rows * (ID_BYTES + VALUE_BYTES * words) * (ranks - 1) / args.steps


def simulate(recording: Recording, args: argparse.Namespace, ranks: int, techniques: str) -> dict[str, object]:
    """Return the bytes per counted step, in all and by kind, and what else was counted."""
    setting = Setting(
        ranks=ranks,
        capacities=(args.rows,),
        widths=(args.width,),
        dtypes=("float32",),
        techniques=techniques,
        acts_late=not args.act_at_once,
        seed=args.seed,
        delay_seconds=0.05,
        round_seconds=1.0 / args.rounds_per_step,
        think_seconds=0.25,
        rounds_when_needed=True,
        clocks_per_move=args.clocks_per_move or None,
        clocks_per_refresh=args.clocks_per_refresh or None,
        rounds_to_answer=None if args.answer_at_once else ROUNDS_TO_ANSWER_OF_LOADERS,
        most_turns=sys.maxsize,
    )
    simulation = Simulation(setting, recording.schedule(args.lookahead), checks=False)
    simulation.run_to_clock(args.warmup)
    before, before_kinds = simulation.network.bytes_sent.sum(), simulation.bytes_by_kind
    before_counts = simulation.counts
    if args.warmup:
        simulation.run_to_clock(args.warmup + args.steps)
    else:
        simulation.settle()
    return figures(
        int(simulation.network.bytes_sent.sum() - before),
        simulation.bytes_by_kind - before_kinds,
        simulation.counts - before_counts,
        args.steps,
    )


def simulate_exactly(recording: Recording, args: argparse.Namespace, ranks: int, techniques: str) -> dict[str, object]:
    """The same at staleness 0."""
    from pm.lockstep_simulator import LockstepSimulation

    simulation = LockstepSimulation(
        recording,
        ranks,
        args.rows,
        args.width // 2,
        techniques=techniques,
        lookahead=args.lookahead,
        seed=args.seed,
        machine_ranks=args.machine_ranks,
    )
    simulation.run_to(args.warmup)
    before, before_kinds, before_counts = simulation.bytes_between_machines, simulation.bytes_by_kind, simulation.counts
    simulation.run_to(args.warmup + args.steps)
    return figures(
        simulation.bytes_between_machines - before,
        simulation.bytes_by_kind - before_kinds,
        simulation.counts - before_counts,
        args.steps,
    )


def over_mpi(recording: Recording, args: argparse.Namespace, comm, techniques: str) -> dict[str, object]:
    """Collective: the same as `simulate`, on real ranks."""
    from pm import ParameterManager

    mine = {clock: keys for rank, clock, keys in recording if rank == comm.rank}
    manager = ParameterManager(
        args.rows,
        args.width,
        comm=comm,
        techniques=techniques,
        act_late=not args.act_at_once,
        max_rounds_per_second=args.rounds_per_step / args.step_seconds,
    )
    before = after = None
    for clock in range(-args.lookahead, args.all_steps):
        ahead = clock + args.lookahead
        if ahead < args.all_steps and ahead in mine:
            manager.intent(mine[ahead], ahead)
        if clock < 0:
            continue
        if clock == args.warmup > 0:
            manager.barrier()
            before = _counted(manager.stats())
        if clock == args.warmup + args.steps:
            manager.barrier()
            after = _counted(manager.stats())
        keys = mine[clock]
        out = np.empty((len(keys), args.width), np.float32)
        manager.wait(manager.pull(keys, out))
        _pause(args.step_seconds)
        manager.push(keys, np.ones_like(out))
        manager.advance_clock()
    manager.wait_all()
    manager.barrier()
    counted = after or _counted(manager.stats())
    counted.subtract(before or {})
    manager.close()
    return _together(counted, comm, args.steps)


def _together(counted: Counter, comm, steps: int) -> dict[str, object]:
    """Collective: return the figures of all ranks' counts."""
    everywhere = sum((Counter(part) for part in comm.allgather(dict(counted))), Counter())
    kinds = Counter({name[6:]: n for name, n in everywhere.items() if name.startswith("bytes ")})
    counts = Counter({name: n for name, n in everywhere.items() if not name.startswith("bytes ")})
    return figures(counts.pop("bytes_sent"), kinds, counts, steps)


def exactly(recording: Recording, args: argparse.Namespace, comm, techniques: str) -> dict[str, object]:
    """Collective: the same at staleness 0, with Adagrad, each rank as if on a machine of its own."""
    import torch

    from adaloader import AdaLoader

    torch.manual_seed(args.seed)
    mine = [torch.from_numpy(np.unique(keys)) for rank, _, keys in recording if rank == comm.rank]
    model = torch.nn.Embedding(args.rows, args.width // 2)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    options = {"lookahead": args.lookahead, "techniques": techniques, "min_rows": 1, "shared_memory": False}
    loader = AdaLoader.wrap(mine, model=model, optimizer=optimizer, **options)
    before = after = None
    for step, ids in enumerate(loader):
        if step == args.warmup > 0:
            before = _counted(loader.stats())
        if step == args.warmup + args.steps:
            after = _counted(loader.stats())
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()
        _pause(args.step_seconds)
    comm.Barrier()
    counted = after or _counted(loader.stats())
    counted.subtract(before or {})
    loader.close()
    return _together(counted, comm, args.steps)


def _pause(seconds: float) -> None:
    import time

    time.sleep(seconds)


def _counted(stats: dict[str, object]) -> Counter:
    names = ("bytes_sent", "relocations", "replications", "replica_steps", "hops", "remote_pulls", "late_intents")
    counted = Counter({name: stats[name] for name in names if name in stats})
    counted.update({f"bytes {kind}": n for kind, n in stats["bytes_by_kind"].items()})
    return counted


def figures(sent: int, kinds: Counter, counts: Counter, steps: int) -> dict[str, object]:
    """Return what is reported of one run."""
    return {
        "bytes_per_step": sent / steps,
        "bytes_per_step_by_kind": {kind: n / steps for kind, n in kinds.most_common()},
        "counts": dict(counts),
    }


def compare(name: str, args: argparse.Namespace, ranks: int, comm=None) -> dict[str, object]:
    """Collective with `comm`: return the figures of one workload for each way, and of `all` against the best other."""
    recording = record(name, args, ranks)
    of_each = {}
    for techniques in args.techniques:
        if comm is None:
            count = simulate_exactly if args.staleness == "0" else simulate
            of_each[techniques] = count(recording, args, ranks, techniques)
        else:
            count = exactly if args.staleness == "0" else over_mpi
            of_each[techniques] = count(recording, args, comm, techniques)
    of_each["full"] = {"bytes_per_step": full_replication(recording, args, ranks)}
    others = {way: run["bytes_per_step"] for way, run in of_each.items() if way != "all"}
    best = min(others, key=others.get)
    result = {"workload": name, "ranks": ranks, "best_other": best, "ways": of_each}
    if "all" in of_each:
        result["ratio_to_best"] = of_each["all"]["bytes_per_step"] / others[best]
    return result


def report(result: dict[str, object]) -> None:
    """Print one line."""
    ways = "  ".join(f"{way} {run['bytes_per_step'] / 1e3:,.1f}" for way, run in result["ways"].items())
    ratio = f"all is {result['ratio_to_best']:.3f} of {result['best_other']}" if "ratio_to_best" in result else ""
    print(f"{result['workload']:<10} {result['ranks']:>3} ranks  kB a step: {ways}  {ratio}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = parse(arguments)
    comm = None
    if args.mpi:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    results = []
    for ranks in [comm.size] if comm else args.ranks:
        for name in args.workloads:
            results.append(compare(name, args, ranks, comm))
            if comm is None or comm.rank == 0:
                report(results[-1])
    if comm is None or comm.rank == 0:
        text = json.dumps({"arguments": vars(args), "results": results})
        if args.json:
            Path(args.json).write_text(text + "\n")
        else:
            print(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Bytes per step of each way of managing rows.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--mpi", action="store_true", help="real ranks, under mpirun")
    parser.add_argument("--staleness", choices=["none", "0"], default="none", help="0: exact (%(default)s)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=32, help="words of a record: 16 values and Adagrad's 16 sums")
    parser.add_argument("--samples", type=int, default=256, help="a rank and step")
    parser.add_argument("--steps", type=int, default=60, help="that are counted (%(default)s)")
    parser.add_argument("--warmup", type=int, default=0, help="steps before these (%(default)s)")
    parser.add_argument("--lookahead", type=int, default=10, help="steps")
    parser.add_argument(
        "--machine-ranks", type=int, default=1, help="with --staleness 0: ranks of a machine; bytes between machines"
    )
    parser.add_argument("--rounds-per-step", type=float, default=1.0)
    parser.add_argument("--step-seconds", type=float, default=0.02, help="of computing, with --mpi")
    parser.add_argument("--act-at-once", action="store_true", help="act on intents without timing, for comparison")
    parser.add_argument(
        "--clocks-per-move",
        type=int,
        default=CLOCKS_PER_MOVE_OF_LOADERS,
        help="simulated, with staleness: how often a row may move (as in loaders; 0: whenever AdaPM would move it)",
    )
    parser.add_argument(
        "--clocks-per-refresh",
        type=int,
        default=CLOCKS_PER_REFRESH_OF_LOADERS,
        help="simulated, with staleness: how often copies are brought up to date that their holders do not change (as "
        "in loaders; 0: in each exchange, as in AdaPM)",
    )
    parser.add_argument(
        "--answer-at-once",
        action="store_true",
        help="simulated, with staleness: copies as soon as they are asked for, as in AdaPM",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures; printed without")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.warmup < 0:
        parser.error(f"--steps must be 1 or more, --warmup 0 or more; got --steps {args.steps} --warmup {args.warmup}")
    if args.machine_ranks != 1 and (args.mpi or args.staleness != "0"):
        parser.error("--machine-ranks is for simulated ranks at staleness 0; add --staleness 0, and leave out --mpi")
    args.all_steps = args.steps + (args.warmup + args.lookahead if args.warmup else 0)
    return args


if __name__ == "__main__":
    main()
