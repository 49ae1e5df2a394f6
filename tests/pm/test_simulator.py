"""The protocol keeps its promises over random schedules, and the simulator sees it when it does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pm.asynchronous.holdings import Copies, Holdings, Owned
from pm.asynchronous.locations import Locations
from pm.asynchronous.operations import Operations
from pm.asynchronous.syncing import Syncing
from pm.recorder import Recorder, path_of_rank
from pm.simulated.ledger import Violation
from pm.simulated.schedules import Does, Event, Recording, random_schedule
from pm.simulated.simulated_network import Setting
from pm.simulated.simulation import Simulation, run_seed
from pm.simulator import main

MOST_SEEDS = 100


@pytest.mark.parametrize("staleness", [None, 0, 1, 2])
@pytest.mark.parametrize("techniques", ["all", "relocation", "replication", "none"])
def test_random_schedules_keep_all_promises(techniques, staleness):
    first = 100 * ["all", "relocation", "replication", "none"].index(techniques)
    for seed in range(first, first + 2):
        run_seed(seed, techniques=techniques, staleness=staleness)


COMMON_KEYS = {"common_keys": True, "techniques": "replication", "ranks": 3, "update_threshold": 0.0}
"""All ranks change the same few keys at every clock."""


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_rank_is_further_behind_than_it_may_be(staleness):
    for seed in range(100 * staleness, 100 * staleness + 12):
        run_seed(seed, staleness=staleness, **COMMON_KEYS)


def test_a_clock_that_overtakes_changes_is_found(monkeypatch):
    monkeypatch.setattr(Syncing, "_unsent", lambda self: [])
    with pytest.raises(Violation, match="read too little"):
        for seed in range(MOST_SEEDS):
            run_seed(seed, staleness=1, **COMMON_KEYS)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 1 << 30),
    st.integers(2, 8),
    st.integers(1, 3),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from(["all", "relocation", "replication", "none"]),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([0, 1, 1000]),
    st.booleans(),
)
def test_schedules_of_any_shape_keep_all_promises(
    seed, ranks, workers, capacities, techniques, staleness, cache_keys, acts_late
):
    setting = Setting(
        ranks=ranks,
        capacities=tuple(capacities),
        widths=tuple(ranks + number for number in range(len(capacities))),
        dtypes=("float64",) * len(capacities),
        techniques=techniques,
        staleness=staleness,
        cache_keys=cache_keys,
        acts_late=acts_late,
        seed=seed,
        stall_chance=0.05,
        follow_up_seconds=0.3,
    )
    schedule = random_schedule(np.random.default_rng(seed), ranks, workers, capacities, clocks=4)
    Simulation(setting, schedule).run()


def test_a_schedule_repeats_from_its_seed():
    lines = [[], []]
    for part in lines:
        run_seed(7, trace=part.append)
    assert lines[0] == lines[1]
    assert any("REQUEST" in line for line in lines[0])


def test_the_program_names_seeds_that_fail(capsys, monkeypatch):
    add = Owned.add
    monkeypatch.setattr(Owned, "add", lambda self, slots, deltas: add(self, slots, 2 * deltas))
    assert main(["--seeds", "0:6", "--techniques", "none"]) == 1
    out = capsys.readouterr().out
    seed = int(out.split("seed ")[1].split(":")[0])
    assert main(["--seed", str(seed), "--techniques", "none", "--trace"]) == 1
    assert "FETCH" in capsys.readouterr().out


def test_the_program_refuses_seeds_that_are_no_range(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "12"])
    assert "--seeds takes FIRST:END" in capsys.readouterr().err


# What the protocol must not leave out: without it, some schedule breaks a promise.


def _forgets_changes(self, keys, values, counters, holders, acknowledged, *, rightly=Holdings.take_over):
    at, _ = self.copies.find(keys)
    self.copies.forget_untaken(at[at >= 0])
    return rightly(self, keys, values, counters, holders, np.iinfo(np.int64).max)


def _waits_for_nothing(self, group, keys, sets_only=False):
    return np.zeros(len(keys), bool)


def _keeps_what_is_overwritten(self, slots):
    return None


def _forgets_pointers_at_once(self, acknowledged):
    self._given_away.remove(self._given_away.items()[0])


FAULTS = {
    "a copy that becomes a record loses its changes": (Holdings, "take_over", _forgets_changes, "all"),
    "a pull does not wait for its rank's pushes": (Operations, "are_under_way", _waits_for_nothing, "all"),
    "an operation overtakes one that waits": (Operations, "_are_waiting", _waits_for_nothing, "all"),
    "a set leaves earlier changes of the copy": (Copies, "forget_untaken", _keeps_what_is_overwritten, "all"),
    "pointers go before homes have confirmed": (Locations, "confirm", _forgets_pointers_at_once, "relocation"),
}
CROWDED = {
    "ranks": 3,
    "capacities": (4,),
    "widths": (3,),
    "dtypes": ("float64",),
    "staleness": None,
    "update_threshold": 0.0,
    "acts_late": False,
    "cache_keys": 1000,
    "delay_seconds": 1.0,
    "stall_chance": 0.0,
    "round_seconds": 1.0,
    "think_seconds": 1.0,
    "follow_up_seconds": 1.0,
    "rounds_when_needed": True,
    "clocks_per_exchange": 1,
    "overdue_chance": 0.1,
}
"""Few keys and ranks, and rounds, messages and workers that are about as fast as each other."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    where, name, broken, techniques = FAULTS[fault]
    monkeypatch.setattr(where, name, broken)
    for seed in range(MOST_SEEDS):
        try:
            run_seed(seed, techniques=techniques, **CROWDED)
        except Violation:
            return
    pytest.fail(f"{MOST_SEEDS} schedules do not show that {fault}")


# Recordings


def test_a_recording_survives_the_file_and_replays(tmp_path, capsys):
    rng = np.random.default_rng()
    entries = [(rank, clock, rng.integers(0, 50, rng.integers(0, 8))) for clock in range(6) for rank in range(3)]
    recording = Recording.of(entries)
    recording.save(tmp_path / "lookups.npz")
    loaded = Recording.load(tmp_path / "lookups.npz")
    for (rank, clock, keys), (rank2, clock2, keys2) in zip(entries, loaded, strict=True):
        assert (rank, clock) == (rank2, clock2)
        assert np.array_equal(np.unique(keys), keys2)
    setting = Setting(ranks=3, capacities=(50,), widths=(3,))
    Simulation(setting, loaded.schedule(lookahead=2)).run()
    assert main(["--replay", str(tmp_path / "lookups.npz"), "--width", "4"]) == 0
    assert '"bytes"' in capsys.readouterr().out


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", keys=np.arange(3))
    with pytest.raises(ValueError, match="is not a recording of version 1"):
        Recording.load(tmp_path / "other.npz")


def test_what_ranks_have_recorded_replays(tmp_path, capsys):
    rng = np.random.default_rng()
    expected, files = [], []
    for rank in range(3):
        files.append(path_of_rank(tmp_path / "moves.jsonl", rank))
        for run in range(2):  # the second one counts
            recorder = Recorder(files[-1], append=True)
            recorder.begin(rank, 3, staleness=0)
            for clock in range(5):
                parts = [np.unique(rng.integers(0, 20, rng.integers(0, 8))) for _ in range(2)]
                for group, keys in enumerate(parts):
                    recorder.note("intends", group, keys, start=clock, end=None)
                recorder.note("moved here", 1, parts[0], round=clock, other=(rank + 1) % 3)
                if run == 1 and (len(parts[0]) or len(parts[1])):
                    expected.append((rank, clock, parts))
            recorder.close()
    replayed = list(Recording.of_records(files))
    size = 1 + max(int(parts[0].max(initial=-1)) for _, _, parts in expected)
    for (rank, clock, parts), (rank2, clock2, keys) in zip(expected, replayed, strict=True):
        assert (rank, clock) == (rank2, clock2)
        assert np.array_equal(np.concatenate([parts[0], parts[1] + size]), keys)
    assert main(["--replay", *map(str, files), "--width", "4"]) == 0
    assert '"REQUEST"' in capsys.readouterr().out
    with pytest.raises(ValueError, match="of rank 1, and so is another"):
        Recording.of_records([files[1], files[0], files[1]])


@pytest.mark.parametrize("text", ["", "nothing", "{}", '{"what": "intends", "group": 0, "keys": [1], "start": 0}'])
def test_a_file_that_no_rank_has_recorded_is_refused(tmp_path, text):
    path = tmp_path / "moves-0.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="moves-0.jsonl is not a record of intents"):
        Recording.of_records([path])


def test_a_record_for_which_there_is_no_room_is_given_up(caplog):
    recorder = Recorder("/dev/full")
    recorder.begin(0, 1)
    recorder.note("moved here", 0, np.arange(3), round=1, other=0)
    recorder.close()
    assert caplog.text.count("nothing more is recorded in /dev/full") == 1


# Economy


def away_from(rank, ranks, capacity):
    home = Locations(0, ranks, 0).home_of(np.arange(capacity))
    return np.flatnonzero(home != rank)


def test_a_row_that_is_used_once_costs_one_question_and_one_answer():
    keys = away_from(0, 2, 40)
    schedule = {
        (0, 0): [Event(Does.INTEND, 0, keys, start=3, end=3)]
        + [event for _ in range(3) for event in (Event(Does.PAUSE, seconds=20.0), Event(Does.ADVANCE))]
        + [Event(Does.PULL, 0, keys), Event(Does.PUSH, 0, keys), Event(Does.ADVANCE), Event(Does.PAUSE, seconds=50.0)],
        (1, 0): [Event(Does.PAUSE, seconds=1.0)],
    }
    simulation = Simulation(Setting(ranks=2, capacities=(40,)), schedule)
    simulation.settle()
    kinds = simulation.bytes_by_kind
    assert set(kinds) == {"PARCEL", "TAKEN", "REQUEST", "RECORDS"}
    assert simulation.counts["relocations"] == len(keys)
    assert simulation.counts["remote_pulls"] == simulation.counts["remote_pushes"] == 0


def test_a_huge_lookahead_costs_neither_messages_nor_copies():
    rng = np.random.default_rng(5)
    entries = [(rank, clock, rng.integers(0, 400, 20)) for clock in range(320) for rank in range(2)]
    figures = {}
    for lookahead in (60, 300):
        setting = Setting(ranks=2, capacities=(400,), think_seconds=1.0, round_seconds=1.0, delay_seconds=0.2)
        simulation = Simulation(setting, Recording.of(entries).schedule(lookahead), checks=False)
        most_copies = 0
        while simulation.network.on_the_way or simulation._doing:
            simulation._turn()
            most_copies = max(most_copies, sum(len(node.holdings[0].copies.store) for node in simulation.nodes))
        figures[lookahead] = simulation.network.bytes_sent.sum(), most_copies
    assert figures[300][0] <= 1.05 * figures[60][0]
    assert figures[300][1] <= 1.2 * figures[60][1]
