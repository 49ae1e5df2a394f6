"""Leaves and structure of batches."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from intents import as_tensor, contents, leaves, register_container, structure

X = torch.arange(3)
Pair = namedtuple("Pair", "left right")


@dataclass
class Sample:
    ids: torch.Tensor
    extra: dict = field(default_factory=dict)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Loop:
    def __init__(self):
        self.x = X
        self.me = self
        self.friends = [self, {"self": self}]


class Lazy:
    def __init__(self):
        self._x = X

    @property
    def computed(self):
        raise AssertionError("a property was read")


@pytest.mark.parametrize(
    "batch, paths",
    [
        (X, [""]),
        ([X, (X, X)], ["[0]", "[1][0]", "[1][1]"]),
        ({"a": X, 3: [X], ("t", 1): X}, ["['a']", "[3][0]", "[('t', 1)]"]),
        (OrderedDict(b=X, a=X), ["['b']", "['a']"]),
        (Pair(X, [Pair(1, X)]), [".left", ".right[0].right"]),
        (Sample(X, {"more": X}), [".ids", ".extra['more']"]),
        (Loop(), [".x"]),
        (Lazy(), ["._x"]),
        (["text", b"bytes", 1, 2.0, None, True, len, torch, torch.float32, Sample], []),
        (torch.nn.Linear(2, 2), []),
        ([], []),
        (None, []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_paths(batch, paths):
    found = leaves(batch)
    assert [path for path, _ in found] == paths
    assert all(leaf is X for _, leaf in found)


def test_one_object_at_two_places_is_found_twice():
    shared = [X]
    assert [path for path, _ in leaves({"a": shared, "b": shared})] == ["['a'][0]", "['b'][0]"]


def test_registered_container():
    assert leaves(Slotted(X)) == []
    register_container(Slotted, lambda node: [(".inner", node.inner)])
    assert [path for path, _ in leaves([Slotted([X])])] == ["[0].inner[0]"]

    class Derived(Slotted):
        pass

    assert [path for path, _ in leaves(Derived(X))] == [".inner"]
    with pytest.raises(TypeError, match="takes a class"):
        register_container(Slotted(X), lambda node: [])


def test_structure_forgets_sizes_and_nothing_else():
    base = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.long)}
    hash(structure(base))
    assert structure(base) == structure({"a": torch.zeros(0, 9), "b": torch.zeros(1, dtype=torch.long)})
    for other in (
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(3), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].to("meta"), "b": base["b"]},
        [base["a"], base["b"]],
    ):
        assert structure(other) != structure(base)


def test_numbers_arrays_and_flags_are_told_apart():
    batch = {
        "tensor": X,
        "array": np.arange(3),
        "number": 7,
        "lengths": [3, 4],
        "names": ["a", "b"] * 9,
        "on": True,
        "task": "click",
        "none": None,
        "words": np.array(["x", "y"]),
    }
    found = contents(batch)
    assert [path for path, _ in found.traced] == ["['tensor']", "['array']", "['number']", "['lengths']"]
    assert dict(found.flags) == {"['on']": True, "['task']": "click", "['none']": None}
    assert [path for path, _ in leaves(batch)] == ["['tensor']"]
    assert structure(batch) == structure(batch | {"number": 9, "on": False, "lengths": [1]})
    assert structure(batch) != structure(batch | {"number": None})
    assert as_tensor(batch["array"]).data_ptr() == batch["array"].ctypes.data
    assert as_tensor(batch["lengths"]).tolist() == [3, 4] and as_tensor(7).item() == 7
