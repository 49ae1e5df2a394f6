"""Accesses of 16 bytes, and when they are possible.

Kernels are made twice from one source: for `width` words of 16 bytes together, and for single words. They work on
`width` words at a time in small local arrays, which the compiler keeps in registers, and `move` them there and back.
"""

from __future__ import annotations

import torch
from numba import types

from cuda_ops.cuda.launch import SIMULATED

_ACCESS_BYTES = 16


def widest(words: torch.Tensor, *counts: int, others: tuple[torch.Tensor, ...] = ()) -> int:
    """Return how many words of `words` can be accessed at once: those of 16 bytes, or 1.

    Args:
        words: tensor that is accessed at multiples of the `counts`.
        counts: widths, strides and offsets, in words, that take part in addresses.
        others: further tensors of the same dtype that are accessed so.
    """
    width = _ACCESS_BYTES // words.itemsize
    aligned = all(tensor.data_ptr() % _ACCESS_BYTES == 0 for tensor in (words, *others))
    return width if aligned and all(count % width == 0 for count in counts) else 1


def pieces(count: int, width: int) -> int:
    """Return how many accesses of `width` words `count` words take."""
    return -(-count // width)


if SIMULATED:

    def move(target, to, source, at, width):
        """Copy words [at, at + width) of `source` to `to` of `target`, in one access of 16 bytes where width is not 1.

        Both are vectors of one dtype, in device memory or local. With `width` above 1 it is the number of words in 16
        bytes, and both addresses must be multiples of that. A kernel has it as a constant.
        """
        for k in range(width):
            target[to + k] = source[at + k]

else:
    from llvmlite import ir
    from numba.core import cgutils
    from numba.cuda.extending import intrinsic

    def _words_at(context, builder, array_type, array, index, width):
        """Pointer to `width` words at `index` of an array, as one vector."""
        base = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
        return builder.bitcast(builder.gep(base, [index]), ir.VectorType(base.type.pointee, width).as_pointer())

    @intrinsic
    def move(typing_context, target, to, source, at, width):
        """As the simulator's."""
        count = getattr(width, "literal_value", None)
        if count is None:  # Numba asks for any integer first, and for this constant then
            return None
        # With the constant in its type: Numba keeps one body per signature, and would use one width's for another.
        signature = types.void(target, types.int64, source, types.int64, width)

        def generate(context, builder, signature, args):
            alignment = count * signature.args[0].dtype.bitwidth // 8
            value = builder.load(
                _words_at(context, builder, signature.args[2], args[2], args[3], count), align=alignment
            )
            builder.store(
                value, _words_at(context, builder, signature.args[0], args[0], args[1], count), align=alignment
            )
            return context.get_dummy_value()

        return signature, generate
