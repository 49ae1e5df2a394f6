"""AdaLoader: replace `DataLoader`, and the model's embedding tables are managed, over any number of MPI ranks.

`loader.py` holds the loader; `session.py` ties it to a model, which `managing.py` begins to manage; `managed_model.py`
and `managed_table.py` are what the patched model looks rows up in; `feed.py` and `planner.py` read ahead; `checkpoint/`
saves and resumes. The room imports `intents` (which rows a batch needs) and `pm` (where rows are). Read `loader.py`
first.
"""

from adaloader.checkpoint import load, save
from adaloader.deferred import deferred_init
from adaloader.errors import CheckpointError, ManagedTableError, UnsupportedOptimizerError
from adaloader.init_program import DeferredInitError
from adaloader.loader import AdaLoader
from adaloader.optimizer_state import full_optimizer_state_dict, load_full_optimizer_state_dict
from adaloader.random_ids import random_ids
from adaloader.rowwise_adagrad import RowwiseAdagrad
from adaloader.state import full_state_dict, load_full_state_dict
from pm import PeerError

__all__ = [
    "AdaLoader",
    "CheckpointError",
    "DeferredInitError",
    "ManagedTableError",
    "PeerError",
    "RowwiseAdagrad",
    "UnsupportedOptimizerError",
    "deferred_init",
    "full_optimizer_state_dict",
    "full_state_dict",
    "load",
    "load_full_optimizer_state_dict",
    "load_full_state_dict",
    "random_ids",
    "save",
]
