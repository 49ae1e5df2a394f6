"""Arrays that consist of segments, one after the other, each of which belongs to another table or lookup: in one call
what would take one call for each.
"""

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from cuda_ops.cpu.checks import int_vector, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, prefetch_address, short_kernel


def keys_of_segments(ids, ends, bases, bounds, keys):
    """Make ids of several tables distinct: keys[i] = ids[i] + bases[s], s being the segment of i.

    Args:
        ids: [n] int64.
        ends: [S] int64, ascending: segment s is ids[ends[s - 1] : ends[s]]; the last is n.
        bases: [S] int64.
        bounds: [S] int64: ids of segment s must be in [0, bounds[s]).
        keys: [n] int64, overwritten.

    Returns:
        The position of the first id that is out of bounds, from which on `keys` holds nothing; -1 if there is none.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    ids, ends = int_vector(ids, "ids"), _ends(ends, ids.size)
    bases, bounds = int_vector(bases, "bases"), int_vector(bounds, "bounds")
    if not bases.size == bounds.size == ends.size:
        raise ValueError(f"{ends.size} segments with {bases.size} bases and {bounds.size} bounds")
    return _keys_of_segments(ids, ends, bases, bounds, writable(keys, "keys", np.int64, ids.shape))


def sum_segments(addresses, layouts, ends, positions, skips, out, seen=None):
    """Sum gradients of several lookups per row: out[u] = sum of the gradients of i where positions[i] == u, or zero.

    Each segment is summed as by `segment_sum`, in the same order; a row's sums are added up from the last segment's to
    the first's, as autograd adds up what lookups that are made by themselves give: the same bits. Gradients are in as
    many places of memory as there are segments. Moves (n + 2 * U) * dim * itemsize bytes or less where a row is in one
    segment, thrice that where it is in several.

    Args:
        addresses: [S] int64: of segment s the address of the first gradient, whose `dim` words (dtype of `out`) are
            next to each other; 0 if it has none. The memory is the caller's to keep.
        layouts: [S, 3] int64: words from one gradient of segment s to the next; how many follow each other so, as a
            group (0 for all); words from the first of a group to the first of the next.
        ends: [S] int64, ascending: segment s has positions[ends[s - 1] : ends[s]]; the last is n.
        positions: [n] int64 in [0, U).
        skips: [S] int64: gradients of segment s whose position is this are left out (padding); -1 for none.
        out: [U, dim] float32 or float64, overwritten.
        seen: [2 * U] int64 to work with, if a row may be in several segments; `out` is [2 * U, dim] then, of which the
            second half is to work with too.

    Raises:
        IndexError: a position is outside `out`, which then holds no result.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    positions, ends = int_vector(positions, "positions"), _ends(ends, positions.size)
    addresses, skips = int_vector(addresses, "addresses"), int_vector(skips, "skips")
    if not addresses.size == skips.size == ends.size:
        raise ValueError(f"{ends.size} segments with {addresses.size} addresses and {skips.size} skips")
    layouts = int_vector(layouts.reshape(-1), "layouts")
    if layouts.size != 3 * ends.size:
        raise ValueError(f"{ends.size} segments with {layouts.size} numbers of layouts, 3 for each expected")
    if out.dtype not in (np.float32, np.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    writable(out, "out", out.dtype, (len(out), out.shape[-1]))
    rows = len(out)
    if seen is None:
        position = _sum_segments(addresses, layouts, ends, positions, skips, out)
    else:
        rows //= 2
        seen = writable(seen, "seen", np.int64, (2 * rows,))
        position = _sum_segments_apart(addresses, layouts, ends, positions, skips, out, seen)
    if position >= 0:
        raise IndexError(f"positions[{position}] is {positions[position]}, which is not in [0, {rows})")


def _ends(ends, count):
    ends = int_vector(ends, "ends")
    if not _ascend(ends, count):
        raise ValueError(f"ends must ascend from 0 or more to {count}, got {ends}")
    return ends


# NumPy takes four calls for this: 40 us where a model's dense part has left none of their code in the caches.
@short_kernel
def _ascend(ends, count):
    """Whether segments end at `ends` (int64 [S]), none before it begins, and the last at `count`."""
    last = 0
    for end in ends:
        if end < last:
            return False
        last = end
    return last == count


@intrinsic
def _word(typing_context, address, index, like):
    """The word at `index` (uint64) of those at `address` (int64), of the dtype of the array `like`."""
    signature = like.dtype(address, index, like)

    def generate(context, builder, signature, args):
        word = context.get_value_type(signature.return_type)
        pointer = builder.inttoptr(args[0], ir.PointerType(word))
        return builder.load(builder.gep(pointer, [args[1]]))

    return signature, generate


@kernel
def _keys_of_segments(ids, ends, bases, bounds, keys):
    begin = 0
    for segment in range(ends.size):
        base = bases[segment]
        bound = np.uint64(bounds[segment])
        for i in range(begin, ends[segment]):
            if np.uint64(ids[i]) >= bound:
                return i
            keys[i] = ids[i] + base
        begin = ends[segment]
    return -1


@kernel
def _sum_segments(addresses, layouts, ends, positions, skips, out):
    rows, dim = out.shape
    flat = out.reshape(-1)
    flat[:] = 0
    itemsize = flat.itemsize
    begin = 0
    for segment in range(ends.size):
        end, address, skip = ends[segment], addresses[segment], skips[segment]
        stride, group, group_stride = layouts[3 * segment], layouts[3 * segment + 1], layouts[3 * segment + 2]
        if group <= 0:
            group = end - begin
        groups_ahead = ROWS_AHEAD // group if group > 0 else 0
        bytes_ahead = itemsize * (groups_ahead * group_stride if groups_ahead > 0 else ROWS_AHEAD * stride)
        if address != 0:
            first = begin
            while first < end:
                for i in range(first, min(first + group, end)):
                    # The slices of one tensor lie far apart from row to row, where the processor fetches nothing by
                    # itself: 26 of 1,024 rows of 16 floats took 0.28 ms without this, 0.08 with it.
                    prefetch_address(address + (i - first) * stride * itemsize + bytes_ahead)
                    position = positions[i]
                    if position == skip:
                        continue
                    if np.uint64(position) >= np.uint64(rows):
                        return i
                    source = np.uint64((i - first) * stride)
                    target = np.uint64(position * dim)
                    for j in range(dim):
                        flat[target + np.uint64(j)] += _word(address, source + np.uint64(j), flat)
                first += group
                address += group_stride * itemsize
        begin = end
    return -1


@kernel
def _sum_segments_apart(addresses, layouts, ends, positions, skips, out, seen):
    """As `_sum_segments`, where a row may be in several segments.

    The sum of the last segment that a row is in is made in the row's place of `out`, that of each before it in its
    place of the second half, from where it is added to the first when the segment is at its end. seen[u] is 0 until a
    segment has row u, and then s + 1 if segment s was the last to have it, -(s + 1) while it adds to the second half;
    the rows of which it does so are listed in the second half of `seen`.
    """
    rows, dim = seen.size // 2, out.shape[1]
    flat = out.reshape(-1)
    flat[:] = 0
    seen[:rows] = 0
    itemsize = flat.itemsize
    for segment in range(ends.size - 1, -1, -1):
        begin = ends[segment - 1] if segment > 0 else 0
        end, address, skip = ends[segment], addresses[segment], skips[segment]
        stride, group, group_stride = layouts[3 * segment], layouts[3 * segment + 1], layouts[3 * segment + 2]
        if address == 0:
            continue
        if group <= 0:
            group = end - begin
        groups_ahead = ROWS_AHEAD // group if group > 0 else 0
        bytes_ahead = itemsize * (groups_ahead * group_stride if groups_ahead > 0 else ROWS_AHEAD * stride)
        mark, listed = segment + 1, rows
        first = begin
        while first < end:
            for i in range(first, min(first + group, end)):
                prefetch_address(address + (i - first) * stride * itemsize + bytes_ahead)
                position = positions[i]
                if position == skip:
                    continue
                if np.uint64(position) >= np.uint64(rows):
                    return i
                # Nothing could predict a branch for each case: 26 lookups of one table took 0.19 ms so, 0.15 without.
                before = seen[position]
                is_apart = (before != 0) & (before != mark)
                if is_apart & (before != -mark):
                    seen[listed] = position
                    listed += 1
                seen[position] = -mark if is_apart else mark
                source, target = np.uint64((i - first) * stride), np.uint64((position + rows * is_apart) * dim)
                for j in range(dim):
                    flat[target + np.uint64(j)] += _word(address, source + np.uint64(j), flat)
            first += group
            address += group_stride * itemsize
        for k in range(rows, listed):
            position = seen[k]
            seen[position] = mark
            target, source = np.uint64(position * dim), np.uint64((position + rows) * dim)
            for j in range(dim):
                flat[target + np.uint64(j)] += flat[source + np.uint64(j)]
                flat[source + np.uint64(j)] = 0
    return -1
