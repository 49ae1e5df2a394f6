"""Which ways of bringing rows to a rank a synchronous manager may use: all, or fewer, to see what each is worth."""

from __future__ import annotations

from dataclasses import dataclass

from pm.decision import check_techniques


@dataclass(frozen=True)
class Techniques:
    """What a choice of techniques allows.

    Args:
        plans: ranks say beforehand which rows they are going to use.
        moves: a row that one rank alone needs may move there.
        copies_ahead: a row that several need is copied to each before it is used, not when it asks.
    """

    plans: bool
    moves: bool
    copies_ahead: bool


_BY_NAME = {
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
    check_techniques(name)
    return _BY_NAME[name]
