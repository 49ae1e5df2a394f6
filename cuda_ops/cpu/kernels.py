"""What all kernels share: how they are compiled, a hash, a memory prefetch and a bounds check."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_ops.keeping import kept

# NumPy's error model leaves out the test for division by zero, which would keep a loop from being vectorised.
kernel = kept(njit(nogil=True, error_model="numpy"))
# A product and a sum may be rounded once together, as PyTorch's own vectorised loops do: the same bits
# result.
fused_kernel = kept(njit(nogil=True, error_model="numpy", fastmath={"contract"}))
# For what takes less time than to give the interpreter's lock to a thread that waits and to get it back.
short_kernel = kept(njit(error_model="numpy"))
# For small helpers that exist only inside kernels: they are compiled into each, and not kept on their own.
helper = njit(nogil=True, error_model="numpy")
# The same for helpers of many arguments, which LLVM would call: an array has seven words and a count of references.
inlined = njit(nogil=True, error_model="numpy", forceinline=True)

_CACHE_LINE_BYTES = 64
# How many records ahead of the one in work memory is asked for the next: enough to cover a miss of the page
# table too. (Of 16, 32 and 64, the middle one: gather of cold rows of 1, 16 and 64 floats took 11, 13 and 14 ns with
# 16, 6, 8 and 14 with 32, 4.5, 5 and 14.5 with 64, where warm rows of 128 floats took longer than with 16.)
ROWS_AHEAD = 32
# Lines to ask for at the beginning of each record; the processor's own stream prefetch follows from there,
# and more would push out of the first cache what is about to be used.
_TOUCHED_LINES = 8


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]` (contiguous array, int64 index) without waiting for it."""
    signature = types.void(array, types.int64)

    def generate(context, builder, signature, args):
        proxy = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
        address = builder.gep(proxy.data, [args[1]])
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        # llvm.prefetch(address, read = 0, locality: every level = 3, data cache = 1)
        builder.call(function, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch_address(typing_context, address):
    """Ask for the cache line at `address` (int64) without waiting for it; it need not be one that can be read."""
    signature = types.void(types.int64)

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, word(0), word(3), word(1)])  # read, at every level, of the data cache
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def part(typing_context, array, begin, count):
    """A one-dimensional view of `array` (contiguous, of any shape), without a claim to its memory.

    Slices count references, with atomic operations, at their birth, at their end, and in each helper that is given one:
    for a row of a few words that takes longer than all else. A view must not leave the kernel that makes it, and must
    be of an array that the kernel was given: what a kernel has made itself is freed after its name's last mention.
    """
    view_type = types.Array(array.dtype, 1, "C")

    def generate(context, builder, signature, args):
        source = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
        view = context.make_array(view_type)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(array.dtype)))
        data = builder.gep(source.data, [args[1]])
        context.populate_array(view, data=data, shape=[args[2]], strides=[itemsize], itemsize=itemsize, meminfo=None)
        return view._getvalue()

    return view_type(array, types.int64, types.int64), generate


@intrinsic
def unowned(typing_context, array):
    """The same array without a claim to its memory, as `part`."""

    def generate(context, builder, signature, args):
        view = context.make_array(signature.return_type)(context, builder, args[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return array(array), generate


@intrinsic(prefer_literal=True)
def own_row(typing_context, matrix, row, columns):
    """A copy of one row of `matrix` (contiguous), as a matrix of that row; `columns` must be a constant. Of a row below
    0 there is nothing, and what the copy has must not be read.

    Nothing else can write where it lies, so that what a loop reads of it is read once, into registers. It must not
    leave the kernel that makes it, nor be made in a loop.
    """
    view_type = types.Array(matrix.dtype, 2, "C")
    count = columns.literal_value

    def generate(context, builder, signature, args):
        source = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
        item = context.get_data_type(matrix.dtype)
        word = context.get_value_type(types.intp)
        data = cgutils.alloca_once(builder, item, size=count)
        first = builder.mul(args[1], word(count))
        with builder.if_then(builder.icmp_signed(">=", args[1], word(0))):
            for k in range(count):
                value = builder.load(builder.gep(source.data, [builder.add(first, word(k))]))
                builder.store(value, builder.gep(data, [word(k)]))
        view = context.make_array(view_type)(context, builder)
        bytes_each = context.get_abi_sizeof(item)
        shape, strides = [word(1), word(count)], [word(count * bytes_each), word(bytes_each)]
        context.populate_array(view, data=data, shape=shape, strides=strides, itemsize=word(bytes_each), meminfo=None)
        return view._getvalue()

    return view_type(matrix, types.int64, columns), generate


@helper
def mix(key):
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): int64 key to a well mixed uint64."""
    bits = np.uint64(key)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@helper
def touch(words, begin, count):
    """Prefetch the first cache lines of `words[begin : begin + count]`; `words` of 4 or 8 bytes.

    Without divisions, which took longer than the copy of a short row (an array's itemsize is no constant to Numba).
    """
    line_words = _CACHE_LINE_BYTES >> (2 + (words.itemsize >> 3))
    _touch_up_to(words, begin, min(count, _TOUCHED_LINES * line_words) - 1, line_words)


@helper
def touch_all(words, begin, count):
    """As `touch`, of every line: for kernels whose arithmetic leaves the first cache the time to take them in."""
    _touch_up_to(words, begin, count - 1, _CACHE_LINE_BYTES >> (2 + (words.itemsize >> 3)))


@helper
def _touch_up_to(words, begin, last, line_words):
    prefetch(words, begin)
    word = line_words
    while word < last:
        prefetch(words, begin + word)
        word += line_words
    if last > 0:
        prefetch(words, begin + last)


@kernel
def first_outside(indices, bound):
    """Position of the first of `indices` (int64 vector) that is not in [0, bound); -1 if there is none."""
    limit = np.uint64(bound)
    outside = False
    for i in range(indices.size):
        outside |= np.uint64(indices[i]) >= limit
    if outside:
        for i in range(indices.size):
            if np.uint64(indices[i]) >= limit:
                return i
    return -1
