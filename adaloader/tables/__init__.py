"""A managed table: the parameter that stands for it in the model, its lookups and gradient, and other uses of it.

A parameter begins as a candidate (`candidate.py`) or on probation (`probation.py`); what is done to it as a whole,
rather than by lookups, is answered by `whole_use.py`, `dense_use.py` and `writes.py`, for which ranks meet in
`joint_writes.py`. Imports `lookups`, `views`, `gradients` and `optimizers`. Read `managed_table.py` first, then
`table_parameter.py`.
"""
