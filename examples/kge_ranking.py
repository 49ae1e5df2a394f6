"""Filtered ranking of entities (Bordes et al. 2013): how many score above the right answer,
other right ones left out.
"""

from __future__ import annotations

import numpy as np
import torch

QUERIES_AT_ONCE = 2048


class Ranking:
    """Counts, for queries (head, relation, ?) and (?, relation, tail), the entities that score above the answer.

    Entities come in pieces, in any order and on any rank: counts add up. There are two queries per triple, for the
    tails of all triples first, then for the heads.

    Args:
        triples: int64 `[n, 3]`, to ask about.
        known: int64 `[m, 3]`, all true triples, which are not counted as mistakes.
        num_entities: how many there are.
    """

    def __init__(self, triples: np.ndarray, known: np.ndarray, num_entities: int):
        self.above = np.zeros(2 * len(triples), dtype=np.int64)
        self.equal = np.zeros(2 * len(triples), dtype=np.int64)
        tail_queries = _right_answers(triples[:, [0, 1]], known[:, [0, 1]], known[:, 2])
        head_queries = _right_answers(triples[:, [2, 1]], known[:, [2, 1]], known[:, 0])
        counts = np.concatenate([tail_queries[0], head_queries[0]])
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._right = np.concatenate([tail_queries[1], head_queries[1]])
        self._column = np.full(num_entities, -1, dtype=np.int64)

    def count(
        self, queries: torch.Tensor, answer_scores: torch.Tensor, entities: np.ndarray, vectors: torch.Tensor
    ) -> None:
        """Count a piece: `entities` int64 `[c]` with `vectors` `[c, d]`.

        `queries` `[2n, d]` and the `answer_scores` `[2n]` are those of all queries.
        """
        self._column[entities] = np.arange(len(entities))
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            end = min(start + QUERIES_AT_ONCE, len(queries))
            scores = queries[start:end] @ vectors.T
            scores[self._filtered(start, end)] = -torch.inf
            answers = answer_scores[start:end, None]
            self.above[start:end] += (scores > answers).sum(1).numpy()
            self.equal[start:end] += (scores == answers).sum(1).numpy()
        self._column[entities] = -1

    def _filtered(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (query - start, column) of the right answers within the piece."""
        column = self._column[self._right[self._offsets[start] : self._offsets[end]]]
        query = np.repeat(np.arange(end - start), np.diff(self._offsets[start : end + 1]))
        return torch.from_numpy(query[column >= 0]), torch.from_numpy(column[column >= 0])


def scores_of(above: np.ndarray, equal: np.ndarray) -> dict[str, float]:
    """Return the mean reciprocal rank and the share of ranks up to 10; a tie counts half a place."""
    rank = 1 + above + equal / 2
    if not len(rank):
        return {"test_mrr": float("nan"), "test_hits_at_10": float("nan")}
    return {"test_mrr": float(np.mean(1 / rank)), "test_hits_at_10": float(np.mean(rank <= 10))}


def _right_answers(asked: np.ndarray, pairs: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (how many right answers each of `asked` `[n, 2]` has, all of them).

    `answers` `[m]` are right for `pairs` `[m, 2]`.
    """
    base = 1 + max((int(array[:, 1].max()) for array in (asked, pairs) if len(array)), default=0)
    codes = pairs[:, 0] * base + pairs[:, 1]
    order = np.argsort(codes, kind="stable")
    wanted = asked[:, 0] * base + asked[:, 1]
    first, end = (np.searchsorted(codes[order], wanted, side=side) for side in ("left", "right"))
    counts = end - first
    begins = np.concatenate([[0], np.cumsum(counts)])
    at = np.arange(begins[-1]) - np.repeat(begins[:-1], counts) + np.repeat(first, counts)
    return counts, answers[order[at]]
