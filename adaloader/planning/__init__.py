"""Planning: from a batch that was read to the rows that it needs.

The loader watches a step now and then (`watch.py`) and replays what it saw on batches ahead (`intents`); users may say
it themselves (`given_keys.py`). Imports `tables` and `lookups`, `intents` and `pm`. Read `planner.py` first: the thread
that does it.
"""
