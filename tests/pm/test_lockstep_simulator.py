"""The exact protocol is exact whatever the network does, and its simulator sees it when it is not."""

from importlib.util import find_spec

import numpy as np
import pytest

from pm.moving import Moving
from pm.schedules import Recording
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


def small_run(seed, techniques, delay_chance=0.5):
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
        gradient=lambda rank, step, rows, values: factors[rows] * np.float32(1 + 0.3 * rank) + values,
    ).run_to(8)


def test_neither_the_network_nor_where_rows_are_changes_a_bit():
    results = [small_run(seed, how).values() for how in ("all", "relocation", "none") for seed in (1, 2)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


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
