"""The manager by hand: AdaPM's primitives (arXiv 2206.00470) for programs without a loader.

Imports `asynchronous`. Read `parameter_manager.py` first, then `worker.py`.
"""
