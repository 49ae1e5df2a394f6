"""Memory that other processes of the same machine can map too: it has no name, so nothing is left of it afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Not in Python's mmap module before 3.11: pages count where they are written, not where they are declared.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_NEVER_OVERCOMMIT = "2"
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_LARGE_PAGE_BYTES = 1 << 21
_MADV_COLLAPSE = 25  # of Linux 6.1 and later; not in Python's mmap module
_SPARE_FILES = 64  # of those that a process may have open: for connections, data files and loaders of batches
_libc = ctypes.CDLL(None, use_errno=True)
_madvise, _mmap, _munmap = _libc.madvise, _libc.mmap, _libc.munmap
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
_mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


class SharedBlock:
    """Zeros `[size]` bytes in memory without a name (memfd_create), backed page by page as it is first written.

    The kernel frees it with the last process that has it open or mapped, however that ends. It is not bounded by the
    size of /dev/shm, but by memory alone, as the process's own is. It is found by the process and the number of its
    file there, for as long as `close_file` has not been called: that is the one file descriptor that it takes, and all
    that have mapped it by then keep it without.

    Args:
        size: bytes.

    Raises:
        OSError: if the system has no such memory, or would have to reserve all of it, or if less than `_SPARE_FILES`
            file descriptors would be left for others.
    """

    def __init__(self, size: int):
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        if _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == _NEVER_OVERCOMMIT:
            raise OSError("vm.overcommit_memory is 2: a page that cannot be had would end the process")
        self.size = size
        with _naming_the_limit():
            self.file = os.memfd_create("adaloader", os.MFD_CLOEXEC)
        try:
            _leave_files_for_others(self.file)
            os.ftruncate(self.file, _file_size(size))
            self.memory = _map(self.file, size)
        except BaseException:
            self.close_file()
            raise

    def close_file(self) -> None:
        """No other process will map it any more. Those that have it mapped, keep it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def use_large_pages(self, begin: int, end: int) -> bool:
        """Have bytes [begin, end), all of which were written, in large pages; return whether that could be done.

        It takes a copy. Kernels without this, and memory without room for it, serve small pages as before.
        """
        at = _address(self.memory)
        first = -(-(at + begin) // _LARGE_PAGE_BYTES) * _LARGE_PAGE_BYTES
        length = (at + end - first) // _LARGE_PAGE_BYTES * _LARGE_PAGE_BYTES
        # mmap.madvise would keep the interpreter's lock for all that time.
        return length <= 0 or _madvise(first, length, _MADV_COLLAPSE) == 0

    def __del__(self):
        if hasattr(self, "file"):
            self.close_file()


@dataclass(frozen=True, eq=False)
class MappedBlock:
    """The `SharedBlock` of another process, mapped here."""

    memory: memoryview


def map_block(process: int, file: int, size: int) -> memoryview:
    """Map the `SharedBlock` that another process of this user has open under the number `file`.

    Raises:
        OSError: if there is none, or this process may not see it (as from another container).
    """
    with _naming_the_limit():
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(opened).st_size != _file_size(size):
            raise OSError(f"file {file} of process {process} has not {size} bytes")
        return _map(opened, size)
    finally:
        os.close(opened)


def _file_size(size: int) -> int:
    """Return how large the file of a block is: room before and behind lets it be mapped where large pages begin."""
    return size + 2 * _LARGE_PAGE_BYTES


class _Mapping:
    """Bytes of a file from `offset` on, mapped for as long as an array or a view of these has them.

    Python's own mmap would keep a descriptor of the file open for all that time.
    """

    _unmap = _munmap  # there until the last mapping is gone, also while the interpreter ends

    def __init__(self, file: int, length: int, offset: int):
        self.address, self.length = None, length
        if length > sys.maxsize:
            raise OSError(f"cannot map {length:,} bytes: no address space is as large")
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_NORESERVE
        address = _mmap(None, length, protection, flags, file, offset)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)}: {length:,} bytes cannot be mapped")
        self.address = address

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.length,), "data": (self.address, False)}

    def close(self) -> None:
        """Unmap it; nobody has an array of it."""
        address, self.address = self.address, None
        if address is not None:
            type(self)._unmap(address, self.length)

    __del__ = close


def _map(file: int, size: int) -> memoryview:
    """Map a block, which begins at the second large page of its file, so that both begin at a multiple of one.

    Where a mapping is put, the system says; one of the same length is put there again once the first is gone.
    """
    length = size + _LARGE_PAGE_BYTES
    mapping = _Mapping(file, length, 0)
    before = mapping.address % _LARGE_PAGE_BYTES
    if before:
        mapping.close()
        mapping = _Mapping(file, length, before)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as `advise_huge_pages`
        _madvise(mapping.address, length, mmap.MADV_HUGEPAGE)
    begin = _LARGE_PAGE_BYTES - before
    return memoryview(np.asarray(mapping))[begin : begin + size]


def _leave_files_for_others(file: int) -> None:
    """Raise OSError if a process that has been given the descriptor `file` has nearly all that it may."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most != resource.RLIM_INFINITY and file >= most - _SPARE_FILES:
        raise _no_files_left(f"the last {_SPARE_FILES} are for others")


@contextlib.contextmanager
def _naming_the_limit() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise _no_files_left(error.strerror) from error
        raise


def _no_files_left(why: str) -> OSError:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = f"this process may have {most} file descriptors, and none is left ({why}); raise that limit (ulimit -n)"
    return OSError(errno.EMFILE, text)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def advise_huge_pages(memory: mmap.mmap) -> None:
    """Ask for large pages: random rows of a big table otherwise miss the TLB at every access."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them serves small pages, which is slower and as right
        return
