"""Memory that two processes map: seen by both, sparse, without a name, and there for as long as one has it mapped."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pm.storage import shared_memory
from pm.storage.shared_memory import SharedBlock, map_block
from pm.storage.store import RecordClass, RecordStore

OWNER = """
import runpy, sys
import numpy as np
SharedBlock = runpy.run_path(sys.argv[2])["SharedBlock"]  # by itself, which is quicker than the package
block = SharedBlock(int(sys.argv[1]))
words = np.frombuffer(block.memory, np.int64)
words[:1000] = np.arange(1000)
print(block.file, flush=True)
sys.stdin.readline()
words[7] = 77
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner():
    """Another process that has a block of 1 MB, the number of its file there, and its size."""
    size = 1 << 20
    command = [sys.executable, "-c", OWNER, str(size), shared_memory.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, int(process.stdout.readline()), size
    process.kill()
    process.communicate()


def entries_of_shm() -> set[str]:
    folder = Path("/dev/shm")
    return {name for name in os.listdir(folder) if "adaloader" in name} if folder.exists() else set()


def test_what_is_written_later_is_seen(owner):
    process, file, size = owner
    words = np.frombuffer(map_block(process.pid, file, size), np.int64)
    assert (words[:1000] == np.arange(1000)).all()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "written\n"
    assert words[7] == 77


def test_an_owner_that_is_killed_leaves_its_readers_what_they_read_and_nothing_else(owner):
    process, file, size = owner
    words = np.frombuffer(map_block(process.pid, file, size), np.int64)
    files = len(os.listdir("/proc/self/fd"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (words[:1000] == np.arange(1000)).all()
    assert not entries_of_shm()
    with pytest.raises(OSError):
        map_block(process.pid, file, size)
    assert len(os.listdir("/proc/self/fd")) == files, "what cannot be mapped is not kept open"


def test_another_size_is_refused(owner):
    process, file, size = owner
    with pytest.raises(OSError, match=f"has not {size + 4096} bytes"):
        map_block(process.pid, file, size + 4096)


def test_a_large_block_takes_no_memory_before_it_is_written():
    block = SharedBlock(1 << 40)
    assert os.fstat(block.file).st_blocks == 0
    np.frombuffer(block.memory, np.uint8)[1 << 39] = 1
    assert 0 < os.fstat(block.file).st_blocks * 512 <= 1 << 22


def test_a_block_that_nobody_has_is_closed():
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        SharedBlock(8192)
    assert len(os.listdir("/proc/self/fd")) <= files + 2


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:adaloader")


def test_what_is_mapped_keeps_no_file_open():
    files = len(os.listdir("/proc/self/fd"))
    block = SharedBlock(8192)
    here = np.frombuffer(block.memory, np.int64)
    there = np.frombuffer(map_block(os.getpid(), block.file, 8192), np.int64)
    assert len(os.listdir("/proc/self/fd")) == files + 1, "the one that others open"
    block.close_file()
    assert len(os.listdir("/proc/self/fd")) == files
    here[5] = 55
    assert there[5] == 55


def test_memory_is_unmapped_with_the_last_array_of_it():
    before = mappings()
    block = SharedBlock(8192)
    array = np.frombuffer(map_block(os.getpid(), block.file, 8192), np.int64)
    assert mappings() == before + 2
    part = array[7:9].reshape(2, 1)
    block.memory[56] = 7
    del array, block
    assert mappings() == before + 1 and part[0, 0] == 7
    del part
    assert mappings() == before


def test_what_cannot_be_mapped_is_told_with_its_size():
    block = SharedBlock(8192)
    for size in (1 << 62, 1 << 64):
        with pytest.raises(OSError, match="bytes"):
            shared_memory._map(block.file, size)


def test_file_descriptors_are_left_for_others():
    next_one = os.open(os.devnull, os.O_RDONLY)
    os.close(next_one)
    files, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 64, limits[1]))
        with pytest.raises(OSError, match=rf"may have {next_one + 64} .*the last 64 are for others.*ulimit -n"):
            SharedBlock(8192)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, limits[1]))
        with pytest.raises(OSError, match=rf"may have {next_one} .*ulimit -n"):
            map_block(os.getpid(), 0, 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == files


def test_records_in_a_block_are_those_of_a_store():
    record_class = RecordClass(3, "float32", "adagrad", 3)
    store = RecordStore(record_class, 100, SharedBlock(RecordStore.bytes_of(record_class, 100)))
    other = map_block(os.getpid(), store.block.file, store.block.size)
    slots = store.allocate(5)
    store.set_values(slots, np.arange(15, dtype=np.float32).reshape(5, 3))
    words = np.frombuffer(other, np.float32)
    np.testing.assert_array_equal(words.reshape(-1, store.stride)[:5, :3].reshape(-1), np.arange(15))


def test_a_system_that_would_reserve_it_all_is_told_apart(monkeypatch, tmp_path):
    (tmp_path / "overcommit_memory").write_text("2\n")
    monkeypatch.setattr(shared_memory, "_OVERCOMMIT", tmp_path / "overcommit_memory")
    with pytest.raises(OSError, match="overcommit_memory is 2"):
        SharedBlock(4096)


def test_a_system_without_such_memory_is_told_apart(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no memfd_create"):
        SharedBlock(4096)


@pytest.mark.parametrize("size", [4096, (1 << 21) + 4096, 5 << 21])
def test_a_block_begins_where_large_pages_do_and_has_the_same_bytes_in_them(size):
    blocks, begins = [SharedBlock(size) for _ in range(3)], []
    for block in blocks:
        memory = np.frombuffer(block.memory, np.uint8)
        memory[...] = np.arange(size) % 251
        again = np.frombuffer(map_block(os.getpid(), block.file, size), np.uint8)
        assert block.use_large_pages(0, size) in (True, False)  # as the kernel can
        for each in (memory, again):
            begins.append(each.ctypes.data)
            assert len(each) == size and (each == np.arange(size) % 251).all()
        memory[size // 2] = 255
        assert again[size // 2] == 255
    assert any(begin % (1 << 21) == 0 for begin in begins)  # another thread may have taken one's place
