"""All kernels compile for a Hopper GPU, with 16-byte accesses where rows allow them, and nothing in local memory.

What the simulator runs is Python: a type that Numba cannot infer shows here alone. Skipped without CUDA's compiler.
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from cuda_ops.cpu.advance import LAYOUTS
from cuda_ops.cuda import half_update, index, init
from cuda_ops.cuda import launch as launching
from cuda_ops.cuda.advance import advance
from cuda_ops.cuda.bags import reduce_bags
from cuda_ops.cuda.delta import merge
from cuda_ops.cuda.launch import launch
from cuda_ops.cuda.renorm import renorm
from cuda_ops.cuda.rows import gather, scatter
from cuda_ops.cuda.segment import CHUNK, expand, segment_sum
from cuda_ops.cuda.sparse_update import rowwise_adagrad_update, sparse_adam_update
from cuda_ops.cuda.update import adagrad_update, sgd_update
from tests.cuda_ops.cuda.compiling import compiled_only, missing_libraries


@pytest.fixture
def compiled(monkeypatch):
    """A list that fills with (name, PTX) of what is launched."""
    why_not = missing_libraries()
    if why_not:
        pytest.skip(why_not)
    with compiled_only(monkeypatch) as ptx:
        yield ptx


def record_store(dim, dtype):
    """Nine records of 16-byte alignment, and gradients of four of them."""
    stride = 3 * dim + 8 // dtype.itemsize
    stride += -stride % (16 // dtype.itemsize)
    words = torch.zeros(9 * stride, dtype=dtype)
    return words, stride, words.view(torch.int64), torch.arange(4), torch.ones(4, dim, dtype=dtype)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 8), (torch.float64, 8), (torch.float32, 3)])
def test_rows_are_read_and_written_16_bytes_at_a_time_where_they_can_be(compiled, dtype, dim):
    words, stride, steps, slots, grad = record_store(dim, dtype)
    gather(words, stride, slots, width=dim)
    scatter(words, stride, slots, grad)
    expand(grad, slots)
    merge(words, stride, slots, grad)
    segment_sum(torch.ones(3 * CHUNK, dim, dtype=dtype), torch.zeros(3 * CHUNK, dtype=torch.int64), grad)
    sgd_update(words, stride, dim, steps, slots, grad, 0.1, 1, 3)
    adagrad_update(words, stride, dim, steps, slots, grad, 0.1, 1e-8, 1, 3)
    sparse_adam_update(words, stride, dim, steps, slots, grad, (0.9, 0.99), 0.1, 1e-8, 1, 3)
    rowwise_adagrad_update(words, stride, dim, steps, slots, grad, 0.1, 1e-8, 1, 3)
    assert len(compiled) == 10
    together = "v4.f32" if dtype == torch.float32 else "v2.f64"
    for name, ptx in compiled:
        assert (f"ld.global.{together}" in ptx) == (dim == 8), name
        assert (f"st.global.{together}" in ptx) == (dim == 8), name
        assert ".local" not in ptx and "atom." not in ptx, name


def test_limits_of_norms_and_initial_values_compile(compiled):
    rows, slots = torch.ones(4, 5), torch.arange(4)
    norms = (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0)
    for norm_type in norms:
        renorm(rows, 1.0, norm_type)
    init.fill_normal(rows, slots, 5, 6, 0.0, 1.0)
    init.fill_uniform(rows.double(), slots, 5, 6, 0.0, 1.0)
    assert len(compiled) == len(norms) + 2
    assert not any("atom." in ptx for _, ptx in compiled)
    assert not any(".local" in ptx for name, ptx in compiled if name == "fill")


def test_the_index_compiles(compiled):
    keys, entries = torch.arange(4), torch.full((32,), -1)
    for body, rest in ((index._find, [keys] * 2), (index._add, [keys] * 3), (index._remove, [keys] * 2)):
        launch(body, len(keys), 1, entries, 15, 16, *rest)
    launch(index._undo, len(keys), 1, entries, keys)
    with_swaps = {name for name, ptx in compiled if "atom." in ptx}
    assert with_swaps == {"_add", "_remove"} and len(compiled) == 4


@pytest.mark.parametrize("kind", ["sgd", "sgd_momentum", "amsgrad", "rmsprop_centered_momentum", "adadelta"])
def test_steps_that_rows_missed_are_made_in_registers(compiled, kind):
    parts, columns = LAYOUTS[kind]
    for dim in (8, 3, 8):
        stride = dim * (1 + parts) + 4
        stride += -stride % 4
        words = torch.zeros(9 * stride)
        scalars = torch.zeros(3, columns, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
        grad = torch.ones(4, dim)
        advance(kind, words, stride, dim, words.view(torch.int64), torch.arange(4), grad, *scalars, 1.0, 3)
    for (name, ptx), together in zip(compiled, (True, False, True), strict=True):
        assert ("ld.global.v4.f32" in ptx) == ("st.global.v4.f32" in ptx) == together, name
        assert ".local" not in ptx and "atom." not in ptx and "bar.sync" not in ptx, name
        assert "vote.sync" in ptx, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_stepped_and_rounded_in_registers(compiled, dtype):
    for at_random in (None, 7):
        for dim in (8, 5):
            stride = (dim + 1) // 2 + 2 * dim + 2
            stride += -stride % 4
            words, slots, grad = torch.zeros(9 * stride), torch.arange(4), torch.ones(4, dim)
            where = (words.view(dtype), words, stride, dim, words.view(torch.int64), slots, grad)
            half_update.half_sgd_update(*where, 0.1, 1.0, 3, seed=at_random)
            half_update.half_sparse_adam_update(*where, (0.9, 0.99), 0.1, 1e-8, 1.0, 3, seed=at_random)
            half_update.half_rowwise_adagrad_update(*where, 0.1, 1e-8, 1.0, 3, seed=at_random)
            for name, ptx in compiled[-3:]:
                assert ("ld.global.v4.f32" in ptx) == (dim == 8), name
                assert ".local" not in ptx and "atom." not in ptx, name
    half_update.narrow_rows(grad, torch.empty(4, 5, dtype=dtype), seed=7)
    assert ".local" not in compiled[-1][1]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_reduced_in_registers(compiled, mode):
    lookups, offsets = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 2, 2])
    for dim in (8, 3):
        reduce_bags(torch.ones(4, dim), lookups, offsets, mode, torch.ones(6) if mode == "sum" else None)
        name, ptx = compiled[-1]
        assert ("ld.global.v4.f32" in ptx) == (dim == 8 and mode != "max"), name
        assert ".local" not in ptx and "atom." not in ptx, name


@pytest.fixture
def launched(monkeypatch):
    """What a launch comes to where there is no driver: body, (grid, block, stream) and tensors, as Numba gets them."""
    if launching.SIMULATED:
        pytest.skip("the simulator is launched in another way")
    calls = []

    class Body:
        def __getitem__(self, where):
            return lambda *args: calls.append((where, args))

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=40))
    monkeypatch.setattr(launching.cuda, "external_stream", lambda handle: f"stream {handle}")
    monkeypatch.setattr(launching, "_device_view", lambda value: value)
    return Body(), calls


@pytest.mark.parametrize(("rows", "blocks"), [(1, 128), (32 * 128 + 1, 129), (10**9, 1 << 16)])
def test_grids_are_large_enough_for_no_warning_of_numbas_and_small_enough_for_a_launch(launched, rows, blocks):
    body, calls = launched
    launch(body, rows, 8, torch.ones(1), 3)
    assert calls == [((blocks, (8, 32), "stream 40"), (torch.ones(1), 3))]


def test_without_cudas_compiler_a_launch_says_what_to_install(launched, monkeypatch):
    body, _ = launched

    def fail(*args, **kwargs):
        raise RuntimeError("no libnvvm\nin 20 places")

    monkeypatch.setattr(type(body), "__getitem__", fail)
    monkeypatch.setattr(launching.cuda, "compile_ptx", fail)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ImportError, match=r"CUDA's compiler \(RuntimeError: no libnvvm\); .*'numba-cuda\[cu12\]'"):
        launch(body, 1, 8, torch.ones(1), 3)
    monkeypatch.setattr(launching.cuda, "compile_ptx", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="in 20 places"):
        launch(body, 1, 8, torch.ones(1), 3)
