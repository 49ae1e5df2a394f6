"""The exact protocol is exact whatever the network does, and its simulator sees it when it is not."""

from importlib.util import find_spec

import numpy as np
import pytest

from pm.exact.moving import Moving
from pm.simulated.schedules import Recording
from pm.waiting import PeerError

if find_spec("mpi4py") is None:
    pytest.skip("virtual ranks ask MPI who is on their machine: no mpi4py", allow_module_level=True)

from pm.lockstep_simulator import LockstepSimulation, main, random_run


@pytest.mark.parametrize("techniques", ["all", "relocation", "replication", "none"])
def test_random_runs_equal_a_plain_loop(techniques):
    first = int(np.random.default_rng().integers(1 << 30))
    for seed in range(first, first + 8):
        simulation, expected = random_run(seed, techniques)
        np.testing.assert_allclose(simulation.values(), expected, rtol=1e-12, atol=1e-12, err_msg=f"seed {seed}")


def small_run(seed, techniques, delay_chance=0.5, machine_ranks=1):
    rng = np.random.default_rng(7)
    entries = [(rank, step, rng.integers(0, 30, 8)) for step in range(8) for rank in range(4)]
    factors = rng.normal(size=(30, 2)).astype(np.float32)
    return LockstepSimulation(
        Recording.of(entries),
        4,
        30,
        2,
        techniques=techniques,
        lookahead=3,
        seed=seed,
        delay_chance=delay_chance,
        machine_ranks=machine_ranks,
        gradient=lambda rank, step, rows, values: factors[rows] * np.float32(1 + 0.3 * rank) + values,
    ).run_to(8)


@pytest.mark.parametrize("machine_ranks", [1, 2, 3])
def test_neither_the_network_nor_where_rows_are_changes_a_bit(machine_ranks):
    runs = [(seed, how) for how in ("all", "relocation", "replication", "none") for seed in (1, 2)]
    results = [small_run(seed, how, machine_ranks=machine_ranks).values() for seed, how in runs]
    for other in results[1:]:
        assert results[0].tobytes() == other.tobytes()


def test_what_all_ranks_of_a_machine_need_crosses_the_network_once():
    rng = np.random.default_rng(3)
    wanted = [rng.choice(900, 300, replace=False) for _ in range(12)]
    recording = Recording.of([(rank, step, keys) for step, keys in enumerate(wanted) for rank in range(6)])
    crossed, values = [], []
    for machine_ranks in (1, 3):
        run = LockstepSimulation(recording, 6, 900, 64, lookahead=4, delay_chance=0.2, machine_ranks=machine_ranks)
        run.run_to(12)
        sent = [transport.bytes_to for transport in run.network.transports]
        crossed.append(sum(sent[rank][peer] for rank in range(6) for peer in range(6) if rank // 3 != peer // 3))
        values.append(run.values())
        if machine_ranks == 3:
            assert run.bytes_between_machines == crossed[-1]
    np.testing.assert_array_equal(*values)  # gradients are ones, whose sums are exact
    assert crossed[1] < crossed[0] / 3 * 1.3, "what is left is what says who needs what, and who is how far"


def test_a_run_repeats_from_its_seed():
    one, other = small_run(3, "relocation"), small_run(3, "relocation")
    assert one.bytes_by_kind == other.bytes_by_kind
    assert one.counts == other.counts and one.counts["relocations"]


def test_the_program_names_seeds_that_fail(capsys, monkeypatch):
    install = Moving._install

    def broken(self, table, rows, moves, records, version):
        return install(self, table, rows, moves, records * 2, version)

    assert main(["--seeds", "0:12", "--techniques", "relocation"]) == 0
    monkeypatch.setattr(Moving, "_install", broken)
    assert main(["--seeds", "0:12", "--techniques", "relocation"]) == 1
    assert "AssertionError" in capsys.readouterr().out
    monkeypatch.setattr(Moving, "on_records", lambda *message: None)
    assert main(["--seeds", "0:12", "--techniques", "relocation"]) == 1
    assert PeerError.__name__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--seeds", "4"])
