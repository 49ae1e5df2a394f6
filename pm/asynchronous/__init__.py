"""The asynchronous protocol: ranks need not wait for each other's changes, or not for the last s steps of them.

A `Node` has one rank's part in it, without input or output; `runtime.py` runs it on MPI, `pm/simulated/` on a virtual
network. Imports `storage`. Read `node.py` first, then `claims.py` (the asking side), `grants.py` (the owner's) and
`eventual.py` (for loaders).
"""
