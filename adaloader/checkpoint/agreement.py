"""Ranks tell each other whether something went wrong anywhere."""

from __future__ import annotations

import pm
from adaloader.errors import CheckpointError
from adaloader.ranks.table_values import all_texts


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
