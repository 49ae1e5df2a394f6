"""CUDA bodies of the functions of `cuda_ops`, one subject a file, written in Numba's CUDA.

Each file has the functions of the file of its name in `cuda_ops/cpu`, with the same contract, for torch tensors on one
CUDA device. Nothing is copied: kernels get views of the tensors' memory and run on torch's current stream, so they come
in order with torch's own operations. Nothing here uses atomic additions of floating-point numbers: the same arguments
give the same bits every time.

A wrong index raises before anything is written, as on the CPU, which needs the host to wait for the device;
`cuda_ops.trusted` leaves that out where indices are known to be right. Rows are read and written 16 bytes at a time by
a warp or a part of one where the base address, the record and the row are multiples of 16 bytes (a device store pads
its records to that), and word by word where not.

Imported only when a CUDA tensor arrives (`dispatch.py`). With NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is
imported, the same kernels run on Numba's simulator, on tensors in the CPU's memory. Imports NumPy, Numba, torch, and of
`cuda_ops/cpu` what is arithmetic of one element. Read `launch.py` first, then `rows.py`.
"""
