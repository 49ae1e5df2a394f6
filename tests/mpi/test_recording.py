"""`record=` on several ranks: their files agree on who gave what to whom, and can be replayed."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from adaloader import AdaLoader
from pm.recorder import path_of_rank
from pm.simulated.schedules import Recording
from pm.simulator import main
from tests.mpi.meeting import meet

pytestmark = pytest.mark.ranks(2)


def events_of(shared_path, ranks, what):
    """Return, by (rank, other rank), how often each (table, row) did `what`."""
    found = {}
    for rank in range(ranks):
        for line in path_of_rank(shared_path / "moves.jsonl", rank).read_text().splitlines():
            event = json.loads(line)
            if event["what"] == what:
                rows = [(event["group"], key) for key in event["keys"]]
                found.setdefault((rank, event["other"]), Counter()).update(rows)
    return found


def moves_when_all_have_arrived(shared_path, ranks):
    """Return who gave which rows to whom, once every file that says so has its counterpart."""
    deadline = time.monotonic() + 100
    while True:
        here = events_of(shared_path, ranks, "moved here")
        away = events_of(shared_path, ranks, "moved away")
        if away == {(other, rank): rows for (rank, other), rows in here.items()}:
            return away
        assert time.monotonic() < deadline, f"gave {away}, got {here}"
        time.sleep(0.1)


def largest_intended(path, group):
    """Return the largest key of a group that a rank has intended."""
    events = map(json.loads, path.read_text().splitlines())
    return max((max(e["keys"]) for e in events if e["what"] == "intends" and e["group"] == group), default=-1)


@pytest.mark.parametrize("staleness", [0, None])
@pytest.mark.parametrize("techniques", ["all", "relocation"])
def test_ranks_agree_on_what_moved_and_it_replays(comm, seed, shared_path, staleness, techniques, capsys):
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Embedding(60, 3), nn.Embedding(40, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rng = np.random.default_rng([seed, comm.rank])
    steps = 14
    batches = [torch.from_numpy(rng.integers(0, 40, (2, 6))) for _ in range(steps)]
    options = {"min_rows": 1, "shared_memory": False, "techniques": techniques, "staleness": staleness}
    loader = AdaLoader.wrap(
        batches, model=model, optimizer=optimizer, record=shared_path / "moves.jsonl", lookahead=3, **options
    )
    for batch in loader:
        optimizer.zero_grad()
        (model[0](batch[0]).square().sum() + model[1](batch[1]).sum()).backward()
        optimizer.step()
    stats = loader.stats()
    away = moves_when_all_have_arrived(shared_path, comm.size)
    assert sum(map(Counter.total, away.values())) > 0
    mine = sum(rows.total() for (rank, _), rows in away.items() if rank == comm.rank)
    assert stats["relocations"] <= mine, "the last may have been counted since"
    files = [path_of_rank(shared_path / "moves.jsonl", rank) for rank in range(comm.size)]
    recording = Recording.of_records(files)
    first_of_second = 1 + max(largest_intended(path, group=0) for path in files)
    for rank, clock, keys in recording:
        if rank == comm.rank:
            mine = set(batches[clock][0].tolist()) | {first_of_second + row for row in batches[clock][1].tolist()}
            assert set(keys.tolist()) == mine
    clocks = recording.clocks[recording.ranks == comm.rank]
    assert set(range(4, steps)) <= set(clocks.tolist()), "all but those that were read before keys were known"
    if comm.rank == 0:
        assert main(["--replay", *map(str, files)]) == 0
        assert '"bytes"' in capsys.readouterr().out
    meet(comm)
    loader.close()


def test_a_rank_that_cannot_write_is_named_by_all_before_anything_is_changed(comm, shared_path):
    for bad in range(comm.size):
        folder = shared_path / ("absent" if comm.rank == bad else ".")
        model = nn.Embedding(50, 2)
        with pytest.raises(OSError, match=f"rank {bad} cannot write .*moves-{bad}.jsonl.*No such file"):
            AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1, record=folder / "moves.jsonl")
        assert type(model.weight) is nn.Parameter
        meet(comm)


def test_a_record_on_some_ranks_only_is_refused_on_all(comm, shared_path):
    record = shared_path / "moves.jsonl" if comm.rank else None
    with pytest.raises(ValueError, match=r"ranks \[0\] have no record="):
        AdaLoader.wrap([torch.arange(3)], model=nn.Embedding(50, 2), min_rows=1, record=record)
    meet(comm)
