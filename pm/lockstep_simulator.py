"""A deterministic simulator of the exact protocol (staleness 0): real managers, a virtual network, one thread.

Each rank is a `SynchronousManager`, with the code that runs over MPI. What is virtual is who carries its messages, and
who runs what its background thread would: all ranks take turns, and a rank that waits lets the others have theirs.
Buffers between two ranks arrive in order, those over different ranks overtake each other. Everything follows from a
seed: which rank has its turn when, and which buffers it finds. Whatever the seed, values are the same to the bit.

    python -m pm.lockstep_simulator --seeds 0:200           small runs, each against a plain loop; prints what differs
    python -m pm.lockstep_simulator --seed 17 --techniques all

In a program: `LockstepSimulation(recording, ...).run_to(step)`, with the `Recording` (`schedules.py`) of what ranks
look up. `pm.simulator` runs the asynchronous protocol.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping

import numpy as np

from pm import rules
from pm.colocated.machines import Machines
from pm.decision import TECHNIQUES
from pm.exact.synchronous import SynchronousManager
from pm.messages import Kind, Message, message_bytes, pack, unpack
from pm.same_step import Stepped
from pm.simulated.schedules import Recording
from pm.tables import RowPlan, TableGradient, TableSpec
from pm.waiting import PeerError, Waiting

HYPERPARAMETERS = {"lr": 0.1, "lr_decay": 0.0, "eps": 1e-10, "initial_accumulator_value": 0.0, "maximize": False}
_TIMEOUT_SECONDS = 300.0
_STEPPED = Stepped(vector=np.zeros(7))  # as many hyperparameters as travel for Adagrad


class VirtualNetwork:
    """The buffers on their way between virtual ranks, and whose turn it is.

    Args:
        ranks: how many.
        seed: of the order of turns.
        delay_chance: how often a rank does not yet find a buffer that is on its way to it.
    """

    def __init__(self, ranks: int, seed: int = 0, delay_chance: float = 0.0):
        self._rng = np.random.default_rng(seed)
        self._delay_chance = delay_chance
        self._under_way: list[list[deque[np.ndarray]]] = [[deque() for _ in range(ranks)] for _ in range(ranks)]
        self.transports: list[VirtualTransport] = []

    def send(self, source: int, target: int, buffer: np.ndarray) -> None:
        self._under_way[target][source].append(buffer)

    def arrived(self, target: int) -> list[tuple[int, np.ndarray]]:
        """Take what `target` finds now: (source, buffer), in order per source."""
        found = []
        for source, buffers in enumerate(self._under_way[target]):
            while buffers and not self._rng.random() < self._delay_chance:
                found.append((source, buffers.popleft()))
        return found

    @property
    def is_quiet(self) -> bool:
        """Whether no rank has anything to do before somebody asks it to."""
        return not any(map(any, self._under_way)) and not any(transport.has_work for transport in self.transports)

    def take_turns(self) -> None:
        """Let every rank do what its background thread finds to do."""
        for rank in self._rng.permutation(len(self.transports)).tolist():
            self.transports[rank].take_turn()

    def settle(self) -> None:
        """Go on until no rank has anything to do."""
        while not self.is_quiet:
            self.take_turns()


class VirtualTransport:
    """What `pm.transport.Transport` is to a manager, on a virtual network.

    Collective operations do not wait: whoever drives the ranks has all of them come to each before any goes on.
    """

    alive = True

    def __init__(self, network: VirtualNetwork, rank: int, ranks: int, on_message: Callable[[int, Message], None]):
        self._network, self._rank, self._on_message = network, rank, on_message
        self._outbox: list[list[Message]] = [[] for _ in range(ranks)]
        self._posted: deque[Callable[[], None]] = deque()
        self.bytes_sent = self.bytes_received = 0
        self.bytes_to = [0] * ranks
        self.bytes_by_kind: Counter[Kind] = Counter()
        network.transports.append(self)

    def start(self) -> None:
        """Nothing: there is no thread."""

    def wake(self) -> None:
        """Nothing: ranks take turns."""

    def flush(self) -> None:
        """Nothing: what is queued leaves in this rank's turn."""

    def close(self) -> None:
        """Nothing: nobody waits for a rank that ends."""

    def send(self, peer: int, message: Message) -> None:
        self._outbox[peer].append(message)

    def post(self, call: Callable[[], None], *, wake: bool = True) -> None:
        self._posted.append(call)

    def collective(self, start: Callable, timeout_seconds: float | None = None) -> None:
        self._network.settle()

    @property
    def has_work(self) -> bool:
        return bool(self._posted) or any(self._outbox)

    def take_turn(self) -> None:
        """Run what was posted, take in what has come, send what is queued: as the thread does, once."""
        for _ in range(len(self._posted)):  # what these post in turn waits until messages have left
            self._posted.popleft()()
        for source, buffer in self._network.arrived(self._rank):
            self.bytes_received += len(buffer)
            for message in unpack(buffer):
                self._on_message(source, message)
        for peer, messages in enumerate(self._outbox):
            if messages:
                self._outbox[peer] = []
                buffer = pack(messages)
                self.bytes_sent += len(buffer)
                self.bytes_to[peer] += len(buffer)
                for message in messages:
                    self.bytes_by_kind[message.kind] += message_bytes(message)
                self._network.send(self._rank, peer, buffer)


class _Turns(Waiting):
    """Waiting lets the others have their turns."""

    def __init__(self, network: VirtualNetwork, rank: int):
        super().__init__(rank, _TIMEOUT_SECONDS, lambda seconds: None)
        self._network = network

    def until(self, reached, describe, in_vain=lambda: None) -> None:
        while not reached():
            if self._network.is_quiet:
                raise PeerError(f"rank {self.rank} waits for ever for {describe()}")
            self._network.take_turns()


class _Alone:
    """What a manager asks of an MPI communicator before it has a transport: its number, and who is on its machine."""

    def __init__(self, rank: int, ranks: int, network: VirtualNetwork):
        self.rank, self.size, self.network = rank, ranks, network

    def Split_type(self, split_type: int, key: int):
        from mpi4py import MPI

        return MPI.COMM_SELF.Dup()


class VirtualManager(SynchronousManager):
    """A `SynchronousManager` on a virtual network. It shares no memory; `machine_ranks` of them, in turn, are one
    machine, so that what they need alike of another crosses the network once.
    """

    def __init__(self, rank: int, ranks: int, network: VirtualNetwork, techniques: str, machine_ranks: int = 1):
        self._machine_ranks = machine_ranks
        super().__init__(_Alone(rank, ranks, network), _TIMEOUT_SECONDS, techniques, shared_memory=False)
        self._waiting = _Turns(network, rank)

    def _meet_machines(self, comm: _Alone) -> Machines:
        firsts = range(0, comm.size, self._machine_ranks)
        return Machines(comm.rank, [range(comm.size)[first : first + self._machine_ranks] for first in firsts])

    def _connect(self, comm: _Alone, **calls: Callable) -> VirtualTransport:
        return VirtualTransport(comm.network, comm.rank, comm.size, calls["on_message"])


class LockstepSimulation:
    """Ranks that train one table with Adagrad on what a recording says that they look up.

    Args:
        recording: of what each rank looks up in each step (clock); all ranks take all steps.
        ranks: how many.
        rows, dim, dtype: of the table; its rows start as zeros.
        techniques: as of `SynchronousManager`.
        lookahead: how many steps ahead ranks say what they will look up.
        seed, delay_chance: of the network.
        machine_ranks: how many ranks, in turn, are on one machine.
        gradient: called with (rank, step, rows int64 `[n]`, values `[n, dim]`) for a gradient `[n, dim]`; ones if None.
    """

    def __init__(
        self,
        recording: Recording,
        ranks: int,
        rows: int,
        dim: int,
        *,
        dtype: str = "float32",
        techniques: str = "all",
        lookahead: int = 10,
        seed: int = 0,
        delay_chance: float = 0.0,
        machine_ranks: int = 1,
        gradient: Callable[[int, int, np.ndarray, np.ndarray], np.ndarray] | None = None,
    ):
        self.steps = int(recording.clocks.max(initial=-1)) + 1
        self._wanted = [[np.empty(0, np.int64)] * self.steps for _ in range(ranks)]
        for rank, clock, keys in recording:
            self._wanted[rank][clock] = keys
        self._lookahead, self._dtype, self._dim, self._rows = lookahead, dtype, dim, rows
        self._gradient = gradient if gradient is not None else (lambda rank, step, rows, values: np.ones_like(values))
        self.network = VirtualNetwork(ranks, seed, delay_chance)
        self.managers = [VirtualManager(rank, ranks, self.network, techniques, machine_ranks) for rank in range(ranks)]
        spec = TableSpec("table", rows, dim, dtype, rules.Adagrad(), HYPERPARAMETERS, lambda rows, out: out.fill(0))
        self.tables = [manager.add_tables([spec])[0] for manager in self.managers]
        self.network.settle()
        self._plans: list[dict[int, RowPlan]] = [{} for _ in range(ranks)]
        self.step = self._intended = 0

    def run_to(self, step: int) -> LockstepSimulation:
        """Take steps until so many were taken in all.

        Raises:
            PeerError: if a rank would wait for ever.
        """
        while self.step < step:
            self._intend()
            gradients = [self._read(rank) for rank in range(len(self.managers))]
            for rank, gradient in enumerate(gradients):
                manager = self.managers[rank]
                groups: Mapping[int, dict[str, object]] = {0: HYPERPARAMETERS}
                finished = [gradient.plan] if gradient.plan is not None else []
                manager.submit([gradient], groups, finished=finished, stepped=_STEPPED)
            self.step += 1
        self.network.settle()
        return self

    def _intend(self) -> None:
        """Have the ranks say what they look up in the steps ahead: in the first step all of them, then one more."""
        while self._intended < min(self.steps, self.step + self._lookahead + 1):
            for rank, manager in enumerate(self.managers):
                rows = self._wanted[rank][self._intended]
                self._plans[rank][self._intended] = manager.intend(self.tables[rank], rows, self._intended)
                manager.flush_intents()
            self.network.take_turns()
            self._intended += 1
        if self.step == 0:
            self.network.settle()

    def _read(self, rank: int) -> TableGradient:
        """Look up what a rank needs for this step, and return its gradient."""
        manager, table = self.managers[rank], self.tables[rank]
        rows = self._wanted[rank][self.step]
        plan = self._plans[rank].pop(self.step)
        values = manager.read(plan, np.empty((len(rows), self._dim), self._dtype))
        return TableGradient(table, rows, self._gradient(rank, self.step, rows, values), plan=plan)

    def values(self) -> np.ndarray:
        """Return the whole table: `[rows, dim]`; every row has one owner, or none, and is zero then."""
        self.network.settle()
        out = np.zeros((self._rows, self._dim), self._dtype)
        owners = np.zeros(self._rows, np.int64)
        for manager, table in zip(self.managers, self.tables, strict=True):
            rows, slots = manager.owned_slots(table)
            owners[rows] += 1
            out[rows] = table.store.values(slots, np.empty((len(rows), self._dim), self._dtype))
        if owners.max(initial=0) > 1:
            raise RuntimeError(f"row {owners.argmax()} has {owners.max()} owners")
        return out

    @property
    def bytes_sent(self) -> int:
        """Bytes that all ranks have sent."""
        return sum(manager.bytes_sent for manager in self.managers)

    @property
    def bytes_between_machines(self) -> int:
        """Bytes that ranks have sent to ranks of other machines."""
        return sum(manager.bytes_to_other_machines for manager in self.managers)

    @property
    def bytes_by_kind(self) -> Counter[str]:
        """Bytes of messages by kind, without those of the buffers' own headers."""
        return sum((Counter(manager.bytes_by_kind) for manager in self.managers), Counter())

    @property
    def counts(self) -> Counter[str]:
        """What all ranks have counted."""
        counts: Counter[str] = Counter()
        for manager in self.managers:
            traffic = manager.counted()
            for name in ("relocations", "replications", "replica_steps"):
                counts[name] += getattr(traffic, name)[0]
            counts["hops"] += traffic.hops
            counts["late_intents"] += traffic.late_intents
        return counts


def plain_values(recording: Recording, ranks: int, rows: int, dim: int, gradient) -> np.ndarray:
    """Return the table (float64 `[rows, dim]`) that a plain loop over the recording's steps makes, with Adagrad."""
    values, sums = np.zeros((rows, dim)), np.zeros((rows, dim))
    by_step: dict[int, dict[int, np.ndarray]] = {}
    for rank, clock, keys in recording:
        by_step.setdefault(clock, {})[rank] = keys
    for step in sorted(by_step):
        total = np.zeros((rows, dim))
        for rank in sorted(by_step[step]):
            keys = by_step[step][rank]
            total[keys] += gradient(rank, step, keys, values[keys])
        sums += total**2
        values -= HYPERPARAMETERS["lr"] * total / (np.sqrt(sums) + HYPERPARAMETERS["eps"])
    return values


def random_run(seed: int, techniques: str | None = None) -> tuple[LockstepSimulation, np.ndarray]:
    """Return the simulation that a seed stands for, run to its end, and what a plain loop makes of the same."""
    rng = np.random.default_rng(seed)
    ranks, rows, dim = int(rng.integers(2, 7)), int(rng.choice([1, 5, 40])), int(rng.integers(1, 4))
    skew = rng.choice([0.0, 1.0, 2.0])
    shares = np.arange(1, rows + 1) ** -skew
    entries = [
        (rank, clock, rng.choice(rows, int(rng.integers(0, 8)), p=shares / shares.sum()))
        for clock in range(int(rng.integers(1, 12)))
        for rank in range(ranks)
    ]
    recording = Recording.of(entries)
    factors = rng.normal(size=(rows, dim))

    def gradient(rank: int, step: int, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return factors[rows] * (1 + rank + 0.5 * step) + 0.1 * values

    simulation = LockstepSimulation(
        recording,
        ranks,
        rows,
        dim,
        dtype="float64",
        techniques=techniques or str(rng.choice(TECHNIQUES, p=[0.5, 0.2, 0.2, 0.1])),
        lookahead=int(rng.integers(0, 5)),
        seed=seed,
        delay_chance=float(rng.choice([0.0, 0.3, 0.7])),
        machine_ranks=int(rng.choice([1, 2, 3])),
        gradient=gradient,
    )
    return simulation.run_to(simulation.steps), plain_values(recording, ranks, rows, dim, gradient)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return 1 where values are wrong, or a rank would wait for ever."""
    parser = argparse.ArgumentParser(prog="python -m pm.lockstep_simulator", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", metavar="FIRST:END", help="run these seeds")
    what.add_argument("--seed", type=int, help="run this seed")
    parser.add_argument("--techniques", choices=TECHNIQUES)
    args = parser.parse_args(arguments)
    if args.seed is not None:
        seeds = range(args.seed, args.seed + 1)
    else:
        try:
            first, end = map(int, args.seeds.split(":"))
        except ValueError:
            parser.error(f"--seeds takes FIRST:END, such as 0:1000; got {args.seeds!r}")
        seeds = range(first, end)
    failed, counts = 0, Counter()
    for seed in seeds:
        try:
            simulation, expected = random_run(seed, args.techniques)
            np.testing.assert_allclose(simulation.values(), expected, rtol=1e-12, atol=1e-12)
            counts += simulation.counts
        except Exception as error:  # whatever goes wrong is a finding, to be shown with what makes it again
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            if len(seeds) == 1:
                raise
    print(f"{len(seeds)} runs, {failed} failed; {json.dumps(dict(counts))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
