"""What a loader's `stats()` says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from adaloader.model.managed_model import ManagedModel


def stats(managed: ManagedModel) -> dict[str, Any]:
    """Return counts since the model's first loader was built, on this rank.

    steps: optimizer steps. lookups: unique rows looked up, over all lookups. intent_coverage: share that was
    intended, of those for batches (1.0 before the first; inference between steps does not count). on_demand: all
    that were not intended. wait_seconds: time that the trainer's thread waited for rows, in `next`, lookups and
    `step`. bytes_sent, bytes_received: of rows, gradients, intents. bytes_by_kind: those sent, by kind of message;
    bytes_to_other_machines: those sent to ranks that this one shares no memory with.
    replica_steps: copies of rows that were sent again because they had changed. hops: rows asked of a rank that did
    not have them, which passed that on. late_intents: rows asked for when they might already have been needed.
    machine_ranks: ranks that share memory, this one included. neighbour_rows: rows read from the others' memory.
    memory_bytes: of rows held, with state and index. saves: checkpoints begun, and the bytes (over all ranks) and
    seconds of those that have been waited for, and for how long of that training stood still. tables: the same
    counts of lookups by table, and relocations, rows that this rank gave to another, and replications, rows that it
    copied to another for a batch. device_cache: of each table whose rows are kept on a device, how many there is
    room for (rows, bytes), were looked_up, fetched, late (not there when looked up: miss_rate), evicted,
    written_back. seconds: where time went, on whatever thread.
    """
    manager = managed.manager
    traffic = manager.counted()
    counts = {table.name: table.counts for table in managed.tables}
    numbers = {table.name: table.table.number for table in managed.tables}
    of_batches = sum(c.of_batches for c in counts.values())
    intended = sum(c.intended for c in counts.values())
    return {
        "steps": managed.optimizer_steps,
        "lookups": sum(c.rows for c in counts.values()),
        "intent_coverage": intended / of_batches if of_batches else 1.0,
        "on_demand": sum(c.on_demand for c in counts.values()),
        "wait_seconds": traffic.wait_seconds,
        "bytes_sent": manager.bytes_sent,
        "bytes_received": manager.bytes_received,
        "bytes_by_kind": manager.bytes_by_kind,
        "bytes_to_other_machines": manager.bytes_to_other_machines,
        "relocations": sum(traffic.relocations.values()),
        "replications": sum(traffic.replications.values()),
        "replica_steps": sum(traffic.replica_steps.values()),
        "hops": traffic.hops,
        "late_intents": traffic.late_intents,
        "machine_ranks": manager.machine_ranks,
        "neighbour_rows": traffic.neighbour_rows,
        "memory_bytes": manager.memory_bytes,
        "saves": {"begun": 0} if managed.saves is None else asdict(managed.saves),
        "tables": {
            name: {
                "lookups": c.rows,
                "intended": c.intended,
                "on_demand": c.on_demand,
                "relocations": traffic.relocations[numbers[name]],
                "replications": traffic.replications[numbers[name]],
            }
            for name, c in counts.items()
        },
        "device_cache": manager.cache_stats(),
        "seconds": dict(traffic.seconds),
    }
