"""Lookups: from ids in the forward pass to a slab of rows, and back to what each row's gradient is made of.

A batch under way (`batches.py`) has the rows of each of its tables (`batch_rows.py`), or, where none are foreseen, is
known by its ids (`held_ids.py`); tables that are looked up together are one block (`blocks.py`). Imports `views`,
`gradients`, `memory` and `pm`. Read `operations.py` first, then `slabs.py`.
"""
