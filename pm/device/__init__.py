"""The rows of the lookahead window on a device: what is kept there, and what goes first.

Imports `storage`. Read `device_cache.py` first (Belady's rule), then `cached_manager.py`.
"""
