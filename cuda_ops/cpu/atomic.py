"""Words that several processes change: a lock in the last word of each record, and the state of each row.

The last-step word of a record (see `steps.py`) is negative while somebody changes the record. An atomic exchange takes
it, and storing the number of the step gives it back: no other word, and no other line of the cache, is needed.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_ops.cpu.kernels import helper

_LOCKED = -(1 << 63)
_NUMBER = (1 << 63) - 1
# Some 20 microseconds: a record is changed in a fraction of one, unless whoever does it has lost its processor.
_MOST_TRIALS = 1000


def _address(context, builder, signature, args):
    """Return where the word is that an array and an index, the first arguments of an intrinsic, name."""
    proxy = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
    return builder.gep(proxy.data, [args[1]])


@intrinsic
def compare_and_swap(typing_context, array, index, expected, new):
    """Set `array[index]` (contiguous, of integers) to `new` if it is `expected`, at once; return what it was."""
    signature = array.dtype(array, types.uint64, array.dtype, array.dtype)

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature, args)
        pair = builder.cmpxchg(address, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)

    return signature, generate


@intrinsic
def add_at_once(typing_context, array, index, number):
    """Add `number` to `array[index]` (contiguous, of integers), at once; return what it was."""
    signature = array.dtype(array, types.uint64, array.dtype)

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _address(context, builder, signature, args), args[2], "acq_rel")

    return signature, generate


@intrinsic
def store_last(typing_context, array, index, value):
    """Set `array[index]` (contiguous, of integers) to `value`: whoever sees it sees all that was written before."""
    signature = types.void(array, types.uint64, array.dtype)

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature, args)
        builder.store_atomic(args[2], address, "release", signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def load_first(typing_context, array, index):
    """Return `array[index]` (contiguous, of integers): what its writer had written before is seen from now on."""
    signature = array.dtype(array, types.uint64)

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature, args)
        return builder.load_atomic(address, "acquire", signature.args[0].dtype.bitwidth // 8)

    return signature, generate


@helper
def lock_record(steps, last):
    """Take the record whose last-step word is `steps[last]` (`last` a uint64); return False if another has it for
    long."""
    expected = steps[last] & _NUMBER
    for _ in range(_MOST_TRIALS):
        seen = compare_and_swap(steps, last, expected, expected | _LOCKED)
        if seen == expected:
            return True
        expected = seen & _NUMBER
    return False


@helper
def unlock_record(steps, last, version):
    """Give back a record that `lock_record` has taken, last changed by step `version`."""
    store_last(steps, last, version)
