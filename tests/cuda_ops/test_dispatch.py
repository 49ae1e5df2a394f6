"""One name per function, for NumPy arrays and torch tensors; what is compiled once is not compiled again."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import cuda_ops
import cuda_ops.init
from cuda_ops.dispatch import by_device


def test_tensors_give_tensors_and_arrays_give_arrays():
    slab = np.random.default_rng().standard_normal((4, 3))
    inverse = np.array([3, 0, 0, 2, 1])
    from_arrays = cuda_ops.expand(slab, inverse)
    from_tensors = cuda_ops.expand(torch.from_numpy(slab), torch.from_numpy(inverse))
    assert type(from_arrays) is np.ndarray
    assert torch.equal(from_tensors, torch.from_numpy(from_arrays))


def test_every_part_of_a_result_is_converted():
    parts = cuda_ops.dedup_counts(torch.tensor([5, 7, 5]))
    assert [part.tolist() for part in parts] == [[5, 7], [0, 1, 0], [2, 1]]
    assert all(isinstance(part, torch.Tensor) for part in parts)


def test_a_tensor_is_written_in_place_and_may_be_a_parameter():
    rows = torch.nn.Parameter(torch.full((2, 4), 3.0))
    changed = cuda_ops.renorm(rows, max_norm=1.0)
    assert changed.tolist() == [True, True]
    torch.testing.assert_close(rows.detach().norm(dim=1), torch.ones(2))


def test_arrays_and_tensors_mix_also_by_keyword():
    out = torch.zeros(2, 3)
    words = np.arange(12, dtype=np.float32)
    cuda_ops.gather(words, 6, np.array([1, 0]), out=out, offset=1)
    assert out.tolist() == [[7, 8, 9], [1, 2, 3]]


def test_another_device_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"cuda_ops\.expand has no body for device meta"):
        cuda_ops.expand(torch.empty(2, 2, device="meta"), np.zeros(1, np.int64))
    with pytest.raises(NotImplementedError, match=r"KeyIndex\.find"):
        cuda_ops.KeyIndex().find(torch.empty(2, dtype=torch.int64, device="meta"))


def test_dispatch_keeps_name_and_docstring():
    assert cuda_ops.gather.__name__ == "gather"
    assert "Args:" in cuda_ops.gather.__doc__


def test_other_arguments_pass_through():
    call = by_device(lambda value, *, option: (value, option))
    scratch = cuda_ops.DedupScratch()
    assert call(scratch, option="x") == (scratch, "x")
    assert call(1, option=None) == (1, None)


def test_unusual_arrays_do_not_compile_a_kernel_again():
    from cuda_ops.cpu.segment import _expand

    slab = np.ones((4, 2))
    inverse = np.array([0, 1, 2, 3])
    expected = cuda_ops.expand(slab, inverse)
    compiled = len(_expand.signatures)
    read_only = slab.copy()
    read_only.flags.writeable = False
    misaligned = np.frombuffer(b"x" + slab.tobytes(), np.float64, offset=1).reshape(4, 2)
    strided = np.repeat(slab, 2, axis=0)[::2]
    for unusual in (read_only, misaligned, strided, np.asfortranarray(slab)):
        np.testing.assert_array_equal(cuda_ops.expand(unusual, inverse), expected)
    assert len(_expand.signatures) == compiled


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    program = (
        "import numpy as np, cuda_ops\n"
        "from cuda_ops.cpu.dedup import _dedup\n"
        "cuda_ops.dedup(np.arange(3))\n"
        "print(sum(_dedup.stats.cache_hits.values()), sum(_dedup.stats.cache_misses.values()))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]]


def test_each_cuda_body_is_found_by_name_and_takes_the_cpus_arguments():
    from cuda_ops.dispatch import cuda_body

    with_bodies = []
    for name in (*cuda_ops.__all__, "fill_uniform", "fill_normal", "fill_trunc_normal"):
        function = getattr(cuda_ops if hasattr(cuda_ops, name) else cuda_ops.init, name)
        cpu_body = getattr(function, "__wrapped__", None)
        if cpu_body is None:
            continue
        try:
            body = cuda_body(cpu_body)
        except NotImplementedError:
            continue
        with_bodies.append(name)
        assert list(inspect.signature(body).parameters) == list(inspect.signature(cpu_body).parameters), name
    assert {"gather", "scatter", "expand", "segment_sum", "dedup", "adagrad_update", "merge"} <= set(with_bodies)


def test_a_function_without_a_cuda_body_says_so():
    from cuda_ops.dispatch import cuda_body

    with pytest.raises(NotImplementedError, match=r"cuda_ops\.alias_table has no body for CUDA devices yet"):
        cuda_body(cuda_ops.alias_table.__wrapped__)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'numba.cuda'", name="numba.cuda"),
        AttributeError("module 'numba.cuda.types' has no attribute 'NPDatetime'", name="NPDatetime"),
    ],
)
def test_without_numbas_cuda_target_the_error_says_what_to_install(monkeypatch, error):
    from cuda_ops import dispatch

    def fail(name):
        raise error

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=rf"{error}\); pip install --upgrade 'adaloader\[cuda\]'"):
        dispatch.cuda_body.__wrapped__(cuda_ops.gather.__wrapped__)


def test_arrays_of_one_call_must_be_on_one_device():
    from cuda_ops.dispatch import refuse_several_devices

    meta, array = torch.empty(2, device="meta"), np.zeros(1)
    with pytest.raises(ValueError, match=r"cuda_ops\.gather got arrays on cpu \(NumPy\), meta; move them"):
        refuse_several_devices((meta, 3), {"slots": array}, "gather")
    refuse_several_devices((meta, None), {"slots": meta, "offset": 1}, "gather")
