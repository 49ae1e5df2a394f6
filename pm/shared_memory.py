"""Memory that other processes of the same machine can map too: it has no name, so nothing is left of it afterwards."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

# Not in Python's mmap module before 3.11: pages count where they are written, not where they are declared.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_NEVER_OVERCOMMIT = "2"
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


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
            os.ftruncate(self.file, size)
            self.memory = _map(self.file, size)
        except BaseException:
            self.close_file()
            raise

    def close_file(self) -> None:
        """No other process will map it any more. Those that have it mapped, keep it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __del__(self):
        if hasattr(self, "file"):
            self.close_file()


@dataclass(frozen=True)
class MappedBlock:
    """The `SharedBlock` of another process, mapped here."""

    memory: mmap.mmap


def map_block(process: int, file: int, size: int) -> mmap.mmap:
    """Map the `SharedBlock` that another process of this user has open under the number `file`.

    Raises:
        OSError: if there is none, or this process may not see it (as from another container).
    """
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(opened).st_size != size:
            raise OSError(f"file {file} of process {process} has not {size} bytes")
        return _map(opened, size)
    finally:
        os.close(opened)


def _map(file: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, size, flags=mmap.MAP_SHARED | MAP_NORESERVE)
    except (ValueError, OverflowError) as error:  # how Python says that a size cannot be mapped
        raise OSError(f"cannot map {size} bytes ({error})") from error
