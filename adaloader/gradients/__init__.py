"""Gradients of managed tables: some rows and their values, where plain PyTorch has a tensor of the table's size.

A gradient is a sum of parts with scales (`row_sum.py`), on several ranks made whole when it is asked for
(`combining.py`). Imports `lookups` and `memory`. Read `row_gradient.py` first.
"""
