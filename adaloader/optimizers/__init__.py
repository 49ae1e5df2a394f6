"""The user's optimizers: which ones can train tables, their steps, and the state that records hold for them.

Imports `tables`, `model` and the rules of `pm`. Read `supported.py` first, then `optimizer_state.py`.
"""
