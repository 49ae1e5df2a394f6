"""Keys whose values have different lengths: which group each is in, and where its words are in a flat array."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """The keys of one call that are in one group.

    Args:
        group: its number.
        keys: distinct, ascending, int64 `[u]`.
        inverse: for each key as it was given, its place in `keys` (int64 `[n]`); None where they were given so.
        words: for each key as it was given, its words in the caller's array (int64 `[n, length]`); None where they
            are the rows of an array `[n, length]`.
        length: words per value.
    """

    group: int
    keys: np.ndarray
    inverse: np.ndarray | None
    words: np.ndarray | None
    length: int

    def read(self, values: np.ndarray) -> np.ndarray:
        """Return the caller's values for the keys as they were given, `[n, length]`."""
        return values if self.words is None else values.reshape(-1)[self.words]

    def write(self, pulled: np.ndarray, out: np.ndarray) -> None:
        """Write `pulled` `[u, length]` to the caller's array."""
        each = pulled if self.inverse is None else pulled[self.inverse]
        if self.words is None:
            out[...] = each
        else:
            out.reshape(-1)[self.words] = each

    def added_up(self, values: np.ndarray) -> np.ndarray:
        """Return the sum per distinct key, `[u, length]`, of the caller's values; a copy."""
        given = self.read(values)
        if self.inverse is None:
            return np.array(given)
        total = np.zeros((len(self.keys), self.length), given.dtype)
        np.add.at(total, self.inverse, given)
        return total

    def last(self, values: np.ndarray) -> np.ndarray:
        """Return the last of the caller's values for each distinct key, `[u, length]`; a copy."""
        given = self.read(values)
        if self.inverse is None:
            return np.array(given)
        chosen = np.empty((len(self.keys), self.length), given.dtype)
        chosen[self.inverse] = given  # of repeated positions the last stays
        return chosen


class Lengths:
    """The length of each key's value.

    Args:
        num_keys: number of keys.
        value_length: one length for all, or an integer array `[num_keys]`.

    Raises:
        ValueError: if a length is not positive, or the array does not have one for each key.
        TypeError: if they are not integers.
    """

    def __init__(self, num_keys: int, value_length: object):
        if not isinstance(num_keys, (int, np.integer)) or isinstance(num_keys, bool):
            raise TypeError(f"num_keys must be an int, got {num_keys!r}")
        if num_keys < 1:
            raise ValueError(f"num_keys must be at least 1, got {num_keys}")
        self.num_keys = int(num_keys)
        given = np.asarray(value_length)
        if given.dtype.kind not in "iu":
            raise TypeError(
                f"value_length must be an int, or an integer array with one length per key; got {given.dtype}"
            )
        if given.size and given.min() < 1:
            raise ValueError(f"value_length must be positive; got {given.min()}")
        if given.ndim == 0:
            self.by_group = [int(given)]
            self._group_of: np.ndarray | None = None
            return
        if given.shape != (num_keys,):
            raise ValueError(f"value_length must have one length for each of {num_keys} keys; got shape {given.shape}")
        distinct, group_of = np.unique(given, return_inverse=True)
        self.by_group = [int(length) for length in distinct]
        self._group_of = group_of.astype(np.uint8 if len(distinct) <= 256 else np.int32) if len(distinct) > 1 else None

    def __str__(self) -> str:
        if self.is_uniform:
            return str(self.by_group[0])
        return np.array2string(self._lengths_of(slice(None)), separator=", ", threshold=16)

    def digest(self) -> bytes:
        """Return bytes that are the same where each key's length is."""
        digest = hashlib.blake2b(np.array(self.by_group, np.int64), digest_size=16)
        if self._group_of is not None:
            digest.update(self._group_of)
        return digest.digest()

    @property
    def is_uniform(self) -> bool:
        """Whether all values have one length."""
        return self._group_of is None

    def keys_in(self, group: int) -> int:
        """Return how many keys are in a group."""
        return self.num_keys if self._group_of is None else int((self._group_of == group).sum())

    def groups_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of each key's group, `[n]`."""
        return np.zeros(len(keys), np.int64) if self._group_of is None else self._group_of[keys]

    def check(self, keys: object) -> np.ndarray:
        """Return keys as int64 `[n]`.

        Raises:
            TypeError: if they are not integers.
            ValueError: if they have more than one dimension.
            IndexError: if one is out of range.
        """
        array = np.asarray(keys)
        if array.ndim != 1:
            raise ValueError(f"keys must have one dimension, got shape {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"keys must be integers, got {array.dtype}")
        if array.size and (array.min() < 0 or array.max() >= self.num_keys):
            bad = array.min() if array.min() < 0 else array.max()
            raise IndexError(f"key {bad} is out of range (keys are 0 to {self.num_keys - 1})")
        return array.astype(np.int64, copy=False)

    def check_values(
        self, values: object, keys: np.ndarray, dtype: np.dtype, name: str, *, written: bool = False
    ) -> np.ndarray:
        """Return `values` as an array that shares their memory; `written`: it will be written to.

        Raises:
            TypeError: if they are neither an array nor a tensor of `dtype` in host memory.
            ValueError: if their shape does not fit the keys, or they are `written` and cannot be.
        """
        array = values if isinstance(values, np.ndarray) else _of_tensor(values, dtype, name)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, as the manager's values are; got {array.dtype}")
        if written and not array.flags.writeable:
            raise ValueError(f"{name} is written to, and got a read-only array; pass a copy of it, or a new one")
        if self.is_uniform:
            wanted = (len(keys), self.by_group[0])
            if array.shape != wanted and array.shape != (wanted[0] * wanted[1],):
                raise ValueError(
                    f"{name} must have shape {wanted} (or be flat) for {len(keys)} keys; got {array.shape}"
                )
            if not array.flags.c_contiguous:
                raise ValueError(f"{name} must be contiguous")
            return array.reshape(wanted)
        words = int(self._lengths_of(keys).sum())
        if array.shape != (words,):
            raise ValueError(f"{name} must be flat, with {words} values for these {len(keys)} keys; got {array.shape}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous")
        return array

    def _lengths_of(self, keys: np.ndarray | slice) -> np.ndarray:
        return np.array(self.by_group, np.int64)[self._group_of[keys]]

    def parts(self, keys: np.ndarray) -> list[Part]:
        """Return the keys of a call by group."""
        if self._group_of is None:
            return [Part(0, *_distinct(keys), None, self.by_group[0])]
        groups = self._group_of[keys]
        lengths = self._lengths_of(keys)
        starts = np.cumsum(lengths) - lengths
        parts = []
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            length = self.by_group[group]
            words = starts[at][:, None] + np.arange(length)
            parts.append(Part(group, *_distinct(keys[at]), words, length))
        return parts


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if len(keys) < 2 or bool((keys[1:] > keys[:-1]).all()):
        return keys.copy(), None
    return np.unique(keys, return_inverse=True)


def _of_tensor(values: object, dtype: np.dtype, name: str) -> np.ndarray:
    if not hasattr(values, "detach"):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(values).__name__}")
    if values.device.type != "cpu":
        raise TypeError(f"{name} must be in host memory, got a tensor on {values.device}")
    try:
        return values.detach().numpy()
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse
        raise TypeError(
            f"{name} must be a dense tensor of {dtype}, as the manager's values are; got one of {values.dtype} "
            f"({values.layout})"
        ) from error
