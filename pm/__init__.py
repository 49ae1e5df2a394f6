"""The parameter manager: keeps tables' rows as records on the ranks that own them, and brings them where needed.

A `Manager` serves one rank (`manager.py`). Of several ranks a `SynchronousManager` gives results that equal one
process's (`exact/`); where ranks need not wait for each other, a `Node` is run by a `Runtime` (`asynchronous/`), on
which `ParameterManager`, the manager by hand, stands too (`by_hand/`). One background thread per rank (`transport.py`)
moves typed messages (`messages.py`); ranks of one machine read each other's records in memory that they share
(`colocated/`). Records live in `storage/`, some on a device (`device/`), and move on as `rules.py` says; `simulated/`
runs both protocols on virtual ranks. The room imports `intents` (timing) and `cuda_ops`. Read `manager.py` first, then
`exact/synchronous.py`; for the asynchronous protocol `asynchronous/node.py`.
"""

from pm.asynchronous.eventual import EventualManager
from pm.by_hand.parameter_manager import ParameterManager
from pm.by_hand.worker import Worker
from pm.dense_rules import Adadelta, Adam, Adamax, DecayingAdagrad, MomentumSGD, NAdam, RAdam, RMSprop
from pm.device.cached_manager import CachedManager
from pm.exact.synchronous import SynchronousManager
from pm.manager import Manager
from pm.rules import SGD, Adagrad, Frozen, RowwiseAdagrad, Rule, SparseAdam
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.waiting import PeerError

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
