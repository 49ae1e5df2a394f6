"""Measures of a binary classifier, from its logits."""

from __future__ import annotations

import numpy as np


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean binary cross-entropy in nats, stable for large logits."""
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


def roc_auc(labels: np.ndarray, logits: np.ndarray) -> float:
    """Area under the ROC curve: the share of (click, no click) pairs in the right order, a tie counting half.

    By the rank sum of the clicks (Hanley & McNeil 1982). Not a number where one of the classes is missing.
    """
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    clicks = labels > 0.5
    positive = int(clicks.sum())
    negative = len(labels) - positive
    if positive == 0 or negative == 0:
        return float("nan")
    rank_sum = middle_rank[place[clicks]].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * negative))
