"""Move or copy: AdaPM's rule (arXiv 2206.00470, section 4.1), for many keys at once.

The owner of a key decides when an intent of another rank arrives, and when one ends: where nobody else has a live
intent the key moves to the rank that has; otherwise that rank gets a copy until its intent ends.
"""

from __future__ import annotations

import numpy as np

_FREE_MOVES = 4
_CLOCKS_PER_COPY, _SHARED_CLOCKS, _MOST_CLOCKS = 16, 40, 128  # three copies that follow each other fast, then one in 16

TECHNIQUES = ("all", "relocation", "replication", "none")


def check_techniques(techniques: object) -> None:
    """Raise ValueError unless `techniques` is one of `TECHNIQUES`."""
    if techniques not in TECHNIQUES:
        raise ValueError(f"techniques must be one of {', '.join(map(repr, TECHNIQUES))}; got {techniques!r}")


def are_restless(moves: np.ndarray, shared_until: np.ndarray, clock: int, clocks_per_move: int | None) -> np.ndarray:
    """Return which keys do not move for now, whoever needs them (bool `[n]`): those that have moved four times, and
    once more for each `clocks_per_move`, and those that have been copied again and again. None, as in AdaPM: none.

    Ranks take turns at these. Each move makes what the others know of the key wrong, and their questions run after it;
    a copy costs more bytes, but one question and one answer.

    Args:
        moves: how often each has moved, int `[n]`.
        shared_until: what `shared_longer` has made of the copies of each, int `[n]`.
        clock: of the owner's fastest worker.
        clocks_per_move: see above.
    """
    if clocks_per_move is None:
        return np.zeros(len(moves), bool)
    return (moves >= _FREE_MOVES + clock // clocks_per_move) | (shared_until > clock + _SHARED_CLOCKS)


def shared_longer(shared_until: np.ndarray, clock: int) -> np.ndarray:
    """Return `shared_until` of keys that are copied to one more rank at this clock: a bucket that each copy fills and
    each clock empties, as the clock at which it will be empty (int `[n]`).
    """
    return np.minimum(np.maximum(shared_until, clock) + _CLOCKS_PER_COPY, clock + _MOST_CLOCKS)


def moves_to_asker(techniques: str, owner_is_live: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which keys move to the rank that asks for them (bool `[n]`); it gets copies of the others, or nothing.

    Args:
        techniques: one of `TECHNIQUES`.
        owner_is_live: bool `[n]`: the owner has a live intent of its own.
        others: int64 `[n]`: how many ranks beside owner and asker have one.
    """
    if techniques == "all":
        return ~owner_is_live & (others == 0)
    if techniques == "relocation":  # without copies, a key is worth having for whoever asks last
        return ~owner_is_live
    return np.zeros(len(owner_is_live), bool)


def moves_to_last(techniques: str, owner_is_live: np.ndarray, holders: np.ndarray) -> np.ndarray:
    """Return which keys move, now that an intent has ended, to the one rank (or with relocation alone: to some rank)
    that still has one (bool `[n]`).

    Args:
        techniques: one of `TECHNIQUES`.
        owner_is_live: bool `[n]`: the owner has a live intent of its own.
        holders: int64 `[n]`: how many other ranks have one.
    """
    if techniques == "all":
        return ~owner_is_live & (holders == 1)
    if techniques == "relocation":
        return ~owner_is_live & (holders >= 1)
    return np.zeros(len(owner_is_live), bool)


def copies_are_made(techniques: str) -> bool:
    """Return whether ranks get copies of keys that they intend and that do not move to them."""
    return techniques in ("all", "replication")
