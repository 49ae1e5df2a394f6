"""gather, scatter, expand and merge on the device, against NumPy's indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_ops import trusted
from cuda_ops.cuda.delta import delta, merge
from cuda_ops.cuda.rows import gather, scatter
from cuda_ops.cuda.segment import expand
from cuda_ops.cuda.steps import last_steps, mark_steps
from tests.cuda_ops.cuda.device import DEVICE, counts, dims, drawn, dtypes, host, make_store, on_device, seeds


@drawn
@given(seeds, dtypes, dims, counts, counts, st.booleans())
def test_gather_reads_any_words_of_any_records(seed, dtype, dim, count, n, with_positions):
    rng = np.random.default_rng(seed)
    words, stride, _, records = make_store(rng, count + 1, dim, dim, dtype)
    slots = rng.integers(0, count + 1, n)
    offset = int(rng.integers(0, stride)) if rng.integers(2) else 0
    width = int(rng.integers(1, stride - offset + 1))
    taken = records[slots, offset : offset + width]
    if not with_positions:
        np.testing.assert_array_equal(host(gather(words, stride, on_device(slots), offset=offset, width=width)), taken)
        return
    positions = rng.permutation(n + 5)[:n]
    expected = rng.standard_normal((n + 5, width)).astype(taken.dtype)
    out = on_device(expected)
    expected[positions] = taken
    assert gather(words, stride, on_device(slots), out, on_device(positions), offset) is out
    np.testing.assert_array_equal(host(out), expected)


@drawn
@given(seeds, dtypes, dims, counts, counts, st.booleans(), st.booleans())
def test_scatter_writes_those_words_and_the_last_of_repeated_slots(seed, dtype, dim, count, n, positioned, distinct):
    rng = np.random.default_rng(seed)
    words, stride, _, records = make_store(rng, count + 1, dim, dim, dtype)
    slots = rng.permutation(count + 1)[:n] if distinct else rng.integers(0, count + 1, n)
    n = len(slots)
    offset = int(rng.integers(0, stride)) if rng.integers(2) else 0
    width = int(rng.integers(1, stride - offset + 1))
    rows = rng.standard_normal((n + 3 if positioned else n, width)).astype(records.dtype)
    positions = rng.integers(0, n + 3, n) if positioned else None
    for i in range(n):
        records[slots[i], offset : offset + width] = rows[positions[i] if positioned else i]
    tensors = [None if array is None else on_device(array) for array in (slots, rows, positions)]
    scatter(words, stride, *tensors, offset=offset, distinct=distinct)
    np.testing.assert_array_equal(host(words).reshape(records.shape), records)


@drawn
@given(seeds, dtypes, dims, counts, counts, st.booleans())
def test_merge_adds_rows_in_order(seed, dtype, dim, count, n, distinct):
    rng = np.random.default_rng(seed)
    words, stride, _, records = make_store(rng, count + 1, dim, dim, dtype)
    slots = rng.permutation(count + 1)[:n] if distinct else rng.integers(0, (count + 3) // 3, n)
    offset = int(rng.integers(0, stride - dim)) if rng.integers(2) else 0
    rows = rng.standard_normal((len(slots), dim)).astype(records.dtype)
    for i, slot in enumerate(slots):
        records[slot, offset : offset + dim] += rows[i]
    merge(words, stride, on_device(slots), on_device(rows), offset=offset, distinct=distinct)
    np.testing.assert_array_equal(host(words).reshape(records.shape), records)


@drawn
@given(seeds, dtypes, dims, counts, counts)
def test_expand_and_delta(seed, dtype, dim, count, n):
    rng = np.random.default_rng(seed)
    slab = torch.randn(count + 1, dim, dtype=dtype, device=DEVICE)
    inverse = on_device(rng.integers(0, count + 1, n))
    rows = expand(slab, inverse)
    assert torch.equal(rows, slab[inverse])
    out = torch.empty_like(rows)
    assert expand(slab, inverse, out) is out and torch.equal(out, rows)
    base = torch.randn_like(rows)
    assert torch.equal(delta(rows, base), rows - base)


@drawn
@given(seeds, dtypes, counts, st.integers(-(2**63), 2**63 - 1))
def test_marks_those_records_and_nothing_else(seed, dtype, count, version):
    rng = np.random.default_rng(seed)
    words, stride, steps, records = make_store(rng, count + 1, 3, 3, dtype)
    expected = records.view(np.int64)
    slots = rng.permutation(count + 1)[: rng.integers(0, count + 2)]
    expected[slots, -1] = version
    mark_steps(steps, stride * dtype.itemsize, on_device(slots), version)
    np.testing.assert_array_equal(host(steps).reshape(expected.shape), expected)
    asked = on_device(rng.integers(0, count + 1, 30))
    np.testing.assert_array_equal(host(last_steps(steps, stride * dtype.itemsize, asked)), expected[host(asked), -1])


@pytest.mark.parametrize("bad", [-1, 2, -(2**63), 2**62])
def test_an_index_outside_is_an_error_before_anything_is_written(bad):
    words, stride, steps, records = make_store(np.random.default_rng(), 2, 3, 3, torch.float32)
    slots = on_device(np.array([1, bad, 0]))
    rows = torch.ones(3, 3, device=DEVICE)
    out = torch.zeros(3, 3, device=DEVICE)
    for call in (
        lambda: gather(words, stride, slots, out),
        lambda: scatter(words, stride, slots, rows),
        lambda: merge(words, stride, slots, rows),
        lambda: mark_steps(steps, 4 * stride, slots, 7),
    ):
        with pytest.raises(IndexError, match=rf"slots\[1\] is {bad}, which is not in \[0, 2\)"):
            call()
    with pytest.raises(IndexError, match=r"positions\[2\] is 3, which is not in \[0, 3\)"):
        gather(words, stride, on_device(np.array([0, 1, 0])), out, on_device(np.array([0, 1, 3])))
    np.testing.assert_array_equal(host(words).reshape(records.shape), records)
    assert not out.any()


def test_trusted_indices_are_not_checked_and_the_state_comes_back():
    words, stride, _, records = make_store(np.random.default_rng(), 4, 3, 3, torch.float64)
    right = on_device(np.array([3, 0]))
    with trusted():
        with trusted():
            assert torch.equal(gather(words, stride, right, width=3), on_device(records[[3, 0], :3]))
    with pytest.raises(IndexError):
        gather(words, stride, on_device(np.array([4])), width=3)


def test_arguments_that_do_not_fit():
    words, stride, _, _ = make_store(np.random.default_rng(), 2, 3, 3, torch.float32)
    slots = on_device(np.array([0, 1]))
    with pytest.raises(TypeError, match="slots must be int64, got int32"):
        gather(words, stride, slots.int(), width=2)
    with pytest.raises(ValueError, match="pass out"):
        gather(words, stride, slots)
    with pytest.raises(ValueError, match=r"do not lie in a record of"):
        gather(words, stride, slots, width=stride + 1)
    with pytest.raises(TypeError, match="rows must be float32, got float64"):
        scatter(words, stride, slots, torch.ones(2, 3, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="rows has 3 rows for 2 slots"):
        scatter(words, stride, slots, torch.ones(3, 3, device=DEVICE))
    with pytest.raises(ValueError, match="1 positions given for 2 slots"):
        scatter(words, stride, slots, torch.ones(3, 3, device=DEVICE), slots[:1])
    with pytest.raises(ValueError, match="delta has 1 rows for 2 slots"):
        merge(words, stride, slots, torch.ones(1, 3, device=DEVICE))
    with pytest.raises(TypeError, match="words must be float32, float64, float16 or bfloat16, got int64"):
        gather(words.long(), stride, slots, width=2)
    with pytest.raises(TypeError, match="words must be float32 or float64, got float16"):
        merge(words.half(), stride, slots, torch.ones(2, 3, dtype=torch.float16, device=DEVICE))
