"""How keys came and went on one rank: remembered for questions, and written to a file where that is asked for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from pm import masks
from pm.asynchronous.holdings import Copy
from pm.recorder import Recorder

if TYPE_CHECKING:
    from pm.asynchronous.node import Node

_REMEMBERED_EVENTS = 4096

_WHY_COPY = {
    Copy.WANTED: "this rank intends it and is about to ask its owner for it",
    Copy.REQUESTED: "this rank intends it and has asked for it",
    Copy.ACTIVE: "a copy: this rank intends it, and so does another, or its owner",
    Copy.REFUSED: "not here: this rank intends it, but another does too, and no copies are made",
    Copy.PUT_OFF: "not here yet: this rank will use it, others do now, and it asks again when its use is near",
    Copy.LEAVING: "a copy that this rank has given up",
}


class Moves:
    """What has happened to keys on one rank.

    Args:
        node: of the rank; its `record` is taken.
        recorder: where every event is written too, or None.
    """

    def __init__(self, node: Node, recorder: Recorder | None = None):
        self._node = node
        self._recorder = recorder
        self._last: deque[tuple[int, str, int, np.ndarray, int]] = deque(maxlen=_REMEMBERED_EVENTS)
        node.record = self._note

    def _note(self, what: str, group: int, keys: np.ndarray, other: int) -> None:
        if not len(keys):
            return
        at = self._node.counts["rounds"]
        self._last.append((at, what, group, keys, other))
        if self._recorder is not None:
            self._recorder.note(what, group, keys, round=at, other=other)

    def explain(self, group: int, key: int) -> dict[str, object]:
        """Return, for people, what this rank knows of a key."""
        node, keys = self._node, np.array([key], np.int64)
        holdings = node.holdings[group]
        (slot,) = node.grants.find_or_make(holdings, keys).tolist()
        at, states = holdings.copies.find(keys)
        told: dict[str, object] = {"key": key, "rank": node.rank, **node.locations[group].where(key)}
        if slot >= 0:
            owned = holdings.owned
            holders = [r for r in range(node.ranks) if masks.contains(owned.holders[slot : slot + 1], r)[0]]
            told |= {
                "here": "owned",
                "believed owner": node.rank,
                "live intents": int(owned.live[slot]),
                "holders": holders,
                "moves": int(owned.counters[slot]),
                "why": self._why_owned(int(owned.live[slot]), holders),
            }
        elif at[0] >= 0:
            copies = holdings.copies
            told |= {
                "here": Copy(int(states[0])).name.lower(),
                "live intents": int(copies.live[at[0]]),
                "why": _WHY_COPY[Copy(int(states[0]))],
            }
            if copies.owners[at[0]] >= 0:
                told["believed owner"] = int(copies.owners[at[0]])
        else:
            told |= {"here": "no", "live intents": 0, "why": "this rank does not intend it"}
        told["last events"] = [
            {"round": round_number, "what": what, "other rank": other}
            for round_number, what, of, some, other in self._last
            if of == group and key in some
        ][-5:]
        return told

    @staticmethod
    def _why_owned(live: int, holders: list[int]) -> str:
        if holders:
            return f"rank {', '.join(map(str, holders))} intends it too, and has a copy where copies are made"
        if live:
            return "this rank alone intends it"
        return "nobody intends it; it stays where it was used last, or at home"
