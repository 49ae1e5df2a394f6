"""What all CUDA bodies share: how kernels are compiled and launched, and how rows are shared out among threads.

A block is `[lanes, rows]` threads: `lanes`, a power of two up to a warp, work on one row together, side by side in its
words, so that what a warp asks for at once lies in few and whole 32-byte sectors whatever the width of a row; threads
of other rows in the same warp hide the latency. Rows are taken in turns by a bounded grid. Fewer lanes, each with more
of the row, and smaller blocks may be faster: `tuning.py` measures that, where it is asked to.
"""

from __future__ import annotations

import functools
import types

import numpy as np
import torch
from numba import cuda
from numba.core import config

from cuda_ops.cuda import numpy_names
from cuda_ops.cuda.tuning import Shape, tuner_for
from cuda_ops.keeping import kept

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether kernels run on Numba's simulator, one Python thread for each of CUDA's."""

THREADS = 32 if SIMULATED else 256
"""Threads in a block."""

_WARP = 32
_MOST_BLOCKS = 2 if SIMULATED else 1 << 16
# Numba warns of grids of fewer, as of a GPU that is little used. Blocks without rows end at once.
_FEWEST_BLOCKS = 1 if SIMULATED else 128

kernel = cuda.jit if SIMULATED else kept(cuda.jit)
"""Decorator of kernels; what it compiles is kept on disk, as the CPU's are."""

helper = cuda.jit(device=True)
"""Decorator of functions that kernels call."""


def helper_from(cpu_function, **replaced):
    """Compile the source of a Numba function of the CPU as a helper, with the functions that it calls `replaced`."""
    source = cpu_function.py_func
    names = {} if SIMULATED else {"np": numpy_names, "max": numpy_names.larger, "min": numpy_names.smaller}
    return helper(types.FunctionType(source.__code__, {**source.__globals__, **names, **replaced}, source.__name__))


def launch(body, rows: int, pieces: int, *args, same_lanes: bool = False) -> None:
    """Run a kernel over `rows` rows, each of `pieces` accesses, on the current stream of the device of its tensors.

    Args:
        body: a kernel that takes row `blockIdx.x * blockDim.y + threadIdx.y` and every `gridDim.x * blockDim.y`-th
            after it, and of each row what lane `threadIdx.x` of `blockDim.x` is to do.
        rows: nothing is launched for none.
        pieces: how many lanes could be busy at once in a row.
        args: contiguous tensors, NumPy scalars (whose dtype is that of the kernel's argument), ints.
        same_lanes: whether the number of lanes decides in which order something is summed, and must not be tuned.
    """
    if not rows:
        return

    def run(shape):
        block = (shape.lanes, shape.threads // shape.lanes)
        _run(body, max(_FEWEST_BLOCKS, min(-(-rows // block[1]), _MOST_BLOCKS)), block, args)

    shapes = shapes_for(pieces, same_lanes)
    tuner = tuner_for(next(value.device for value in args if isinstance(value, torch.Tensor)))
    if tuner is None:
        run(shapes[0])
    else:
        tuner.launch(_kind_of_launch(body, rows, pieces), shapes, rows, run)


@functools.lru_cache(None)
def shapes_for(pieces: int, same_lanes: bool) -> tuple[Shape, ...]:
    """Return the shapes that a launch may have, the usual one first: a lane for each piece, up to a warp."""
    most = min(_WARP, 1 << max(0, pieces - 1).bit_length())
    lanes = [most] if same_lanes else [most >> k for k in range(3) if most >> k]
    return tuple(Shape(count, THREADS >> k) for count in lanes for k in range(3) if count <= THREADS >> k)


def _kind_of_launch(body, rows: int, pieces: int) -> str:
    """What the fastest shape depends on: the kernel and its constants, the width of a row, the magnitude of rows."""
    function = body.py_func
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    names = [str(getattr(value, "__name__", value)) for value in constants]
    return "/".join([function.__name__, *names, f"{pieces} pieces", f"2^{rows.bit_length()} rows"])


def _run(body, grid, block, args):
    if SIMULATED:
        body[grid, block](*(_simulated_view(value) for value in args))
        return
    device = next(value.device for value in args if isinstance(value, torch.Tensor))
    with torch.cuda.device(device):
        stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
        try:
            body[grid, block, stream](*(_device_view(value) for value in args))
        except Exception as error:
            why_not = missing_compiler()
            if why_not is None:
                raise
            raise ImportError(why_not) from error


def missing_compiler() -> str | None:
    """Say why Numba can compile for no GPU here, and what to install; None if it can."""
    try:
        cuda.compile_ptx(lambda: None, (), cc=(9, 0))
    except Exception as error:  # each version of Numba has another for a library that is not found
        reason = str(error).strip().partition("\n")[0]
        major = (torch.version.cuda or "13").partition(".")[0]
        return (
            f"Numba does not find CUDA's compiler ({type(error).__name__}: {reason}); "
            f"pip install 'numba-cuda[cu{major}]'"
        )
    return None


def _device_view(value):
    return cuda.as_cuda_array(value.detach(), sync=False) if isinstance(value, torch.Tensor) else value


def _simulated_view(value):
    # Given NumPy arrays, the simulator would copy them in and out, and records and their steps are the same memory.
    return cuda.devicearray.FakeCUDAArray(host_view(value)) if isinstance(value, torch.Tensor) else value


def host_view(value):
    """View a tensor in the CPU's memory as a NumPy array; return anything else as it is."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def like(words: torch.Tensor, *numbers: float) -> tuple[np.generic, ...]:
    """Return `numbers` as NumPy scalars of the dtype of `words`: kernels compute in it and in nothing wider."""
    kind = np.float32 if words.dtype == torch.float32 else np.float64
    return tuple(kind(number) for number in numbers)
