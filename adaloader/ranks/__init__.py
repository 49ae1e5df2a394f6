"""What ranks do with each other outside of the parameter manager: agree, say where they are, and end together.

Imports `pm`. Read `communicator.py` first.
"""
