"""The states of the random generators of a process: Python's, NumPy's, PyTorch's, and a loader's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the states of this process's generators, and of `generator`, as `tree.Encoder` takes them."""
    states = host_random_states()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if generator is not None:
        states["loader"] = generator.get_state()
    return states


def host_random_states() -> dict[str, Any]:
    """Return those of `random_states` that a process without devices has."""
    version, words, gauss = random.getstate()
    return {
        "python": [version, np.array(words, np.uint32), gauss],
        "numpy": list(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }


def check_random_states(states: dict[str, Any]) -> None:
    """Raise what `set_random_states` would (KeyError, TypeError, ValueError, RuntimeError), and set nothing."""
    version, words, gauss = states["python"]
    random.Random().setstate((version, tuple(words.tolist()), gauss))
    np.random.RandomState().set_state(tuple(states["numpy"]))
    for name in ("torch", "loader"):
        if name in states or name == "torch":
            torch.Generator().set_state(states[name])


def set_random_states(states: dict[str, Any], generator: torch.Generator | None) -> None:
    """Put the generators in the states that `random_states` gave; what is not there stays as it is."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "loader" in states and generator is not None:
        generator.set_state(states["loader"])
