"""Files of named tensors in the safetensors format, written and read piece by piece.

The format: 8 bytes with the length of a JSON header, the header, which gives each tensor's dtype, shape and place, and
the tensors one behind the other without gaps. What a header claims is held against the size of the file before any
memory is taken for it.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import stat
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adaloader.checkpoint.dtypes import BY_NAME, NUMPY_DTYPES, as_bytes, item_bytes
from adaloader.errors import CheckpointError

CHUNK_BYTES = 4 << 20
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_WRITES_AHEAD = 3
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the format names it, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the elements that share a first index."""
        return item_bytes(self.dtype) * int(np.prod(self.shape[1:], dtype=object))


class TensorFileWriter:
    """Writes one file; each tensor's bytes come in order, tensors in any order, and a thread of its own writes them.

    Args:
        path: of the file, which must not exist.
        forms: dtype name and shape of each tensor.
        metadata: text by name, kept in the header.

    Raises:
        OSError: from any method, as writing raises it: a full disk is noticed when the file is made, where it can be.
    """

    def __init__(
        self, path: Path, forms: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ):
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, list[int]] = {}
        offset = 0
        # Large elements first, so that each tensor lies at a multiple of its element's size.
        for name in sorted(forms, key=lambda name: (-item_bytes(forms[name][0]), name)):
            dtype, shape = forms[name]
            size = item_bytes(dtype) * int(np.prod(shape, dtype=object))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = [offset, offset + size]
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.crcs = dict.fromkeys(forms, 0)
        self.header_crc = zlib.crc32(text)
        self.bytes = _LENGTH.size + len(text) + offset
        for place in self._places.values():
            place[0] += _LENGTH.size + len(text)
            place[1] += _LENGTH.size + len(text)
        self._queue: queue.Queue[tuple[str, np.ndarray, int] | None] = queue.Queue(_WRITES_AHEAD)
        self._error: BaseException | None = None
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # No pool: those take no more work when the interpreter ends, which waits for what is being saved.
        self._thread = threading.Thread(target=self._work, name="adaloader-checkpoint-file", daemon=True)
        self._thread.start()
        try:
            _reserve(self._file, self.bytes)
            _write_all(self._file, _LENGTH.pack(len(text)) + text, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, part: np.ndarray | torch.Tensor) -> None:
        """Append `part` to a tensor; it must not change before the file is closed."""
        data = as_bytes(part)
        place = self._places[name]
        if place[0] + len(data) > place[1]:
            raise ValueError(f"{name!r} was declared with {place[1] - place[0]} bytes less than were written")
        start, place[0] = place[0], place[0] + len(data)
        self._raise_error()
        self._queue.put((name, data, start))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Write what is queued; after an error only take it, so that nobody waits for room in the queue."""
        while (given := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(*given)
                except BaseException as error:  # it is raised where the next part is handed over, or at the end
                    self._error = error

    def _write(self, name: str, data: np.ndarray, start: int) -> None:
        for at in range(0, len(data), CHUNK_BYTES):
            part = data[at : at + CHUNK_BYTES]
            self.crcs[name] = zlib.crc32(part, self.crcs[name])
            _write_all(self._file, part, start + at)

    def close(self) -> None:
        """Have everything on the disk, and close the file."""
        try:
            self._end_thread()
            self._raise_error()
            unwritten = [name for name, (start, stop) in self._places.items() if start != stop]
            if unwritten:
                raise ValueError(f"{unwritten} were declared and not written whole")
            os.fsync(self._file)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._error = self._error or OSError(errno.ECANCELED, "abandoned")
        self._end_thread()
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _end_thread(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()


def _reserve(file: int, size: int) -> None:
    """Take the disk space of the whole file now, where the file system can."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(file: int, data, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


class TensorFile:
    """Reads one file.

    Args:
        path: of the file.
        size: how many bytes it must have, if that is known.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, path: Path, size: int | None = None):
        self.path = path
        self._file = open_regular(path)
        try:
            self.size = os.fstat(self._file).st_size
            if size is not None and self.size != size:
                raise CheckpointError(
                    f"{path} has {self.size:,} bytes where {size:,} were written: it is truncated or changed"
                )
            self._header = self._read_header()
            self.tensors, self.metadata = self._parse(self._header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    @property
    def header_crc(self) -> int:
        return zlib.crc32(self._header)

    def entry(self, name: str) -> Entry:
        """Return what is known of a tensor.

        Raises:
            CheckpointError: if there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to before `stop` of a tensor of one dimension or more, in memory of their own."""
        entry = self.entry(name)
        stop = min(stop, entry.shape[0])
        out = np.empty((stop - start, *entry.shape[1:]), self._numpy_dtype(name))
        self._read_into(memoryview(out.reshape(-1).view(np.uint8)), entry.start + start * entry.row_bytes)
        return out

    def array(self, name: str) -> np.ndarray:
        """Return a whole tensor as an array."""
        entry = self.entry(name)
        out = np.empty(entry.shape, self._numpy_dtype(name))
        self._read_into(memoryview(out.reshape(-1).view(np.uint8)), entry.start)
        return out

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        entry = self.entry(name)
        out = torch.empty(entry.shape, dtype=BY_NAME[entry.dtype], device="cpu")
        self._read_into(memoryview(out.reshape(-1).view(torch.uint8).numpy()), entry.start)
        return out

    def crc(self, name: str) -> int:
        """Return the CRC-32 of a tensor's bytes, read piece by piece."""
        entry, crc = self.entry(name), 0
        for part in self._pieces(entry):
            crc = zlib.crc32(part, crc)
        return crc

    def _pieces(self, entry: Entry) -> Iterator[np.ndarray]:
        buffer = np.empty(min(CHUNK_BYTES, entry.stop - entry.start), np.uint8)
        for start in range(entry.start, entry.stop, CHUNK_BYTES):
            part = buffer[: min(CHUNK_BYTES, entry.stop - start)]
            self._read_into(memoryview(part), start)
            yield part

    def _numpy_dtype(self, name: str) -> np.dtype:
        dtype = self.entry(name).dtype
        if dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"{self.path}: {name!r} has dtype {dtype}, which no table or array has")
        return NUMPY_DTYPES[dtype]

    def _read_into(self, out: memoryview, offset: int) -> None:
        while len(out):
            try:
                read = os.preadv(self._file, [out], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if read == 0:
                raise CheckpointError(f"{self.path} ends before byte {offset + len(out):,}: it was truncated")
            out, offset = out[read:], offset + read

    def _read_header(self) -> bytes:
        if self.size < _LENGTH.size:
            raise CheckpointError(f"{self.path} has {self.size} bytes: no safetensors file is that short")
        raw = bytearray(_LENGTH.size)
        self._read_into(memoryview(raw), 0)
        (length,) = _LENGTH.unpack(raw)
        if length > min(self.size - _LENGTH.size, _MOST_HEADER_BYTES):
            raise CheckpointError(f"{self.path}: its header claims {length:,} bytes of a file of {self.size:,}")
        header = bytearray(length)
        self._read_into(memoryview(header), _LENGTH.size)
        return bytes(header)

    def _parse(self, header: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
        parsed = parse_json(header, self.path)
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{self.path}: its header is no dictionary")
        metadata = parsed.pop("__metadata__", {})
        begin = _LENGTH.size + len(header)
        found = {name: self._parse_entry(name, entry, begin) for name, entry in parsed.items()}
        at = begin
        for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise CheckpointError(f"{self.path}: tensor {name!r} overlaps another, or leaves a gap before it")
            at = entry.stop
        if at != self.size:
            raise CheckpointError(
                f"{self.path} has {self.size:,} bytes, its header accounts for {at:,}: it was truncated"
            )
        return found, metadata if isinstance(metadata, dict) else {}

    def _parse_entry(self, name: str, entry: object, begin: int) -> Entry:
        try:
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, *offsets]
            start, stop = offsets
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path}: the header's entry of {str(name)[:80]!r} is malformed") from error
        if not isinstance(dtype, str) or dtype not in BY_NAME:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise CheckpointError(f"{self.path}: tensor {name!r} has the shape or place {str(numbers)[:80]}")
        expected = item_bytes(dtype) * int(np.prod([1, *shape], dtype=object))
        if stop - start != expected or begin + stop > self.size or len(shape) > 64:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of {dtype} {str(shape)[:80]} needs {expected:,} bytes, its place "
                f"{start:,} to {stop:,} in a file of {self.size:,} is another"
            )
        return Entry(dtype, tuple(shape), begin + start, begin + stop)


def open_regular(path: Path) -> int:
    """Open a file for reading; no link, device or pipe.

    Raises:
        CheckpointError: naming it.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path} cannot be opened: {why}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{path} is no regular file")
    return file


def parse_json(text: bytes, path: Path) -> object:
    """Parse JSON of an untrusted file: no name twice in one dictionary, no NaN, nothing too deep.

    Raises:
        CheckpointError: naming the file.
    """

    def unique(pairs):
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a name occurs twice in one dictionary")
        return made

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not the JSON that it should be ({str(error)[:120] or 'nested too deep'})"
        ) from error
