"""Where records are: fixed-size records in reserved memory, and the index from key to slot.

Memory may be this process's (`store.py`) or shared by a machine's ranks (`shared_memory.py`, `shared_store.py`).
Records leave it, whole, through `records.py`, `shards.py` and `whole_tables.py`. Read `store.py` first.
"""
