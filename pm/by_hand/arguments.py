"""The arguments of a `ParameterManager`: what they may be, and that all ranks gave the same."""

from __future__ import annotations

import hashlib
import numbers
import operator
from collections.abc import Mapping

import numpy as np

from pm.launch import await_all

_DIGEST_BYTES = 16


def check_count(name: str, value: object, what: str) -> int:
    """Return an argument that is an integer, 0 or more; `what` says of what it is the number.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is below 0.
    """
    count = check_integer(name, value, f"{what}, 0 or more")
    if count < 0:
        raise ValueError(f"{name} must be {what}, 0 or more; got {value!r}")
    return count


def check_integer(name: str, value: object, what: str) -> int:
    """Return an argument as an int; raises TypeError if it is none."""
    try:
        return operator.index(None if isinstance(value, bool) else value)
    except TypeError as error:
        raise TypeError(f"{name} must be {what}; got {value!r}") from error


def check_positive(name: str, value: object, what: str) -> float:
    """Return an argument that is a number above 0 as a float; raises as `check_count`."""
    if not _is_number(value):
        raise TypeError(f"{name} must be {what}, more than 0; got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be {what}, more than 0; got {value!r}")
    return float(value)


def check_staleness(staleness: object) -> int | None:
    """Return `staleness` as an int or None; raises as `check_count`."""
    return None if staleness is None else check_count("staleness", staleness, "None (no bound) or a number of clocks")


def check_update_threshold(update_threshold: object, staleness: int | None) -> float:
    """Return `update_threshold` as a float, 0.0 for None; raises as `check_count`."""
    if update_threshold is None:
        return 0.0
    if not _is_number(update_threshold):
        raise TypeError(f"update_threshold must be None or a number, 0 or more; got {update_threshold!r}")
    if not update_threshold >= 0:
        raise ValueError(f"update_threshold must be None or a number, 0 or more; got {update_threshold!r}")
    if update_threshold and staleness == 0:
        raise ValueError(
            f"update_threshold={update_threshold!r} holds changes back, which staleness=0 does not allow; leave one of "
            "them out"
        )
    return float(update_threshold)


def check_flag(name: str, value: object) -> bool:
    """Return an argument that is True or False; raises TypeError if it is neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def check_comm(comm: object) -> None:
    """Raise TypeError unless `comm` is a communicator, or None."""
    if comm is not None and not hasattr(comm, "Dup"):
        raise TypeError(
            f"comm must be an mpi4py communicator, or None for all processes; got {comm!r} ({type(comm).__name__})"
        )


def check_same(comm, arguments: Mapping[str, tuple[object, bytes]]) -> None:
    """Raise ValueError on every rank unless all ranks gave the same arguments (collective).

    Args:
        comm: mpi4py communicator; None for a rank that is alone.
        arguments: by name, the same names on all ranks: the argument, which the message shows, and bytes that are the
            same where it is.
    """
    if comm is None or comm.size == 1:
        return
    mine = np.array([_digest(of_bytes) for _, of_bytes in arguments.values()])
    of_ranks = np.empty((comm.size, *mine.shape), np.uint8)
    await_all(comm)
    comm.Allgather(mine, of_ranks)
    differs = (of_ranks != of_ranks[0]).any(axis=2)
    if differs.any():
        named = [
            f"ranks {np.flatnonzero(differs[:, at]).tolist()} have another {name} than rank 0 (here: {value})"
            for at, (name, (value, _)) in enumerate(arguments.items())
            if differs[:, at].any()
        ]
        raise ValueError(
            f"{'; '.join(named)}; this is rank {comm.rank}. Give all ranks the same {', '.join(arguments)}"
        )


def _digest(of_bytes: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(of_bytes, digest_size=_DIGEST_BYTES).digest(), np.uint8)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
