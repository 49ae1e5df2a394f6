"""What travels between ranks: typed messages, packed into one byte buffer per peer and round. No pickle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, unique

import numpy as np

_WORD = 8
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
    PRESENT = 40
    SHARE = 41
    SHARED = 42
    GIVEN = 43
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
    CHECKPOINT = 90
    CHECKPOINT_WRITTEN = 91
    CHECKPOINT_ENDED = 92
    CHECKPOINT_ROLL = 93


@dataclass(frozen=True)
class Message:
    """One message: its kind, a few int64 numbers, and arrays (of `_DTYPES`)."""

    kind: Kind
    numbers: tuple[int, ...] = ()
    arrays: tuple[np.ndarray, ...] = field(default=())


def message_bytes(message: Message) -> int:
    """Return how many bytes of a buffer a message takes."""
    words = 3 + len(message.numbers) + sum(2 + array.ndim for array in message.arrays)
    return words * _WORD + sum(_padded(array.nbytes) for array in message.arrays)


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
    """Return one uint8 buffer that holds `messages` in order; arrays start at multiples of 8 bytes.

    Raises:
        TypeError: if an array's dtype cannot travel.
    """
    header = [len(messages)]
    payload_bytes = 0
    for message in messages:
        header += [int(message.kind), len(message.numbers), len(message.arrays), *message.numbers]
        for array in message.arrays:
            code = _DTYPE_CODE.get(array.dtype)
            if code is None:
                raise TypeError(f"an array of {array.dtype} cannot be sent; a message carries {_names_of_dtypes()}")
            header += [code, array.ndim, *array.shape]
            payload_bytes += _padded(array.nbytes)
    head = np.array([len(header) + 1, *header], np.int64)
    buffer = np.empty(head.nbytes + payload_bytes, np.uint8)
    buffer[: head.nbytes] = head.view(np.uint8)
    start = head.nbytes
    for message in messages:
        for array in message.arrays:
            end = start + array.nbytes
            buffer[start:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start += _padded(array.nbytes)
    return buffer


def unpack(buffer: np.ndarray) -> list[Message]:
    """Return the messages in `buffer` (uint8, from `pack`); their arrays are views of it.

    Raises:
        ValueError: if the buffer is cut short, or its header is not one that `pack` writes.
    """
    words = buffer[: len(buffer) // _WORD * _WORD].view(np.int64)
    head_words = int(words[0]) if len(words) else 0
    if not 2 <= head_words <= len(words):
        raise ValueError(f"a message of {len(buffer)} bytes is cut short: its header takes {head_words} words")
    reader = _Reader(words[1:head_words].tolist(), buffer, head_words * _WORD)
    (count,) = reader.numbers(1)
    return [reader.message() for _ in range(count)]


class _Reader:
    """Reads messages one after the other from a header (list of int) and the buffer that it describes."""

    def __init__(self, header: list[int], buffer: np.ndarray, start: int):
        self._header = header
        self._at = 0
        self._buffer = buffer
        self._start = start

    def numbers(self, count: int) -> list[int]:
        """Return the header's next `count` numbers."""
        end = self._at + count
        if count < 0 or end > len(self._header):
            raise ValueError(f"the header of a message of {len(self._buffer)} bytes has no {count} numbers left")
        taken = self._header[self._at : end]
        self._at = end
        return taken

    def message(self) -> Message:
        kind, n_numbers, n_arrays = self.numbers(3)
        numbers = tuple(self.numbers(n_numbers))
        return Message(Kind(kind), numbers, tuple([self._array() for _ in range(n_arrays)]))

    def _array(self) -> np.ndarray:
        code, ndim = self.numbers(2)
        if not 0 <= code < len(_DTYPES):
            raise ValueError(f"a message names dtype {code}; known are 0 to {len(_DTYPES) - 1} ({_names_of_dtypes()})")
        shape = self.numbers(ndim)
        n_bytes = math.prod(shape, start=_DTYPES[code].itemsize)
        end = self._start + n_bytes
        if min(shape, default=0) < 0 or end > len(self._buffer):
            raise ValueError(
                f"a message of {len(self._buffer)} bytes is cut short: an array of shape {shape} ends at byte {end}"
            )
        array = self._buffer[self._start : end].view(_DTYPES[code]).reshape(shape)
        self._start += _padded(n_bytes)
        return array


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _WORD) * _WORD


def _names_of_dtypes() -> str:
    return ", ".join(str(dtype) for dtype in _DTYPES)
