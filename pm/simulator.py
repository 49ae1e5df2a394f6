"""The command line of `simulation.py`: runs the asynchronous protocol on virtual ranks, and looks whether it keeps its
promises.

    python -m pm.simulator --seeds 0:5000              many random schedules; prints the seeds that break a promise
    python -m pm.simulator --seeds 0:5000 --techniques replication --staleness 1
    python -m pm.simulator --seeds 0:1000 --common-keys --staleness 1
    python -m pm.simulator --seed 17 --trace           one of them again, with every message
    python -m pm.simulator --replay lookups.npz        a recording (`simulated.schedules.Recording`), with bytes by kind
    python -m pm.simulator --replay moves-*.jsonl      what the ranks of a run intended: the files of its `record=`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict

from pm.decision import TECHNIQUES
from pm.simulated.ledger import Violation
from pm.simulated.schedules import Recording
from pm.simulated.simulated_network import Setting
from pm.simulated.simulation import Simulation, run_seed, setting_of


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pm.simulator", description="Simulates the asynchronous protocol.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", metavar="FIRST:END", help="run these seeds")
    what.add_argument("--seed", type=int, help="run this seed")
    what.add_argument("--replay", metavar="FILE", nargs="+", help="a recording (.npz), or the files that ranks wrote")
    parser.add_argument("--trace", action="store_true", help="print every message and event (with --seed)")
    parser.add_argument("--techniques", choices=TECHNIQUES)
    parser.add_argument("--staleness", type=lambda text: None if text == "None" else int(text), default=...)
    parser.add_argument("--cache-keys", type=int)
    parser.add_argument("--common-keys", action="store_true", help="all ranks use the same few keys at every clock")
    parser.add_argument("--width", type=int, default=32, help="words of a record (with --replay)")
    parser.add_argument("--lookahead", type=int, default=10, help="clocks (with --replay)")
    args = parser.parse_args(arguments)
    if args.seeds is not None:
        try:
            args.first, args.end = map(int, args.seeds.split(":"))
        except ValueError:
            parser.error(f"--seeds takes FIRST:END, such as 0:1000; got {args.seeds!r}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return 1 where a promise is broken."""
    args = _parse(arguments)
    fixed = {name: getattr(args, name) for name in ("techniques", "cache_keys") if getattr(args, name) is not None}
    if args.staleness is not ...:
        fixed["staleness"] = args.staleness
    if args.replay is not None:
        return _replay(args, fixed)
    seeds = range(args.first, args.end) if args.seeds is not None else [args.seed]
    fixed["common_keys"] = args.common_keys
    failed, counts = 0, Counter()
    for seed in seeds:
        try:
            counts += run_seed(seed, trace=print if args.trace else None, **fixed).counts
        except Exception as error:  # whatever goes wrong is a finding, to be shown with what makes it again
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
            print(f"  {json.dumps(asdict(setting_of(seed, **fixed)[0]))}", flush=True)
            if len(seeds) == 1 and not isinstance(error, Violation):
                raise
    print(f"{len(seeds)} schedules, {failed} failed; {dict(counts)}")
    return int(failed > 0)


def _replay(args: argparse.Namespace, fixed: dict[str, object]) -> int:
    is_saved = len(args.replay) == 1 and args.replay[0].endswith(".npz")
    recording = Recording.load(args.replay[0]) if is_saved else Recording.of_records(args.replay)
    setting = Setting(
        ranks=int(recording.ranks.max(initial=0)) + 1,
        capacities=(int(recording.keys.max(initial=0)) + 1,),
        widths=(args.width,),
        dtypes=("float32",),
        most_turns=sys.maxsize,
        **fixed,
    )
    simulation = Simulation(setting, recording.schedule(args.lookahead), checks=False).run()
    bytes_by_kind = dict(simulation.bytes_by_kind.most_common())
    print(json.dumps({"counts": simulation.counts, "bytes": int(simulation.network.bytes_sent.sum()), **bytes_by_kind}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
