"""What ranks tell each other about a checkpoint: text, and whether something went wrong anywhere."""

from __future__ import annotations

import numpy as np

import pm
from adaloader.errors import CheckpointError
from adaloader.table_values import all_numbers


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


def raise_together(manager: pm.Manager, problem: str) -> None:
    """Raise on every rank if there is a `problem` on any (collective).

    Raises:
        CheckpointError: with the problems of all ranks that have one, each once.
    """
    problems = [(rank, each) for rank, each in enumerate(all_texts(manager, problem)) if each]
    if not problems:
        return
    by_text: dict[str, list[str]] = {}
    for rank, each in problems:
        by_text.setdefault(each, []).append(str(rank))
    if manager.ranks == 1 or len(problems) == manager.ranks == len(by_text[problems[0][1]]):
        raise CheckpointError(problems[0][1])
    raise CheckpointError("; ".join(f"rank {', '.join(ranks)}: {each}" for each, ranks in by_text.items()))
