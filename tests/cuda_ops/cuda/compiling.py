"""Compile kernels for a GPU that is not there: needs CUDA's compiler libraries (numba-cuda[cu13]), and no driver."""

import contextlib
from types import SimpleNamespace

from numba import cuda, typeof

from cuda_ops.cuda import launch as launching

HOPPER = (9, 0)


def missing_libraries():
    """Say why nothing can be compiled here; None if it can."""
    if launching.SIMULATED:
        return "the simulator does not compile"
    return launching.missing_compiler()


@contextlib.contextmanager
def compiled_only(monkeypatch):
    """Compile what would be launched, with the types of its arguments; give a list of (name, PTX) of each."""
    from numba.cuda import dispatcher

    compiled = []

    def compile_in_place_of_running(body, grid, block, args):
        signature = tuple(typeof(launching.host_view(value)) for value in args)
        ptx, _ = cuda.compile_ptx(body.py_func, signature, cc=HOPPER)
        compiled.append((body.py_func.__name__, ptx))

    with monkeypatch.context() as patch:
        patch.setattr(launching, "_run", compile_in_place_of_running)
        patch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=HOPPER))
        yield compiled
