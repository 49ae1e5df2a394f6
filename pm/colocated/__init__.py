"""Ranks of one machine: they read each other's rows where they are, and send what they need alike once.

Imports `storage`. Read `machine.py` first, then `neighbours.py` (others' stores) and `shared_tables.py` (one store for
all).
"""
