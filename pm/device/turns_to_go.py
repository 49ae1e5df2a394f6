"""In which order slots are given up: those used farthest in the future first, of equals the one that entered first."""

from __future__ import annotations

import numpy as np


class TurnsToGo:
    """A set of slots, each with the batch of its next use; what is done costs, on average, as the slots named in it.

    Slots that enter together with one batch are kept as one array; a slot that leaves or enters again only gets a new
    stamp, which makes its old entry void.

    Args:
        slots: number of slots, 0 .. slots-1.
    """

    def __init__(self, slots: int):
        self._stamps = np.zeros(slots, np.int64)  # of the entry that counts; 0 for a slot that is not in
        self._next_stamp = 1
        self._count = 0
        self._entries: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._entered = 0  # entries kept, void ones too

    def __len__(self) -> int:
        return self._count

    def enter(self, slots: np.ndarray, next_uses: np.ndarray) -> None:
        """Put distinct `slots` (int64 `[n]`) in, or move those that are in, with the batches of their next use."""
        self._count += int(np.count_nonzero(self._stamps[slots] == 0))
        stamps = np.arange(self._next_stamp, self._next_stamp + len(slots))
        self._next_stamp += len(slots)
        self._stamps[slots] = stamps
        for batch in np.unique(next_uses).tolist():
            these = next_uses == batch
            self._entries.setdefault(batch, []).append((slots[these], stamps[these]))
        self._entered += len(slots)
        if self._entered > 4 * len(self._stamps) + 1024:
            self._drop_void()

    def leave(self, slots: np.ndarray) -> None:
        """Take distinct `slots` (int64 `[n]`) out."""
        self._count -= int(np.count_nonzero(self._stamps[slots]))
        self._stamps[slots] = 0

    def take(self, count: int) -> np.ndarray:
        """Take out the `count` slots that go first and return them (int64 `[count]`).

        Raises:
            ValueError: there are fewer.
        """
        if count > self._count:
            raise ValueError(f"{count} slots are asked for, and {self._count} can go")
        taken = [np.empty(0, np.int64)]
        wanted = count
        for batch in sorted(self._entries, reverse=True) if count else ():
            waiting = self._entries[batch]
            while waiting and wanted:
                slots, stamps = waiting.pop(0)
                self._entered -= len(slots)
                valid = self._stamps[slots] == stamps
                slots, stamps = slots[valid], stamps[valid]
                if len(slots) > wanted:
                    waiting.insert(0, (slots[wanted:], stamps[wanted:]))
                    self._entered += len(slots) - wanted
                    slots = slots[:wanted]
                self._stamps[slots] = 0
                taken.append(slots)
                wanted -= len(slots)
            if not waiting:
                del self._entries[batch]
            if not wanted:
                break
        self._count -= count
        return np.concatenate(taken)

    def _drop_void(self) -> None:
        for batch, waiting in list(self._entries.items()):
            slots, stamps = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
            valid = self._stamps[slots] == stamps
            if valid.any():
                self._entries[batch] = [(slots[valid], stamps[valid])]
            else:
                del self._entries[batch]
        self._entered = sum(len(slots) for waiting in self._entries.values() for slots, _ in waiting)
