"""Half values with float32 state on the device: the CPU's random bits, and the steps of optimizers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops
from cuda_ops.cuda import half_update
from cuda_ops.cuda.rows import gather, scatter
from tests.cuda_ops.cuda.device import DEVICE, counts, dims, drawn, host, on_device, seeds
from tests.cuda_ops.half_stores import HalfStore, assert_half_neighbours, half_dtypes, torch_step

# The simulator's arithmetic of whole numbers remarks on it where they wrap, as a hash and Philox want it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def as_bits(tensor):
    return host(tensor.view(torch.int16))


@drawn
@given(seeds, half_dtypes, dims, counts, st.booleans(), st.integers(-(2**63), 2**63 - 1))
def test_rows_are_rounded_to_the_cpus_bits(seed, dtype, dim, count, at_random, number):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-9, 6, (count, 1))).astype(np.float32)
    keys, number, version = rng.integers(0, 2**62, count), number if at_random else None, int(rng.integers(0, 2**40))
    expected = torch.empty(count, dim, dtype=dtype)
    cuda_ops.narrow_rows(torch.from_numpy(rows), expected, torch.from_numpy(keys), version, number)
    out = torch.empty(count, dim, dtype=dtype, device=DEVICE)
    assert half_update.narrow_rows(on_device(rows), out, on_device(keys), version, number) is out
    np.testing.assert_array_equal(as_bits(out), as_bits(expected))
    np.testing.assert_array_equal(host(half_update.widen_rows(out)), expected.float().numpy())


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "sparse_adam", "rowwise_adagrad"])
@drawn
@given(seeds, half_dtypes, dims, st.sampled_from([1, -0.25]), st.booleans(), st.booleans())
def test_steps_are_those_of_float32_rounded_once(optimizer, seed, dtype, dim, scale, at_random, half_grads):
    ours = HalfStore(np.random.default_rng(seed), half_update, optimizer, dtype, dim, DEVICE)
    hosts = HalfStore(np.random.default_rng(seed), cuda_ops, optimizer, dtype, dim)
    rng = np.random.default_rng(seed + 1)
    for t in range(1, 3):
        slots = torch.from_numpy(rng.permutation(ours.count)[: rng.integers(0, ours.count + 1)])
        grad = torch.from_numpy(rng.standard_normal((len(slots), dim))).to(dtype if half_grads else torch.float32)
        values, state = hosts.values[slots].double(), hosts.state[slots].double()
        exact, exact_state = torch_step(optimizer, values, state, scale * grad.double(), t)
        number = int(rng.integers(0, 2**62)) if at_random else None
        hosts.step(slots, grad, scale, t, seed=number)
        ours.step(slots.to(DEVICE), grad.to(DEVICE), scale, t, seed=number)
        torch.testing.assert_close(ours.state[slots.to(DEVICE)].cpu().double(), exact_state, rtol=1e-5, atol=1e-6)
        assert_half_neighbours(ours.values[slots.to(DEVICE)].cpu(), exact, dtype)
        same = ours.values.cpu() == hosts.values  # but where an ulp of float32 decides
        assert same.float().mean() >= 0.9 or same.sum() >= same.numel() - 1
        assert torch.equal(ours.steps.view(ours.count, -1)[:, -1].cpu(), hosts.steps.view(ours.count, -1)[:, -1])
        ours.words.copy_(hosts.words)  # so that such an ulp does not grow


def test_halves_are_gathered_and_scattered_as_they_are():
    for dtype in (torch.float16, torch.bfloat16):
        for dim in (7, 16):
            rng = np.random.default_rng()
            store = HalfStore(rng, half_update, "adagrad", dtype, dim, DEVICE)
            slots = on_device(rng.integers(0, store.count, 9))
            rows = gather(store.halves, 2 * store.stride, slots, width=dim)
            assert rows.dtype == dtype and torch.equal(rows, store.values[slots])
            new = torch.randn(store.count, dim, device=DEVICE).to(dtype)
            scatter(store.halves, 2 * store.stride, on_device(rng.permutation(store.count)), new, distinct=True)
            assert sorted(store.values.float().sum(1).tolist()) == sorted(new.float().sum(1).tolist())


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    store = HalfStore(np.random.default_rng(), half_update, "adagrad", torch.bfloat16, 3, DEVICE)
    before = store.words.clone()
    slots, grad = torch.arange(store.count, device=DEVICE), torch.ones(store.count, 3, device=DEVICE)
    where = (store.halves, store.words, store.stride, 3, store.steps)

    def call(*where, slots=slots, grad=grad, **rest):
        half_update.half_adagrad_update(*where, slots, grad, 0.1, 1e-8, 1.0, 1, **rest)

    with pytest.raises(IndexError, match=r"slots\[0\] is -1, which is not in"):
        call(*where, slots=slots - 1)
    with pytest.raises(TypeError, match="grad must be float32, got float64"):
        call(*where, grad=grad.double())
    with pytest.raises(ValueError, match="2 keys given for"):
        call(*where, slots=slots[:1], grad=grad[:1], keys=torch.arange(2, device=DEVICE))
    with pytest.raises(TypeError, match="halves must be float16 or bfloat16, got int16"):
        call(store.halves.view(torch.int16), *where[1:])
    with pytest.raises(ValueError, match="do not lie in a record"):
        call(store.halves, store.words, 4, *where[3:], slots=slots[:1], grad=grad[:1])
    assert torch.equal(store.words, before)
