"""AdaLoader: replace `DataLoader`, and the model's embedding tables are managed, over any number of MPI ranks.

The way of a batch: `reading/` takes it from the dataset, `planning/` finds the rows that it needs, and in the patched
model (`model/`) its ids are looked up (`tables/`, `lookups/`, `views/`), gradients come back (`gradients/`, `dense/`)
and optimizers step (`optimizers/`). `deferred/` declares tables that no memory could hold, `checkpoint/` saves and
resumes, `ranks/` has what ranks say to each other beside that; `overrides/` and `memory/` serve the others. The room
imports `intents` (which rows a batch needs) and `pm` (where rows are). Read `loader.py` first, then `session.py`, which
ties a loader to a model.
"""

from adaloader.checkpoint import load, save
from adaloader.deferred.context import deferred_init
from adaloader.deferred.init_program import DeferredInitError
from adaloader.errors import CheckpointError, ManagedTableError, UnsupportedOptimizerError
from adaloader.loader import AdaLoader
from adaloader.model.state import full_state_dict, load_full_state_dict
from adaloader.optimizers.optimizer_state import full_optimizer_state_dict, load_full_optimizer_state_dict
from adaloader.optimizers.rowwise_adagrad import RowwiseAdagrad
from adaloader.planning.random_ids import random_ids
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
