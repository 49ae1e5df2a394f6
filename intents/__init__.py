"""Which keys a batch will look up, learned by watching one step.

A :class:`Recorder` watches the first step of a training loop and turns every lookup that it is told of into a
small program of integer operations on the batch; a :class:`Program` replays that on later batches, on any
thread, without a trace. This room imports nothing of the others but ``cuda_ops``. Read ``recorder.py`` first,
then ``tape.py`` (what is kept of a step; its entries are in ``entries.py``), ``derive.py`` (from a tape to
one program per batch), ``dims.py`` (constants that follow the sizes of a batch) and ``program.py`` (replaying).
``batch.py`` says what the tensors of a batch are, ``detours.py`` and ``among.py`` what is done about ids that
passed through Python or NumPy, or are only picked from those of the batch.
"""

from .batch import Contents, as_tensor, contents, leaves, register_container, structure, structure_of
from .modes import remove_leftovers
from .program import Program, ReplayError
from .recorder import Recorder, Recording
from .sites import Site, users_line

__all__ = [
    "Contents",
    "Program",
    "Recorder",
    "Recording",
    "ReplayError",
    "Site",
    "as_tensor",
    "contents",
    "leaves",
    "register_container",
    "remove_leftovers",
    "structure",
    "structure_of",
    "users_line",
]
