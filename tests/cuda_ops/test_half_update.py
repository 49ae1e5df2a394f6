"""Half values with float32 state: conversions and steps against torch, rounding at random against its mean."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.half_stores import HalfStore, assert_half_neighbours, half_dtypes, torch_step
from tests.cuda_ops.records import dims, seeds
from tests.cuda_ops.test_init import philox

HALVES = [torch.float16, torch.bfloat16]
OPTIMIZERS = ["sgd", "adagrad", "sparse_adam", "rowwise_adagrad"]


def every_half(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, 64)


def assert_same_values(actual, expected):
    numbers = ~expected.isnan()
    assert torch.equal(actual.isnan(), ~numbers)
    assert torch.equal(actual[numbers], expected[numbers])
    assert torch.equal(torch.signbit(actual[numbers]), torch.signbit(expected[numbers]))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_widened_exactly_and_comes_back(dtype):
    halves = every_half(dtype)
    wide = cuda_ops.widen_rows(halves)
    assert wide.dtype == torch.float32
    assert_same_values(wide, halves.float())
    assert_same_values(cuda_ops.narrow_rows(wide, torch.empty_like(halves)), halves)
    assert_same_values(cuda_ops.narrow_rows(wide, torch.empty_like(halves), seed=3), halves)


@pytest.mark.parametrize("dtype", HALVES)
@given(seeds)
def test_the_nearest_half_is_torchs(dtype, seed):
    rng = np.random.default_rng(seed)
    any_bits = torch.from_numpy(rng.integers(-(2**31), 2**31, (500, 33)).astype(np.int32)).view(torch.float32)
    scaled = torch.from_numpy(rng.standard_normal((500, 33)) * 10.0 ** rng.integers(-9, 6, (500, 33))).float()
    ties = every_half(dtype).float().view(torch.int32) + torch.from_numpy(rng.integers(-1, 2, (1024, 64)) << 12).int()
    for rows in (any_bits, scaled, ties.view(torch.float32)):
        rounded = cuda_ops.narrow_rows(rows, torch.empty(rows.shape, dtype=dtype))
        assert_same_values(rounded, rows.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.00123, -0.3, 1e-3, -65503.9, 3.1e-5, -4.4e-8, 2e-9, 0.0])
def test_rounding_at_random_takes_a_neighbour_and_is_right_on_average(dtype, value):
    n, dim = 4000, 16
    rows = torch.full((n, dim), value)
    exact = float(rows[0, 0])
    seed = int(np.random.default_rng().integers(0, 2**63))
    rounded = cuda_ops.narrow_rows(rows, torch.empty(n, dim, dtype=dtype), seed=seed).double()
    kinds = rounded.unique().tolist()
    assert min(kinds) <= exact <= max(kinds) or len(kinds) == 1
    assert len(kinds) <= 2
    # The mean of N draws of two values a step apart is within 6.5 deviations, with a chance of failure below 1e-10.
    finest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    step = max(2.0 ** (np.floor(np.log2(abs(exact) or 1.0)) - (10 if dtype == torch.float16 else 7)), finest)
    chance = abs(exact) / step % 1
    bound = 6.5 * step * np.sqrt(chance * (1 - chance) / rounded.numel()) + 12 * step / rounded.numel()
    assert abs(float(rounded.mean()) - exact) <= bound


def test_what_the_nearest_rounding_keeps_finite_stays_finite():
    for dtype, below, above in ((torch.float16, 65519.0, 65520.0), (torch.bfloat16, 3.3953e38, 3.4e38)):
        rows = torch.tensor([[below, -below, above, float("inf"), float("-inf"), float("nan")]]).repeat(2000, 1)
        rounded = cuda_ops.narrow_rows(rows, torch.empty(rows.shape, dtype=dtype), seed=1)
        assert rows[0, 0].to(dtype).isfinite() and rows[0, 2].to(dtype).isinf()
        assert rounded[:, :2].isfinite().all()
        assert rounded[:, 2].isinf().any()
        assert (rounded[:, 3] == float("inf")).all() and (rounded[:, 4] == float("-inf")).all()
        assert rounded[:, 5].isnan().all()


def rounded_by_definition(value, dtype, word):
    """The half (as a float) that halves.py describes for a finite float32 and 32 random bits, in whole numbers."""
    mantissa_bits, least_exponent = (10, -14) if dtype == torch.float16 else (7, -126)
    numerator, denominator = abs(float(value)).as_integer_ratio()
    exponent = max(math.frexp(abs(float(value)))[1] - 1, least_exponent) - mantissa_bits  # of the last place
    places = Fraction(numerator, denominator) / Fraction(2) ** exponent
    down = int(places)
    up = down + (int((places - down) * 2**32) + word >= 2**32)
    largest = torch.finfo(dtype).max
    if up * 2.0**exponent > largest and places - down < Fraction(1, 2):
        up = down
    return math.copysign(up * 2.0**exponent if up * 2.0**exponent <= largest else math.inf, value)


@pytest.mark.parametrize("dtype", HALVES)
@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 70))
def test_rounding_at_random_is_what_is_described_to_the_bit(dtype, seed, dim):
    rng = np.random.default_rng(seed)
    count, version, number = int(rng.integers(1, 8)), int(rng.integers(0, 2**40)), int(rng.integers(-(2**63), 2**63))
    bits = rng.integers(0, 2**32, (count, dim), dtype=np.uint32)
    if rng.integers(2):  # the exponents of float16 and of its subnormals
        bits = bits & 0x807FFFFF | (rng.integers(95, 144, bits.shape, dtype=np.uint32) << 23)
    rows = np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), np.float32(0.3))
    keys = rng.integers(-(2**63), 2**63, count)
    out = torch.empty(count, dim, dtype=dtype)
    cuda_ops.narrow_rows(torch.from_numpy(rows), out, torch.from_numpy(keys), version, number)
    for i in range(count):
        for j in range(dim):
            counter = [int(keys[i]) % 2**32, int(keys[i]) % 2**64 >> 32, j // 4, version % 2**32]
            word = philox(counter, (number % 2**32, number % 2**64 >> 32))[j % 4]
            assert float(out[i, j]) == rounded_by_definition(rows[i, j], dtype, word)


def test_rows_of_no_words_and_no_rows_are_rounded_to_none():
    for shape in ((0, 3), (4, 0)):
        for seed in (None, 1):
            out = torch.empty(shape, dtype=torch.float16)
            assert cuda_ops.narrow_rows(torch.empty(shape), out, seed=seed).shape == shape
        assert cuda_ops.widen_rows(out).shape == shape


@given(seeds, half_dtypes, dims)
def test_random_bits_depend_on_key_element_version_and_seed_alone(seed, dtype, dim):
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((9, dim))).float()
    keys = torch.from_numpy(rng.permutation(2**40)[:9] if dim > 2000 else rng.integers(0, 2**62, 9))
    number, version = int(rng.integers(0, 2**63)), int(rng.integers(0, 2**31))

    def rounded(rows, keys, version=version, number=number):
        out = torch.empty(rows.shape, dtype=dtype)
        return cuda_ops.narrow_rows(rows, out, keys, version, number)

    whole = rounded(rows, keys)
    order = torch.from_numpy(rng.permutation(9)[:5])
    assert torch.equal(rounded(rows[order], keys[order]), whole[order])
    assert torch.equal(rounded(rows[:, : (dim + 1) // 2], keys), whole[:, : (dim + 1) // 2])
    assert torch.equal(rounded(rows, keys), whole)
    if dim > 30:
        others = [rounded(rows, keys + 1), rounded(rows, keys, version + 1), rounded(rows, keys, number=number + 1)]
        assert not any(torch.equal(other, whole) for other in others)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(deadline=None, max_examples=40)
@given(seeds, half_dtypes, dims, st.sampled_from([1, -1, 0.25]), st.booleans(), st.booleans())
def test_steps_are_those_of_float32_rounded_once(optimizer, seed, dtype, dim, scale, at_random, half_grads):
    rng = np.random.default_rng(seed)
    store = HalfStore(rng, cuda_ops, optimizer, dtype, dim)
    for t in range(1, 4):
        slots = torch.from_numpy(rng.permutation(store.count)[: rng.integers(0, store.count + 1)])
        grad = torch.from_numpy(rng.standard_normal((len(slots), dim))).to(dtype if half_grads else torch.float32)
        before = store.records.clone()
        values, state = store.values[slots].clone(), store.state[slots].clone()
        store.step(slots, grad, scale, t, seed=int(rng.integers(0, 2**62)) if at_random else None)
        exact, exact_state = torch_step(optimizer, values.double(), state.double(), scale * grad.double(), t)
        torch.testing.assert_close(store.state[slots].double(), exact_state, rtol=1e-5, atol=1e-6)
        assert_half_neighbours(store.values[slots], exact, dtype)
        if not at_random:
            near = torch_step(optimizer, values.float(), state, scale * grad.float(), t)[0].to(dtype)
            assert (store.values[slots] == near).float().mean() >= 0.9 or near.numel() < 50  # but for roundings at ties
        assert (store.steps.view(store.count, -1)[slots, -1] == t).all()
        others = torch.ones(store.count, dtype=torch.bool)
        others[slots] = False
        assert torch.equal(store.records.view(torch.int32)[others], before.view(torch.int32)[others])


def test_sgd_to_the_nearest_is_torch_in_float32_rounded_to_the_bit():
    rng = np.random.default_rng()
    for dtype in HALVES:
        store = HalfStore(rng, cuda_ops, "sgd", dtype, 24)
        slots = torch.from_numpy(rng.permutation(store.count))
        grad = torch.from_numpy(rng.integers(-8, 9, (store.count, 24)) / 4).float()  # the product with lr is exact
        expected = (store.values[slots].float() - 0.125 * grad).to(dtype)
        where = (store.halves, store.words, store.stride, 24, store.steps, slots, grad)
        cuda_ops.half_sgd_update(*where, 0.125, 1.0, 3)
        assert torch.equal(store.values[slots], expected)


def test_small_updates_are_lost_to_the_nearest_and_kept_on_average_at_random():
    rng = np.random.default_rng()
    moved = {}
    for seed in (None, int(rng.integers(0, 2**62))):
        store = HalfStore(np.random.default_rng(5), cuda_ops, "sgd", torch.bfloat16, 64)
        store.values.fill_(1.0)
        slots = torch.arange(store.count)
        grad = torch.full((store.count, 64), 0.001)
        for t in range(1, 201):
            where = (store.halves, store.words, store.stride, 64, store.steps, slots, grad)
            cuda_ops.half_sgd_update(*where, 1.0, 1.0, t, seed=seed)
        moved[seed] = 1.0 - float(store.values.double().mean())
    to_nearest, at_random = moved.values()
    assert to_nearest == 0.0
    assert abs(at_random - 0.2) < 0.05  # a step changes a value by 0.001 of 0.0039 or 0.0078, in 200 steps by 0.2


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_gathered_and_scattered_as_they_are(dtype):
    rng = np.random.default_rng()
    store = HalfStore(rng, cuda_ops, "adagrad", dtype, 7)
    slots = torch.from_numpy(rng.integers(0, store.count, 20))
    rows = cuda_ops.gather(store.halves, 2 * store.stride, slots, width=7)
    assert rows.dtype == dtype and torch.equal(rows, store.values[slots])
    distinct = torch.from_numpy(rng.permutation(store.count))
    new = torch.randn(store.count, 7).to(dtype)
    cuda_ops.scatter(store.halves, 2 * store.stride, distinct, new)
    assert torch.equal(store.values[distinct], new)


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    store = HalfStore(np.random.default_rng(), cuda_ops, "adagrad", torch.bfloat16, 3)
    before = store.words.clone()
    slots, grad = torch.arange(store.count), torch.ones(store.count, 3)
    where = (store.halves, store.words, store.stride, 3, store.steps)

    def call(*where, slots=slots, grad=grad, **rest):
        cuda_ops.half_adagrad_update(*where, slots, grad, 0.1, 1e-8, 1.0, 1, **rest)

    with pytest.raises(IndexError, match=r"slots\[0\] is -1, which is not in"):
        call(*where, slots=slots - 1)
    with pytest.raises(TypeError, match="grad must be float32, got float64"):
        call(*where, grad=grad.double())
    with pytest.raises(ValueError, match="grad must have shape"):
        call(*where, grad=grad[:, :2])
    with pytest.raises(ValueError, match="2 keys given for"):
        call(*where, slots=slots[:1], grad=grad[:1], keys=torch.arange(2))
    with pytest.raises(TypeError, match="halves must be float16 or bfloat16, got int16"):
        call(store.halves.view(torch.int16), *where[1:])
    with pytest.raises(ValueError, match="halves must have shape"):
        call(store.halves[2:], *where[1:])
    with pytest.raises(TypeError, match="words must be float32, got float64"):
        call(store.halves, store.words.double(), *where[2:])
    with pytest.raises(ValueError, match="do not lie in a record"):
        call(store.halves, store.words, 4, *where[3:], slots=slots[:1], grad=grad[:1])
    assert torch.equal(store.words, before)
    with pytest.raises(TypeError, match="out must be float16 or bfloat16, got float32"):
        cuda_ops.narrow_rows(grad, torch.empty_like(grad))
    with pytest.raises(TypeError, match="rows must be float16 or bfloat16, got float32"):
        cuda_ops.widen_rows(grad)
