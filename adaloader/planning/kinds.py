"""Which of several learned programs a batch will follow: told from its flags and sizes, by a small decision tree.

A model may take another way through its code for another task, length or flag. Each way is a program; each batch whose
lookups were seen is an example of the way that such a batch takes. Nothing of this need be right: what a batch really
looks up is compared with what was foreseen, and becomes the next example.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import torch

from intents import Contents, Program

Features = dict[str, Any]

_MOST_EXAMPLES = 64
_MOST_PROGRAMS = 6  # of one structure
_MOST_AT_A_TIME = 3  # programs that a batch is intended for, where nothing tells them apart
_MOST_FEATURES = 200
UNKNOWN = -1
"""Label of a batch that took a way which none of the programs describes."""


def features_of(found: Contents) -> Features:
    """What a program may be chosen by: flags, whole numbers, sizes, and first values of what is short of dimensions."""
    features: Features = {path: value for path, value in found.flags if isinstance(value, Hashable)}
    for path, leaf in found.traced[:_MOST_FEATURES]:
        if isinstance(leaf, int):
            features[path] = leaf
        elif isinstance(leaf, (list, tuple)):
            features[f"len(batch{path})"] = len(leaf)
        else:
            for dim, size in enumerate(leaf.shape):
                features[f"batch{path}.shape[{dim}]"] = size
            value = _value_of(leaf)
            if value is not None:
                features[f"{path}.item()" if leaf.ndim == 0 else f"batch{path}[0]"] = value
    return features


def _value_of(leaf: torch.Tensor | np.ndarray) -> int | bool | None:
    """What a branch may ask of a leaf: the value of a scalar, the first of several, where it is a whole number."""
    if leaf.ndim > 1 or (isinstance(leaf, torch.Tensor) and (leaf.layout is not torch.strided or leaf.is_complex())):
        return None
    if 0 in leaf.shape or leaf.device.type != "cpu" if isinstance(leaf, torch.Tensor) else 0 in leaf.shape:
        return None
    value = (leaf if leaf.ndim == 0 else leaf[0]).item()
    return None if isinstance(value, float) else value


def flags_of(features: Features) -> Features:
    """The features that are no sizes: two batches that differ in these may be of two kinds."""
    return {name: value for name, value in features.items() if not name.startswith(("batch", "len("))}


def choices_of(features: Features) -> Features:
    """The flags that are no numbers: names and truth values, by which a model may choose its way."""
    return {name: value for name, value in flags_of(features).items() if type(value) is not int}


@dataclass(frozen=True)
class _Split:
    """Batches whose feature is (`exact`) or is at most `value` go left."""

    feature: str
    value: Any
    exact: bool
    left: _Split | tuple[int, ...]
    right: _Split | tuple[int, ...]

    def goes_left(self, features: Features) -> bool:
        return _goes_left(features, self.feature, self.value, self.exact)


class Kinds:
    """The programs for batches of one structure, and the examples by which one of them is chosen.

    Invariant: labels of examples are places in `programs`, or UNKNOWN; the tree is of these examples. The trainer's
    thread changes it, planners read it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.programs: list[Program] = []
        self._first: list[Features] = []
        self._watched: list[Features] = []
        self._examples: deque[tuple[Features, int]] = deque(maxlen=_MOST_EXAMPLES)
        self._tree: _Split | tuple[int, ...] = ()

    @property
    def is_ambiguous(self) -> bool:
        """Whether there is anything to choose from."""
        return len({label for _, label in self._examples}) > 1

    def keep(self, program: Program, features: Features) -> Program:
        """Add a program, or refine one with it that is of the same operations; return what is kept."""
        with self._lock:
            if choices_of(features) not in self._watched:
                self._watched.append(choices_of(features))
            return self._keep(program, features)

    def _keep(self, program: Program, features: Features) -> Program:
        for at, known in enumerate(self.programs):
            refined = known.refine(program)
            if refined is None:
                continue
            differs = choices_of(features) != choices_of(self._first[at])
            differs |= flags_of(features) != flags_of(self._first[at]) and len(refined.derived) < len(program.derived)
            if differs and len(self.programs) < _MOST_PROGRAMS and not known.foretells(program):
                continue  # one kind of batch each, rather than one program that is made to fit both
            self.programs[at] = refined
            self._learned(features, at)
            return refined
        if len(self.programs) == _MOST_PROGRAMS:
            self._drop_oldest()
        self.programs.append(program)
        self._first.append(features)
        self._learned(features, len(self.programs) - 1)
        return program

    def _drop_oldest(self) -> None:
        """Forget the program that was followed least of late."""
        followed = Counter(label for _, label in self._examples)
        at = min(range(len(self.programs)), key=lambda place: (followed[place], place))
        del self.programs[at], self._first[at]
        kept = [(features, label - (label > at)) for features, label in self._examples if label != at]
        self._examples = deque(kept, maxlen=_MOST_EXAMPLES)

    def _learned(self, features: Features, label: int) -> None:
        known = [(old, of) for old, of in self._examples if of != UNKNOWN]
        self._examples = deque(known, maxlen=_MOST_EXAMPLES)
        self._teach(features, label)

    def is_new(self, features: Features) -> bool:
        """Whether a batch with such flags was never watched: it may take another way."""
        choices = choices_of(features)
        with self._lock:
            return bool(choices) and len(self._watched) < _MOST_PROGRAMS and choices not in self._watched

    def teach(self, features: Features, label: int) -> None:
        """A batch with these features followed program number `label`, or none (UNKNOWN)."""
        with self._lock:
            self._teach(features, label)

    def _teach(self, features: Features, label: int) -> None:
        self._examples.append((features, label))
        self._tree = _grow(list(self._examples))

    def choose(self, features: Features) -> list[tuple[int, Program]]:
        """Return the programs that a batch may follow, with their numbers, the likeliest first: more than one where
        nothing tells."""
        with self._lock:
            labels = [label for label in self._labels(features) if label != UNKNOWN]
            if not labels:
                recent = [label for _, label in reversed(self._examples) if label != UNKNOWN]
                labels = recent[:1] or list(range(len(self.programs)))[-1:]
            return [(label, self.programs[label]) for label in labels[:_MOST_AT_A_TIME]]

    def is_unknown(self, features: Features) -> bool:
        """Whether batches like this one took a way that no program describes."""
        return UNKNOWN in self._labels(features)

    def _labels(self, features: Features) -> tuple[int, ...]:
        node = self._tree
        while isinstance(node, _Split):
            node = node.left if node.goes_left(features) else node.right
        return node


def _grow(examples: list[tuple[Features, int]]) -> _Split | tuple[int, ...]:
    labels = [label for _, label in examples]
    best, best_entropy = None, _entropy(labels) * len(labels) - 1e-9
    for feature, value, exact in _questions(examples) if best_entropy > 0 else ():
        left = [label for features, label in examples if _goes_left(features, feature, value, exact)]
        right = [label for features, label in examples if not _goes_left(features, feature, value, exact)]
        entropy = _entropy(left) * len(left) + _entropy(right) * len(right)
        if left and right and entropy < best_entropy:
            best, best_entropy = (feature, value, exact), entropy
    if best is None:
        newest_first = list(reversed(labels))
        return tuple(sorted(set(labels), key=newest_first.index))
    sides: tuple[list, list] = ([], [])
    for example in examples:
        sides[not _goes_left(example[0], *best)].append(example)
    return _Split(*best, _grow(sides[0]), _grow(sides[1]))


def _questions(examples: list[tuple[Features, int]]):
    """Flags first, first values last: where a flag tells as much as they do, it is what the model asks."""
    names = dict.fromkeys(name for features, _ in examples for name in features)
    for name in sorted(names, key=_order_of_asking):
        values = {features.get(name) for features, _ in examples}
        if len(values) < 2:
            continue
        numbers = sorted(value for value in values if type(value) is int)
        if len(numbers) < len(values) or len(numbers) == 2:
            for value in values:
                yield name, value, True
        for low, high in zip(numbers, numbers[1:], strict=False):
            yield name, (low + high) / 2, False


def _order_of_asking(name: str) -> int:
    return 2 if name.endswith("[0]") else int(name.startswith(("batch", "len(")))


def _goes_left(features: Features, feature: str, value: Any, exact: bool) -> bool:
    given = features.get(feature)
    if exact:
        return given == value
    return type(given) is int and given <= value


def _entropy(labels: list[int]) -> float:
    counts = Counter(labels).values()
    return -sum(count / len(labels) * log2(count / len(labels)) for count in counts) if labels else 0.0
