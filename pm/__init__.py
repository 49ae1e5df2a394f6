"""The parameter manager: keeps tables' rows as records on the ranks that own them, and brings them where needed.

A `Manager` serves one rank; a `SynchronousManager` several, over MPI, with results that equal one process's. Records
live in `store.py`, who owns a key is asked of `directory.py`, and one background thread per rank (`transport.py`) moves
typed messages (`messages.py`). The room imports `intents` (timing) and `cuda_ops`. Read `manager.py` first, then
`synchronous.py`, `asking.py` (intents), `serving.py` (owning rows) and `moving.py` (giving them away).
"""

from pm.dense_rules import Adadelta, Adam, Adamax, DecayingAdagrad, MomentumSGD, NAdam, RAdam, RMSprop
from pm.manager import Manager
from pm.rules import SGD, Adagrad, Frozen, RowwiseAdagrad, Rule, SparseAdam
from pm.synchronous import SynchronousManager
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.techniques import techniques_named
from pm.waiting import PeerError

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "DecayingAdagrad",
    "Frozen",
    "Manager",
    "MomentumSGD",
    "NAdam",
    "PeerError",
    "RAdam",
    "RMSprop",
    "RowPlan",
    "RowwiseAdagrad",
    "Rule",
    "SparseAdam",
    "SynchronousManager",
    "Table",
    "TableGradient",
    "TableSpec",
    "techniques_named",
]
