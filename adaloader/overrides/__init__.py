"""What we must know of PyTorch to stand in for its tensors: its functions, conversions and compiler.

Imports nothing of ours but errors. Read `native.py` first.
"""
