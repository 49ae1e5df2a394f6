"""Sampling schemes: the distribution that each keeps, what is intended, and what is refused.

Seeds are fresh in every run, and printed where a test fails. A test of a distribution compares counts with their
expectation by Pearson's chi-square, with a bound that chance exceeds less than once in 10^9 runs.
"""

import itertools
import math
import secrets
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm.by_hand.sampling import SCHEMES, Sampling

VALUES = 3


class Access:
    """One rank of a manager whose keys never move; the value of key k is [k, k, k]."""

    def __init__(self, num_keys: int, local: object = (), rank: int = 0, stream: int = 0):
        self.num_keys, self.rank, self.stream = num_keys, rank, stream
        self.current_clock = 0
        self.local = np.array(sorted(local), dtype=np.int64)
        self.intended: list[tuple[np.ndarray, int, int]] = []
        self.asked = 0

    def intend(self, keys: np.ndarray, start: int, end: int) -> None:
        assert keys.dtype == np.int64 and len(np.unique(keys)) == len(keys)
        self.intended.append((keys, start, end))

    def is_local(self, keys: np.ndarray) -> np.ndarray:
        self.asked += len(keys)
        return np.isin(keys, self.local)

    def pull(self, keys: np.ndarray, out: np.ndarray) -> None:
        if np.shape(out) != (len(keys), VALUES):
            raise ValueError(f"out must be {(len(keys), VALUES)}")
        out[:] = torch.from_numpy(keys)[:, None] if isinstance(out, torch.Tensor) else keys[:, None]


def fresh_seed() -> int:
    seed = secrets.randbits(63)
    print(f"seed {seed}")
    return seed


def pulled(sampling: Sampling, handle: int, count: int) -> np.ndarray:
    """Pull `count` keys of a sample; check their values."""
    keys, values = np.full(count, -1), np.full((count, VALUES), np.nan)
    sampling.pull(handle, keys, values)
    assert (values == keys[:, None]).all()
    return keys


def sample(sampling: Sampling, n: int) -> np.ndarray:
    return pulled(sampling, sampling.prepare(n), n)


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts of independent draws are as likely as the probabilities say.

    The bound on chi-square is that of Laurent & Massart (2000, lemma 1) for exp(-25) = 1.4e-11; chi-square of counts is
    the sum of squared normals in the limit only, so cells with few expected draws are put together.
    """
    assert counts[probabilities == 0].sum() == 0
    order = np.argsort(probabilities)
    expected = probabilities[order] / probabilities.sum() * counts.sum()
    few = np.cumsum(expected) < 30
    expected = np.append(expected[~few], expected[few].sum())
    observed = np.append(counts[order][~few], counts[order][few].sum())
    some = expected > 1e-9
    chi_square = ((observed[some] - expected[some]) ** 2 / expected[some]).sum()
    freedom, x = max(1, some.sum() - 1), 25.0
    assert chi_square <= freedom + 2 * math.sqrt(freedom * x) + 2 * x, (chi_square, freedom)


def successive(weights: np.ndarray, n: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered sample of `n` in successive draws, by definition."""
    outcomes = {}
    for keys in itertools.permutations(range(len(weights)), n):
        probability, left = 1.0, weights.sum()
        for key in keys:
            probability *= weights[key] / left if left > 0 else 0.0
            left -= weights[key]
        outcomes[keys] = probability
    return outcomes


WEIGHTS = np.array([5.0, 0.0, 1.0, 0.25, 3.0, 1.0, 8.0, 0.5])
KEYS = np.array([90, 4, 17, 33, 0, 99, 56, 21])


def by_function(weights: np.ndarray):
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return KEYS[rng.choice(len(KEYS), size=n, p=weights / weights.sum())]

    return draw


DISTRIBUTIONS = {
    "uniform": (None, np.ones(8)),
    "weights": (WEIGHTS, WEIGHTS),
    "tensor": (torch.from_numpy(WEIGHTS.astype(np.float32)), WEIGHTS),
    "function": (by_function(WEIGHTS), WEIGHTS),
}


def place_of(keys: np.ndarray) -> np.ndarray:
    """Positions in `KEYS`."""
    order = np.argsort(KEYS)
    return order[np.searchsorted(KEYS[order], keys)]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("scheme", ["naive", "preloc", "local"])
def test_draws_with_replacement_have_the_given_distribution(scheme, name):
    """Each on its own, and in pairs: independent. "local", where all keys are, is the whole distribution."""
    distribution, weights = DISTRIBUTIONS[name]
    access = Access(100, local=KEYS)
    sampling = Sampling(access, seed=fresh_seed(), keys=KEYS, distribution=distribution, scheme=scheme)
    drawn = place_of(np.concatenate([sample(sampling, n) for n in (1, 30_000, 0, 9_999)]))
    assert_follows(np.bincount(drawn, minlength=8), weights)
    pairs = np.bincount(drawn[0::2] * 8 + drawn[1::2], minlength=64)
    assert_follows(pairs, np.outer(weights, weights).ravel())
    assert sampling.draws_not_local == 0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("scheme", ["naive", "preloc", "local"])
def test_samples_without_replacement_are_successive_draws(scheme, name):
    distribution, weights = DISTRIBUTIONS[name]
    access = Access(100, local=KEYS)
    settings_ = dict(keys=KEYS, distribution=distribution, scheme=scheme, replacement=False)
    sampling = Sampling(access, seed=fresh_seed(), **settings_)
    counts = dict.fromkeys(successive(weights, 3), 0)
    for _ in range(6000):
        handle = sampling.prepare(3)
        counts[tuple(place_of(np.concatenate([pulled(sampling, handle, k) for k in (1, 2)])).tolist())] += 1
    assert_follows(np.array(list(counts.values())), np.array(list(successive(weights, 3).values())))


@pytest.mark.parametrize("weights", [WEIGHTS, np.array([1e9, 1.0, 1.0, 1.0, 1e-3, 0, 0, 0])])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_keys_can_be_had_without_replacement_however_unlikely_some_are(scheme, weights):
    access, possible = Access(100, local=KEYS[:7]), int((weights > 0).sum())
    sampling = Sampling(
        access, seed=fresh_seed(), keys=KEYS, distribution=weights, scheme=scheme, replacement=False, pool_size=3
    )
    firsts = []
    for _ in range(50):
        drawn = sample(sampling, possible)
        assert sorted(drawn) == sorted(KEYS[weights > 0])
        firsts.append(drawn[0])
    assert (np.array(firsts) == KEYS[weights.argmax()]).mean() > 0.05
    with pytest.raises(ValueError, match=f"{possible + 1} keys cannot be drawn without replacement: {possible} have"):
        sampling.prepare(possible + 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keys_that_are_hard_to_come_by_are_successive_draws_too(scheme):
    """One key is drawn nearly always: passing over repeats would never end, and the others come by another way."""
    weights = np.array([1e12, 4.0, 2.0, 1.0, 1.0])
    access = Access(5, local=range(5))
    sampling = Sampling(
        access, seed=fresh_seed(), distribution=weights, scheme=scheme, replacement=False, pool_size=3, reuse=2
    )
    drawn = np.stack([sample(sampling, 3) for _ in range(3000)])
    assert (drawn[:, 0] == 0).all()
    outcomes = successive(weights[1:], 2)
    counts = [int((drawn[:, 1:] == np.array(outcome) + 1).all(1).sum()) for outcome in outcomes]
    assert_follows(np.array(counts), np.array(list(outcomes.values())))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("replacement", [True, False])
def test_local_draws_have_the_distribution_given_that_a_key_is_local(share, replacement):
    """Few local keys are found by looking, many by drawing: the distribution is the same."""
    rng = np.random.default_rng(fresh_seed())
    weights = rng.random(2000) ** 3
    local = rng.permutation(2000)[: int(2000 * share)]
    sampling = Sampling(
        Access(2000, local), seed=fresh_seed(), distribution=weights, scheme="local", replacement=replacement
    )
    first = np.concatenate([sample(sampling, 2)[:1] if not replacement else sample(sampling, 4) for _ in range(5000)])
    given_local = np.zeros(2000)
    given_local[local] = weights[local]
    assert_follows(np.bincount(first, minlength=2000), given_local)
    assert sampling.draws_not_local == 0


def test_local_samples_without_replacement_take_local_keys_first_and_count_the_others():
    sampling = Sampling(Access(50, local=[3, 44]), seed=fresh_seed(), scheme="local", replacement=False)
    for taken in range(1, 20):
        handle = sampling.prepare(5)
        keys = np.concatenate([pulled(sampling, handle, k) for k in (1, 0, 1, 3)])
        assert sorted(keys[:2]) == [3, 44] and len(np.unique(keys)) == 5
        assert sampling.draws_not_local == 3 * taken


@pytest.mark.parametrize("num_keys", [40, 1 << 40])
def test_where_no_key_is_local_draws_come_from_everywhere_and_are_counted(num_keys):
    access = Access(num_keys)
    sampling = Sampling(access, seed=fresh_seed(), scheme="local")
    drawn = np.concatenate([sample(sampling, 100) for _ in range(10)])
    assert sampling.draws_not_local == 1000
    assert_follows(np.bincount(drawn * 20 // num_keys, minlength=20), np.ones(20))
    assert access.asked <= 10 * ((1 << 18) + (1 << 14))


def test_local_draws_follow_what_is_local_when_they_are_pulled():
    access = Access(1000, local=[1, 2])
    sampling = Sampling(access, seed=fresh_seed(), scheme="local")
    handle = sampling.prepare(100)
    assert not access.intended
    assert set(pulled(sampling, handle, 50)) == {1, 2}
    access.local = np.array([7])
    assert set(pulled(sampling, handle, 50)) == {7}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_pools_use_each_key_as_often_as_stated_and_each_draw_has_the_given_distribution(name):
    distribution, weights = DISTRIBUTIONS[name]
    access = Access(100)
    sampling = Sampling(
        access, seed=fresh_seed(), keys=KEYS, distribution=distribution, scheme="pool", pool_size=40, reuse=5
    )
    drawn = place_of(np.concatenate([sample(sampling, n) for n in [7] * 1000 + [1000]]))  # 40 pools of 40 keys x 5
    uses = drawn.reshape(40, 5, 40)
    in_pool = np.stack([np.bincount(pool, minlength=8) for pool in uses[:, 0]])
    for use in range(1, 5):
        assert np.array_equal(np.stack([np.bincount(pool, minlength=8) for pool in uses[:, use]]), in_pool)
        assert not np.array_equal(uses[:, use], uses[:, use - 1])  # shuffled anew
    assert_follows(in_pool.sum(0), weights)  # independent between pools, and within one


def test_one_place_in_the_stream_of_pools_has_the_given_distribution():
    seed, weights = fresh_seed(), np.array([4.0, 2.0, 1.0, 1.0])
    counts = np.zeros((3, 4))
    for run in range(3000):
        sampling = Sampling(Access(4), seed=seed + run, distribution=weights, scheme="pool", pool_size=3, reuse=2)
        drawn = sample(sampling, 9)
        for at, place in enumerate((0, 4, 8)):
            counts[at, drawn[place]] += 1
    for place in range(3):
        assert_follows(counts[place], weights)


@given(
    seed=st.integers(-(2**70), 2**70),
    scheme=st.sampled_from(SCHEMES),
    replacement=st.booleans(),
    pool_size=st.integers(1, 9),
    reuse=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_sample_holds_what_it_should(seed, scheme, replacement, pool_size, reuse, data):
    """Keys are of those to sample from, distinct where they must be, whatever the parts in which they are pulled."""
    num_keys = data.draw(st.integers(1, 40))
    keys = data.draw(st.one_of(st.none(), st.sets(st.integers(0, num_keys - 1), min_size=1)))
    keys = None if keys is None else np.array(sorted(keys))
    allowed = np.arange(num_keys) if keys is None else keys
    weights = None
    if data.draw(st.booleans()):
        weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(allowed), max_size=len(allowed))), float)
        weights[data.draw(st.integers(0, len(allowed) - 1))] = 1.0
        allowed = allowed[weights > 0]
    access = Access(num_keys, local=data.draw(st.sets(st.integers(0, num_keys - 1))))
    sampling = Sampling(
        access,
        seed=seed,
        keys=keys,
        distribution=weights,
        scheme=scheme,
        replacement=replacement,
        pool_size=pool_size,
        reuse=reuse,
    )
    open_samples = {}
    for n in data.draw(st.lists(st.integers(0, 30 if replacement else len(allowed)), max_size=4)):
        access.current_clock += 1
        open_samples[sampling.prepare(n)] = n
    for handle, n in open_samples.items():
        taken, left = [], n
        while left:
            count = data.draw(st.integers(1, left))
            taken.append(pulled(sampling, handle, count))
            left -= count
        drawn = np.concatenate([np.empty(0, np.int64), *taken])
        assert len(drawn) == n and set(drawn) <= set(allowed)
        if not replacement:
            assert len(np.unique(drawn)) == n
        if n and scheme in ("preloc", "pool"):
            clock = 1 + list(open_samples).index(handle)
            intended = [keys for keys, start, end in access.intended if (start, end) == (clock, clock)]
            assert set(drawn) <= set(np.concatenate(intended))
    if scheme in ("naive", "local"):
        assert not access.intended


def test_intents_have_the_clocks_of_the_sample():
    access = Access(10**6)
    sampling = Sampling(access, seed=fresh_seed(), scheme="preloc")
    access.current_clock = 5
    for clocks in ((), (9,), (7, 12)):
        sampling.prepare(20, *clocks)
    assert [(start, end) for _, start, end in access.intended] == [(5, 5), (9, 9), (7, 12)]
    with pytest.raises(ValueError, match="start 7, end 6"):
        sampling.prepare(20, 7, 6)
    assert len(access.intended) == 3


def test_a_pool_is_intended_once_and_its_keys_with_every_sample():
    access = Access(10**6)
    sampling = Sampling(access, seed=fresh_seed(), scheme="pool", pool_size=100, reuse=4)
    for clock in range(40):
        sampling.prepare(10, clock)
    pools = [keys for keys, _, _ in access.intended if len(keys) > 10]
    assert len(pools) == 1 and len(access.intended) == 41
    assert set(np.concatenate([keys for keys, _, _ in access.intended])) == set(pools[0])
    sampling.prepare(10, 40)
    assert len(access.intended) == 43


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_repeat_and_seeds_ranks_and_streams_differ(scheme):
    def run(seed=3, **which):
        sampling = Sampling(Access(10**6, local=range(10**5), **which), seed=seed, scheme=scheme, replacement=False)
        return tuple(sample(sampling, 30).tolist())

    assert run() == run()
    assert len({run(), run(seed=4), run(seed=-3), run(rank=1), run(stream=1), run(seed=3 + 2**40)}) == 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_uniform_samples_take_no_memory_for_keys(scheme):
    access = Access(1 << 40, local=range(1 << 16))
    sampling = Sampling(access, seed=1, scheme=scheme, replacement=False)
    access.is_local = lambda keys: keys % 4 == 1
    tracemalloc.start()
    drawn = sample(sampling, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and len(np.unique(drawn)) == 1000 and drawn.max() > 1 << 39


def test_torch_outputs_are_filled():
    sampling = Sampling(Access(9), seed=0)
    keys, values = torch.empty(4, dtype=torch.int64), torch.empty(4, VALUES, dtype=torch.float64)
    sampling.pull(sampling.prepare(4), keys.numpy(), values)
    assert torch.equal(values, keys.double()[:, None].expand(4, VALUES))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_keys_than_prepared_and_unknown_samples_are_refused(scheme):
    sampling = Sampling(Access(9, local=[1]), seed=0, scheme=scheme)
    handle = sampling.prepare(5)
    pulled(sampling, handle, 2)
    with pytest.raises(ValueError, match=f"sample {handle} has 3 keys left of 5; 4 were asked for"):
        pulled(sampling, handle, 4)
    with pytest.raises(TypeError, match="int64 array"):
        sampling.pull(handle, np.empty(1, np.int32), np.empty((1, VALUES)))
    with pytest.raises(TypeError, match="list"):
        sampling.pull(handle, [0], np.empty((1, VALUES)))
    frozen = np.zeros(1, np.int64)
    frozen.flags.writeable = False
    with pytest.raises(TypeError, match="not writeable"):
        sampling.pull(handle, frozen, np.empty((1, VALUES)))
    keys = np.full(3, -1)
    with pytest.raises(ValueError, match="out must be"):
        sampling.pull(handle, keys, np.empty((1, VALUES)))
    assert (keys == -1).all()
    pulled(sampling, handle, 3)  # what was refused took nothing
    with pytest.raises(ValueError, match=f"sample {handle} is over; 2 more"):
        pulled(sampling, handle, 2)
    pulled(sampling, handle, 0)
    other = sampling.prepare(5)
    sampling.finish(other)
    sampling.finish(other)
    with pytest.raises(ValueError, match=f"sample {other} is over; 1 more"):
        pulled(sampling, other, 1)
    for unknown in (0, -1, other + 1):
        with pytest.raises(ValueError, match=f"handle {unknown} is of no sample"):
            pulled(sampling, unknown, 0)
    assert len(pulled(sampling, sampling.prepare(0), 0)) == 0
    with pytest.raises(ValueError, match="n=-1"):
        sampling.prepare(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scheme="best"), "'best' is not one of naive, preloc, pool, local"),
        (dict(distribution=np.array([1.0, -1.0, 1.0, 1.0])), r"weights\[1\] is -1.0"),
        (dict(distribution=[1.0, float("nan"), 1.0, 1.0]), r"weights\[1\] is nan"),
        (dict(distribution=np.zeros(4)), "all 4 weights are 0"),
        (dict(distribution=np.ones(3)), r"one weight per key, 4; got weights \[3\]"),
        (dict(keys=[1, 2], distribution=np.ones(4)), r"one weight per key, 2; got weights \[4\]"),
        (dict(distribution="uniform"), "None, weights or a function, got str"),
        (dict(keys=[1, 4]), r"keys\[1\] is 4, which is not in \[0, 4\)"),
        (dict(keys=[-1, 3]), r"keys\[0\] is -1"),
        (dict(keys=[3, 1, 3]), "key 3 occurs 2 times"),
        (dict(keys=[]), "m at least 1"),
        (dict(keys=[0.5]), "integers"),
        (dict(pool_size=0), "pool_size must be at least 1, got 0"),
        (dict(reuse=0), "reuse must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(Access(4), seed=0, **arguments)


@pytest.mark.parametrize(
    ("drawer", "message"),
    [
        (lambda rng, n: np.full(n, 9), r"drew key 9, which is not in \[0, 9\)"),
        (lambda rng, n: np.full(n, -1), "drew key -1"),
        (lambda rng, n: rng.random(n), "float64"),
        (lambda rng, n: np.zeros(n + 1, np.int64), "asked for 4 keys"),
    ],
)
def test_functions_that_draw_other_things_are_refused(drawer, message):
    sampling = Sampling(Access(9), seed=0, distribution=drawer)
    with pytest.raises(ValueError, match=message):
        sampling.prepare(4)
    with pytest.raises(ValueError, match="drew key 3, which is not in the 2 keys"):
        Sampling(Access(9), seed=0, keys=[2, 4], distribution=lambda rng, n: np.full(n, 3)).prepare(1)


def test_a_function_that_cannot_give_enough_different_keys_ends_with_an_error():
    sampling = Sampling(Access(9), seed=0, distribution=lambda rng, n: rng.integers(3, size=n), replacement=False)
    assert sorted(sample(sampling, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="gave 3 different keys in .* draws; 5 are wanted"):
        sampling.prepare(5)
