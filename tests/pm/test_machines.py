"""Which rank of a machine deals with which of another, and sums that are made on machines first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pm.colocated.machines import Machines
from pm.pieces import Piece, Summing
from tests.pm.oracle import some_rows


@st.composite
def partitions(draw):
    """Machines of 1 to 12 ranks in any order."""
    machine_of = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    return [[rank for rank, at in enumerate(machine_of) if at == machine] for machine in sorted(set(machine_of))]


@given(partitions())
def test_all_ranks_see_the_same_machines_and_deal_with_each_other_by_turns(groups):
    ranks = sorted(rank for group in groups for rank in group)
    all_machines = [Machines(rank, groups[::-1]) for rank in ranks]
    for rank, machines in zip(ranks, all_machines, strict=True):
        assert machines.groups == sorted(groups) and rank in machines.of(rank)
        assert sorted(peer for peers in machines.together for peer in peers) == [r for r in ranks if r != rank]
        assert [peers[0] for peers in machines.together] == sorted(peers[0] for peers in machines.together)
        assert sorted([*machines.elsewhere(), *machines.of(rank)]) == ranks
        for peers in machines.together:
            assert peers == machines.of(peers[0]) if peers[0] in machines.elsewhere() else len(peers) == 1
        for owner in ranks:
            adding = machines.adds_for(owner)
            apart = owner in machines.elsewhere() and len(machines.of(rank)) > 1
            assert (adding is not None) == apart
            if apart:
                assert adding == all_machines[owner].agent(machines.of(rank), owner), "the owner expects it of that one"
                assert machines.add_up
    alone = [len(group) == 1 for group in groups]
    assert all_machines[0].add_up == (len(groups) > 1 and not all(alone))


def test_each_rank_of_a_machine_deals_with_as_many_ranks_of_another():
    machines = Machines(0, [range(4), range(4, 12)])
    agents = [machines.agent(machines.of(0), owner) for owner in range(4, 12)]
    assert np.bincount(agents).tolist() == [2, 2, 2, 2]


# --- sums ---


def pieces_of(rng, dtype, most, dim):
    """Pieces of one machine: of some ranks, several of each at times, with counts at times, empty ones too."""
    pieces = []
    for _ in range(int(rng.integers(1, 7))):
        slots = some_rows(rng, most)
        ordinal = int(rng.integers(0, 3))
        counts = rng.integers(1, 5, len(slots)) if ordinal else None
        values = rng.standard_normal((len(slots), dim)).astype(dtype)
        pieces.append(Piece(slots, values, float(rng.choice([0.3, 1.0, 1.0])), ordinal, counts))
    return pieces


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64"]))
def test_what_comes_of_a_row_does_not_depend_on_the_rows_beside_it(seed, dtype):
    """A machine's sums over all rows, and over a part of them with pieces that may be empty: the same to the bit."""
    rng = np.random.default_rng(seed)
    most, dim = int(rng.integers(1, 40)), int(rng.integers(1, 5))
    pieces = pieces_of(rng, dtype, most, dim)
    part = rng.random(most) < 0.5
    some = []
    for piece in pieces:
        kept = part[piece.slots]
        counts = None if piece.counts is None else piece.counts[kept]
        some.append(Piece(piece.slots[kept], piece.values[kept], piece.scale, piece.ordinal, counts))
    whole, partly = Summing(alike=True).sums(pieces, dim), Summing(alike=True).sums(some, dim)
    for one, other in zip(whole, partly, strict=True):
        assert (one.scale, one.ordinal) == (other.scale, other.ordinal)
        kept = np.flatnonzero(part[one.slots])
        at = {slot: position for position, slot in enumerate(other.slots.tolist())}
        order = [at[slot] for slot in one.slots[kept].tolist()]
        assert len(order) == len(other.slots)
        assert one.values[kept].tobytes() == other.values[order].tobytes()
        if one.counts is not None:
            np.testing.assert_array_equal(one.counts[kept], other.counts[order])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_both_sides_list_the_rows_of_a_sum_in_one_order(seed):
    """The rank that sums knows rows, the owner knows slots, and has neither values nor counts."""
    rng = np.random.default_rng(seed)
    pieces = pieces_of(rng, "float64", 30, 2)
    slot_of = rng.permutation(1000)[:30]
    nothing = np.empty((0, 2))
    named = [
        Piece(slot_of[p.slots], nothing, p.scale, p.ordinal, None if p.counts is None else np.empty(0, np.int64))
        for p in pieces
    ]
    sums, expected = Summing(alike=True).sums(pieces, 2), Summing(alike=True).slots_of(named)
    for made, known in zip(sums, expected, strict=True):
        np.testing.assert_array_equal(slot_of[made.slots], known.slots)
        assert (made.scale, made.ordinal, made.counts is None) == (known.scale, known.ordinal, known.counts is None)
        assert len(made.values) == len(made.slots) and not len(known.values)


@pytest.mark.parametrize("counted", [False, True])
def test_sums_keep_their_memory(counted):
    """A sum is sent later than the next one is made."""
    summing = Summing(alike=True)
    rows = np.arange(3)
    counts = np.ones(3, np.int64) if counted else None
    ones = [Piece(rows, np.ones((3, 2)), 1.0, 1, counts)] * 2
    (first,) = summing.sums(ones, 2)
    summing.sums([Piece(rows, np.full((3, 2), 5.0), 1.0, 1, counts)] * 2, 2)
    np.testing.assert_array_equal(first.values, 2.0)
    assert first.counts is None or first.counts.tolist() == [2, 2, 2]
