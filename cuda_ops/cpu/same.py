"""Whether a lookup's ids are those that were expected: what is asked at each lookup, in one call."""

from cuda_ops.cpu.kernels import short_kernel


@short_kernel
def same_ids(expected, ids):
    """Return whether two vectors of int64 have the same numbers, in the same order.

    Reads 16 n bytes, without a temporary; `ids` may be a column of a matrix. Nothing is checked or copied, for a lookup
    of few ids takes no longer than such checks do.

    Args:
        expected: [n] int64, contiguous.
        ids: [m] int64, with any stride.
    """
    if expected.size != ids.size:
        return False
    different = 0
    for i in range(expected.size):
        different |= expected[i] ^ ids[i]
    return different == 0
