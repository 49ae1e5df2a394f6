"""The exact protocol, staleness 0: every lookup sees every step before it, wherever rows are and however they moved.

Imports `storage` and `colocated`. Read `synchronous.py` first, then `asking.py` (intents), `serving.py` (owning rows)
and `moving.py` (giving them away).
"""
