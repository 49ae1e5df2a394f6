"""Which ways of bringing rows to a rank may be used: all of them, or fewer, to see what each is worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Techniques:
    """What a choice of techniques allows.

    Args:
        plans: ranks say beforehand which rows they are going to use.
        moves: a row that one rank alone needs moves there.
        copies_ahead: a row that several need is copied to each before it is used, not when it asks.
    """

    plans: bool
    moves: bool
    copies_ahead: bool


TECHNIQUES = {
    "all": Techniques(plans=True, moves=True, copies_ahead=True),
    "relocation": Techniques(plans=True, moves=True, copies_ahead=False),
    "replication": Techniques(plans=True, moves=False, copies_ahead=True),
    "none": Techniques(plans=False, moves=False, copies_ahead=False),
}


def techniques_named(name: object) -> Techniques:
    """Return the techniques of this name.

    Raises:
        ValueError: if there are none; names those that there are.
    """
    if not isinstance(name, str) or name not in TECHNIQUES:
        names = ", ".join(f'"{known}"' for known in TECHNIQUES)
        raise ValueError(f"techniques must be one of {names}; got {name!r}")
    return TECHNIQUES[name]
