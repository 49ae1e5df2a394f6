"""The protocol on virtual ranks, a virtual network and virtual time, with what must hold looked at after each turn.

The command lines are `pm/simulator.py` and `pm/lockstep_simulator.py`. Imports `asynchronous`. Read `simulation.py`
first.
"""
