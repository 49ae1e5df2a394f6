"""Gradients of managed tables: some rows and their values, where plain PyTorch has a tensor of the table's size.

What backwards give (`parts.py`, for several tables at once `block_gradient.py`) is a sum with scales (`row_sum.py`), on
several ranks made whole when it is asked for (`combining.py`). Imports `memory` and `overrides`. Read `row_gradient.py`
first.
"""
