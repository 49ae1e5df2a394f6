"""What rank 0 has for all: whole tables into the manager, each owner keeping its rows; numbers, text and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

import pm
from adaloader.memory.free_memory import free_bytes

_CHUNK_BYTES = 4 << 20


def load_values(manager: pm.Manager, table: pm.Table, values: torch.Tensor | None, root: int = 0) -> None:
    """Set every row of `table` from rank `root`'s `values` `[rows, dim]`; other ranks' are not read (collective)."""
    with manager.still():
        for rows, chunk in _own_rows_from(root, manager, table, [values], table.spec.dim):
            manager.load_rows(table, rows, chunk, None)
        manager.rewrite_ended()


def read_whole(manager: pm.Manager, table: pm.Table) -> torch.Tensor:
    """Return all rows of `table` `[rows, dim]` at this rank's version, in memory of their own.

    Raises:
        MemoryError: saying how many bytes it takes and are free.
    """
    whole = _room_for_whole(table, table.spec.dim)
    for rows in _chunks(whole):
        manager.pull(table, rows, whole[rows[0] : rows[-1] + 1])
    return torch.from_numpy(whole)


def read_whole_states(manager: pm.Manager, table: pm.Table) -> torch.Tensor:
    """Return the optimizer state of all rows of `table` `[rows, state_words]` at this rank's version, in memory of
    their own; only of a manager that gives states.

    Raises:
        MemoryError: saying how many bytes it takes and are free.
    """
    whole = _room_for_whole(table, table.store.record_class.state_words)
    for rows in _chunks(whole):
        whole[rows[0] : rows[-1] + 1] = manager.pull_states(table, rows)
    return torch.from_numpy(whole)


def _room_for_whole(table: pm.Table, width: int) -> np.ndarray:
    spec = table.spec
    needed, free = spec.rows * width * np.dtype(spec.dtype).itemsize, free_bytes()
    if needed > free >= 0:
        raise MemoryError(
            f"reading table {spec.name!r} as a whole takes {needed:,} bytes, where {free:,} are free; look up the rows "
            "that are needed instead, or have adaloader.save write them"
        )
    return np.empty((spec.rows, width), spec.dtype)


def _chunks(whole: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the numbers (int64 `[n]`) of the rows of `whole`, some at a time."""
    chunk_rows = max(1, _CHUNK_BYTES // max(1, whole.strides[0]))
    for start in range(0, len(whole), chunk_rows):
        yield np.arange(start, min(start + chunk_rows, len(whole)), dtype=np.int64)


def load_states(manager: pm.Manager, table: pm.Table, parts: Sequence[torch.Tensor] | None) -> None:
    """Set the optimizer state of every row from rank 0's `parts` `[rows, ...]`, side by side (collective)."""
    words = table.store.record_class.state_words
    if words == 0:
        return
    with manager.still():
        for rows, chunk in _own_rows_from(0, manager, table, parts, words):
            manager.load_states(table, rows, chunk)


def _own_rows_from(
    root: int, manager: pm.Manager, table: pm.Table, source: Sequence[torch.Tensor] | None, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, their part of rank `root`'s `source`) for the rows that this rank owns, chunk by chunk (collective).

    That rank's `source` are tensors `[rows, ...]` that a chunk has side by side, `width` numbers of each row together.
    """
    dtype = np.dtype(table.spec.dtype)
    chunk_rows = max(1, _CHUNK_BYTES // (width * dtype.itemsize))
    for start in range(0, table.spec.rows, chunk_rows):
        rows = np.arange(start, min(start + chunk_rows, table.spec.rows), dtype=np.int64)
        if manager.rank == root:
            parts = [part.detach()[start : start + len(rows)].reshape(len(rows), -1) for part in source]
            chunk = torch.cat(parts, 1).to("cpu", getattr(torch, table.spec.dtype))
            chunk = np.ascontiguousarray(chunk.numpy())
        else:
            chunk = np.empty((len(rows), width), dtype)
        if manager.ranks > 1:
            chunk = broadcast_array(manager, chunk, root)
            own = manager.rows_owned(table, rows)
            rows, chunk = own, chunk[own - start]
        yield rows, chunk


def broadcast_array(manager: pm.Manager, array: np.ndarray, root: int = 0) -> np.ndarray:
    """Return rank `root`'s `array` on every rank (collective); it may be written on the others."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if flat.size:
        manager.transport.collective(lambda comm: comm.Ibcast(flat, root), manager.timeout_seconds)
    return array


def numbers_of_rank_0(manager: pm.Manager, numbers: list[int]) -> list[int]:
    """Return rank 0's `numbers` on every rank (collective)."""
    return numbers if manager.ranks == 1 else broadcast_array(manager, np.array(numbers, np.int64)).tolist()


def text_of_rank_0(manager: pm.Manager, text: str) -> str:
    """Return rank 0's `text` on every rank (collective)."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    (length,) = numbers_of_rank_0(manager, [len(encoded)])
    if manager.rank:
        encoded = np.empty(length, np.uint8)
    return text if manager.ranks == 1 else broadcast_array(manager, encoded.copy()).tobytes().decode()


def broadcast_tensor(manager: pm.Manager, tensor: torch.Tensor, root: int = 0) -> None:
    """Overwrite the other ranks' `tensor` (on the CPU, contiguous, any dtype) with rank `root`'s (collective)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _CHUNK_BYTES):
        broadcast_array(manager, flat[start : start + _CHUNK_BYTES], root)


def all_numbers(manager: pm.Manager, number: int) -> list[int]:
    """Return every rank's `number`, in rank order (collective)."""
    if manager.ranks == 1:
        return [number]
    mine, everyones = np.array([number], np.int64), np.empty(manager.ranks, np.int64)
    manager.transport.collective(lambda comm: comm.Iallgather(mine, everyones), manager.timeout_seconds)
    return everyones.tolist()


def all_texts(manager: pm.Manager, text: str) -> list[str]:
    """Return every rank's `text`, in rank order (collective)."""
    if manager.ranks == 1:
        return [text]
    encoded = text.encode()
    lengths = all_numbers(manager, len(encoded))
    mine, everyones = np.zeros(max(lengths), np.uint8), np.empty((manager.ranks, max(lengths)), np.uint8)
    mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    if max(lengths):
        manager.transport.collective(lambda comm: comm.Iallgather(mine, everyones), manager.timeout_seconds)
    return [each[:length].tobytes().decode() for each, length in zip(everyones, lengths, strict=True)]
