"""The managed model: what is known of a model whose tables are managed, and how it comes to that and leaves it.

Parameters are taken over as tables (`adoption.py`), their values leave again as plain tensors (`state.py`). Imports
most other folders. Read `managed_model.py` first, then `managing.py`.
"""
