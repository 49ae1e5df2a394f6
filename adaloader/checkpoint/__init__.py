"""Checkpoints: everything that a run needs to go on, written and read by all ranks together.

`saving.py` and `restoring.py` are the two ways; `layout.py` says what lies on the disk, `tensor_file.py` is the format
of its files, `tree.py` how nested state becomes JSON and tensors, `tables.py` and `table_loading.py` what becomes of
rows; what a save has cut, `writing.py` writes in the background. Read `layout.py` first.
"""

from adaloader.checkpoint.restoring import load
from adaloader.checkpoint.saving import save

__all__ = ["load", "save"]
