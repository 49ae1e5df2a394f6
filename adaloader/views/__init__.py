"""Views of a managed table: what PyTorch gives for `weight[3]`, `weight[:-1]` or `weight.t()`, without its memory.

Imports `lookups`, `tables` and `overrides`. Read `table_slice.py` first: sizes, strides and the rows that they reach.
"""
