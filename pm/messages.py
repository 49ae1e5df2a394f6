"""What travels between ranks: typed messages, packed into one byte buffer per peer and round. No pickle.

A buffer is [4 bytes: 4 x number of the header's words + how wide these are | header | arrays]. The header has for each
message kind + 128 x number of arrays, number of numbers, the numbers, and for each array dtype + 8 x number of
dimensions, and the shape. Its words have 2 bytes, or 4 or 8 where a number needs them: among many ranks messages are
about few rows each, and what is said around them would be most of the bytes. Arrays begin at multiples of their items.
"""

from __future__ import annotations

import itertools
import math
import sys
from array import array as words_of
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, unique

import numpy as np

_PREFIX = 4
_WORDS = tuple(map(np.dtype, (np.int16, np.int32, np.int64)))
_TYPECODES = tuple(dtype.char for dtype in _WORDS)
_KIND_BITS, _DTYPE_BITS = 7, 3
_KIND_MASK, _DTYPE_MASK = (1 << _KIND_BITS) - 1, (1 << _DTYPE_BITS) - 1
_DTYPES = tuple(map(np.dtype, (np.int64, np.float32, np.float64, np.uint8, np.int32, np.uint16)))
_NARROW = (((1 << 8) - 1, np.uint8), ((1 << 16) - 1, np.uint16), ((1 << 31) - 1, np.int32))
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}


@unique
class Kind(IntEnum):
    """The kinds of message; what each one's numbers and arrays mean is said where it is sent."""

    INTENT = 1
    RELEASE = 2
    WANT = 3
    GRADIENT = 4
    STEP = 5
    ROWS = 6
    READY = 7
    PULL = 8
    PULLED = 9
    RENORM = 10
    SHARD = 11
    END = 12
    REDUCTIONS = 13
    CLOSED = 14
    JOIN = 15
    LAST = 16
    WHERE = 17
    HERE = 18
    FORWARD = 19
    FORWARDED = 20
    HOLDS = 21
    LOCATE = 22
    LOCATED = 23
    STORE = 24
    MAPPED = 25
    SLOTS = 26
    SEEK = 27
    FOUND = 28
    COMMON_ROWS = 29
    ROWS_TO_PASS_ON = 30
    PASSED_ON = 31
    PORTION = 32
    SUM = 33
    PULL_STATES = 34
    PRESENT = 40
    SHARE = 41
    SHARED = 42
    GIVEN = 43
    WRITE = 44
    PARCEL = 60
    TAKEN = 61
    REQUEST = 62
    COPIES = 63
    RECORDS = 64
    PROMOTED = 65
    REFRESH = 66
    REFUSED = 67
    DELTAS = 68
    DROPS = 69
    MOVED = 70
    FETCH = 71
    FETCHED = 72
    PUSH = 73
    PUSHED = 74
    SYNC = 75
    SYNCED = 76
    CLOCK = 77
    REFRESHED = 78
    EPOCH = 79
    KEEP = 80
    KEPT = 81
    PUT_OFF = 82
    CHECKPOINT = 90
    CHECKPOINT_WRITTEN = 91
    CHECKPOINT_ENDED = 92
    CHECKPOINT_ROLL = 93


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind, a few int64 numbers, and arrays (of `_DTYPES`)."""

    kind: Kind
    numbers: tuple[int, ...] = ()
    arrays: tuple[np.ndarray, ...] = field(default=())


def message_bytes(message: Message) -> int:
    """Return how many bytes of a buffer a message takes, in a header of 2 bytes a word."""
    words, n_bytes = 2 + len(message.numbers), 0
    for array in message.arrays:
        words += 1 + array.ndim
        n_bytes += array.nbytes
    return _WORDS[0].itemsize * words + n_bytes


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Return non-negative integers (int64 or int32 `[n]`) in the smallest dtype that has room for all of them."""
    largest = numbers.max() if len(numbers) else 0
    for limit, dtype in _NARROW:
        if largest <= limit:
            return numbers.astype(dtype)
    return numbers


def widen(numbers: np.ndarray) -> np.ndarray:
    """Return what `narrow` gave as int64."""
    return numbers.astype(np.int64, copy=False)


def request(group: int, origin: int, keys: np.ndarray, is_near: np.ndarray) -> Message:
    """REQUEST(group, origin; keys, keys): `origin` has live intents for these (int64 `[n]`) and does not have them; the
    first it will use soon (`is_near`, bool `[n]`).
    """
    return Message(Kind.REQUEST, (group, origin), (narrow(keys[is_near]), narrow(keys[~is_near])))


def joined(messages: Iterable[Message], kinds: Container[Kind]) -> list[Message]:
    """Return `messages` with those of `kinds` that follow each other, and differ in their arrays alone, made one.

    Their arrays are joined along the first axis, the first with the first and so on; where some of these are empty and
    others are not (as sets of ranks may be, which travel as nothing where all are empty), the messages stay apart.
    """
    out: list[Message] = []
    for _, alike in itertools.groupby(messages, lambda message: (message.kind, message.numbers)):
        group = list(alike)
        if len(group) > 1 and group[0].kind in kinds:
            columns = list(zip(*(message.arrays for message in group), strict=True))
            if all(len({array.size > 0 for array in column}) == 1 for column in columns):
                arrays = tuple(np.concatenate(column) for column in columns)
                group = [Message(group[0].kind, group[0].numbers, arrays)]
        out += group
    return out


def pack(messages: list[Message]) -> np.ndarray:
    """Return one uint8 buffer that holds `messages` in order.

    Raises:
        TypeError: if an array's dtype cannot travel.
    """
    words: list[int] = []
    arrays = []
    for message in messages:
        words += (message.kind + (len(message.arrays) << _KIND_BITS), len(message.numbers), *message.numbers)
        for array in message.arrays:
            code = _DTYPE_CODE.get(array.dtype)
            if code is None:
                raise TypeError(f"an array of {array.dtype} cannot be sent; a message carries {_names_of_dtypes()}")
            words += (code + (array.ndim << _DTYPE_BITS), *array.shape)
            if array.size:
                arrays.append(array)
    width, header = _in_narrowest(words)
    parts = [(4 * len(words) + width).to_bytes(_PREFIX, sys.byteorder), header]
    at = _PREFIX + header.itemsize * len(words)
    for array in arrays:
        gap = -at % array.itemsize
        if gap:
            parts.append(bytes(gap))
        parts.append(array if array.flags.c_contiguous else np.ascontiguousarray(array))
        at += gap + array.nbytes
    return np.frombuffer(bytearray().join(parts), np.uint8)


def _in_narrowest(words: list[int]) -> tuple[int, words_of]:
    """Return (place in `_WORDS`, the words) in the narrowest of these that has room for all."""
    for width, typecode in enumerate(_TYPECODES[:-1]):
        try:
            return width, words_of(typecode, words)
        except OverflowError:
            continue
    return len(_TYPECODES) - 1, words_of(_TYPECODES[-1], words)


def unpack(buffer: np.ndarray) -> list[Message]:
    """Return the messages in `buffer` (uint8, from `pack`); their arrays are views of it.

    Raises:
        ValueError: if the buffer is cut short, or its header is not one that `pack` writes.
    """
    size = len(buffer)
    count, width = divmod(int.from_bytes(buffer[:_PREFIX].tobytes(), sys.byteorder), 4)
    dtype = _WORDS[width] if width < len(_WORDS) else None
    if size < _PREFIX or dtype is None or _PREFIX + count * dtype.itemsize > size:
        raise ValueError(f"a message of {size} bytes is cut short, or no message: its header takes {count} words")
    start = _PREFIX + count * dtype.itemsize
    try:
        return _read(buffer[_PREFIX:start].view(dtype).tolist(), buffer, start)
    except IndexError:
        raise ValueError(f"the header of a message of {size} bytes ends before what it tells of") from None


def _read(header: list[int], buffer: np.ndarray, start: int) -> list[Message]:
    """Read messages, one after the other, from a header and the buffer that it describes, whose arrays begin after
    `start`. In one function: a rank is sent dozens of small messages a step, of three or four arrays each.

    Raises:
        IndexError: if the header has no numbers left.
        ValueError: if it says what `pack` does not.
    """
    messages = []
    at, end, size = 0, len(header), len(buffer)
    while at < end:
        kind, n_arrays = _KINDS.get(header[at] & _KIND_MASK), header[at] >> _KIND_BITS
        n_numbers = header[at + 1]
        at += 2
        if kind is None or n_arrays < 0 or n_numbers < 0 or at + n_numbers > end:
            raise ValueError(f"a message of {size} bytes has kind {header[at - 2]} and {n_numbers} numbers")
        numbers = tuple(header[at : at + n_numbers])
        at += n_numbers
        arrays = []
        for _ in range(n_arrays):
            code, ndim = header[at] & _DTYPE_MASK, header[at] >> _DTYPE_BITS
            at += 1
            if code >= len(_DTYPES):
                raise ValueError(
                    f"a message names dtype {code}; known are 0 to {len(_DTYPES) - 1} ({_names_of_dtypes()})"
                )
            if not 0 <= ndim <= end - at:
                raise ValueError(f"a message of {size} bytes has an array of {ndim} dimensions")
            shape = header[at : at + ndim]
            at += ndim
            dtype = _DTYPES[code]
            n_bytes = math.prod(shape, start=dtype.itemsize)
            if not n_bytes:
                arrays.append(np.ndarray(shape, dtype))
                continue
            start += -start % dtype.itemsize
            if n_bytes < 0 or start + n_bytes > size or (ndim > 1 and min(shape) < 0):
                raise ValueError(
                    f"a message of {size} bytes is cut short: an array of shape {shape} ends at byte {start + n_bytes}"
                )
            arrays.append(np.ndarray(shape, dtype, buffer, start))
            start += n_bytes
        messages.append(Message(kind, numbers, tuple(arrays)))
    return messages


def _names_of_dtypes() -> str:
    return ", ".join(str(dtype) for dtype in _DTYPES)
