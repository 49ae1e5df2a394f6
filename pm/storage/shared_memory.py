"""Memory that other processes of the same machine can map too: it has no name, so nothing is left of it afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

# Not in Python's mmap module before 3.11: pages count where they are written, not where they are declared.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_NEVER_OVERCOMMIT = "2"
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_LARGE_PAGE_BYTES = 1 << 21
_MADV_COLLAPSE = 25  # of Linux 6.1 and later; not in Python's mmap module
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class SharedBlock:
    """Zeros `[size]` bytes in memory without a name (memfd_create), backed page by page as it is first written.

    The kernel frees it with the last process that has it open or mapped, however that ends. It is not bounded by the
    size of /dev/shm, but by memory alone, as the process's own is. It is found by the process and the number of its
    file there, for as long as `close_file` has not been called.

    Args:
        size: bytes.

    Raises:
        OSError: if the system has no such memory, or would have to reserve all of it.
    """

    def __init__(self, size: int):
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        if _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == _NEVER_OVERCOMMIT:
            raise OSError("vm.overcommit_memory is 2: a page that cannot be had would end the process")
        self.size = size
        self.file = os.memfd_create("adaloader", os.MFD_CLOEXEC)
        try:
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


def _map(file: int, size: int) -> memoryview:
    """Map a block, which begins at the second large page of its file, so that both begin at a multiple of one.

    Where a mapping is put, the system says; one of the same length is put there again once the first is gone.
    """
    try:
        mapping = _map_from(file, size, 0)
        pages = _address(mapping) % _LARGE_PAGE_BYTES // mmap.PAGESIZE
        if pages:
            mapping.close()
            mapping = _map_from(file, size, pages * mmap.PAGESIZE)
    except (ValueError, OverflowError) as error:  # how Python says that a size cannot be mapped
        raise OSError(f"cannot map {size} bytes ({error})") from error
    begin = _LARGE_PAGE_BYTES - pages * mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        advise_huge_pages(mapping)
    return memoryview(mapping)[begin : begin + size]


def _map_from(file: int, size: int, offset: int) -> mmap.mmap:
    return mmap.mmap(file, size + _LARGE_PAGE_BYTES, flags=mmap.MAP_SHARED | MAP_NORESERVE, offset=offset)


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def advise_huge_pages(memory: mmap.mmap) -> None:
    """Ask for large pages: random rows of a big table otherwise miss the TLB at every access."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them serves small pages, which is slower and as right
        return
