"""Where the lanes of one row meet: a vote, which is also a barrier for them.

The lanes of a row lie side by side in one warp (launch.py), so that they need not wait for the rest of the block: each
row may take as many turns as it needs, as long as all its lanes take the same ones.
"""

from __future__ import annotations

import threading

from numba import cuda

from cuda_ops.cuda.launch import SIMULATED, helper

if SIMULATED:
    # The simulator has barriers of blocks, but none of parts of a warp. It runs one block at a time.
    _LONGEST_WAIT_SECONDS = 300
    _meetings: dict[tuple[int, int], tuple[threading.Barrier, list[bool]]] = {}

    def row_any(flag, lane, row, lanes):
        """Return whether `flag` is true on any lane of a row; all its lanes call it, and go on together.

        What they wrote to memory before is seen by the others after.

        Args:
            flag: bool.
            lane, row: threadIdx.x and .y.
            lanes: blockDim.x, a power of two up to a warp.
        """
        if lanes == 1:
            return bool(flag)
        barrier, flags = _meetings.setdefault((lanes, row), (threading.Barrier(lanes), [False] * lanes))
        flags[lane] = bool(flag)
        try:
            barrier.wait(_LONGEST_WAIT_SECONDS)
            result = any(flags)
            barrier.wait(_LONGEST_WAIT_SECONDS)
        except threading.BrokenBarrierError:
            _meetings.pop((lanes, row), None)
            raise
        return result

else:

    @helper
    def row_any(flag, lane, row, lanes):
        """As the simulator's."""
        if lanes == 32:
            mask = 0xFFFFFFFF
        else:
            mask = ((1 << lanes) - 1) << ((row * lanes) & 31)
        result = cuda.any_sync(mask, flag)
        cuda.syncwarp(mask)
        return result
