"""The parameter manager: keeps tables' rows as records on the ranks that own them, and brings them where needed.

A `Manager` serves one rank; a `SynchronousManager` several, over MPI, with results that equal one process's. Where
ranks need not wait for each other, a `Node` (`node.py`: the protocol without input or output) is run by a `Runtime`, on
which `ParameterManager`, the manager by hand, stands. Records live in `store.py`, who owns a key is asked of
`directory.py` (`locations.py` of a node), and one background thread per rank (`transport.py`) moves typed messages
(`messages.py`). Ranks of one machine read each other's records in shared memory (`neighbours.py`, `in_place.py`); where
all are on one, most tables are in a store of all of them (`shared_tables.py`, `shared_store.py`, `shared_steps.py`).
The room imports `intents` (timing) and `cuda_ops`. Read `manager.py` first, then `synchronous.py`,
`asking.py` (intents), `serving.py` (owning rows) and `moving.py` (giving them away); for the asynchronous protocol
`node.py`.
"""

from pm.cached_manager import CachedManager
from pm.dense_rules import Adadelta, Adam, Adamax, DecayingAdagrad, MomentumSGD, NAdam, RAdam, RMSprop
from pm.eventual import EventualManager
from pm.manager import Manager
from pm.parameter_manager import ParameterManager
from pm.rules import SGD, Adagrad, Frozen, RowwiseAdagrad, Rule, SparseAdam
from pm.synchronous import SynchronousManager
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.waiting import PeerError
from pm.worker import Worker

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "CachedManager",
    "DecayingAdagrad",
    "EventualManager",
    "Frozen",
    "Manager",
    "MomentumSGD",
    "NAdam",
    "ParameterManager",
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
    "Worker",
]
