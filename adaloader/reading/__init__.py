"""Reading ahead: batches on their way from the user's dataset to the training loop.

Samples are drawn in one order for all ranks (`sampling.py`), read ahead on a thread (`lookahead.py`), planned
(`adaloader/planning/`), and handed out; a rank that runs out follows the others (`following.py`). Imports `planning`,
`lookups` and `ranks`. Read `iteration.py` first: one pass over a loader.
"""
