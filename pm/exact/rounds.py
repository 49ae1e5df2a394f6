"""What has arrived at an owner for a step that is not applied yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from pm.colocated.machine_sums import ArrivedSums
from pm.exact.asked import AskedPlan
from pm.pieces import Piece
from pm.same_step import Stepped
from pm.storage.slot_notes import SlotNotes


@dataclass
class Round:
    """What has arrived for one step: gradients by table and rank, and who has handed over its STEP.

    `pinned` are slots that must stay here until the step is applied, `released` plans that are over then, `sums` what
    other machines have summed.
    """

    pieces: dict[int, dict[int, list[Piece]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    stepped: dict[int, Stepped] = field(default_factory=dict)
    pinned: list[tuple[SlotNotes, np.ndarray]] = field(default_factory=list)
    released: list[tuple[int, AskedPlan]] = field(default_factory=list)
    sums: ArrivedSums = field(default_factory=ArrivedSums)


def step_of(arrived: Round | None, among: Collection[int]) -> Stepped | None:
    """Return what one of the ranks `among` says of its step in what has arrived, None if none has."""
    if arrived is not None:
        for source in list(arrived.stepped):
            if source in among:
                return arrived.stepped[source]
    return None
