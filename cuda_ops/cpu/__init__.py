"""CPU bodies of the functions of `cuda_ops`, one subject a file, written in Numba.

Each file holds public functions and private kernels (loops on arrays, compiled to run without the
interpreter's lock, and cached on disk). The functions check shapes, dtypes and bounds before a kernel runs,
because a kernel does not: a wrong index would write into other memory. Numba compiles a kernel anew for
arrays that are strided, read-only or misaligned; the functions therefore bring every input into one form
first. A cached kernel does not notice that a helper from another file has changed: after editing
`kernels.py`, delete `__pycache__`. Imports NumPy, Numba and llvmlite. Read `kernels.py` first.
"""
