"""Deferred tables: parameters that are declared and never built, whose rows are made when they are first touched.

A deferred tensor notes what PyTorch's initialisers would do to it (`init_steps.py`) as a program that makes any row on
its own (`init_program.py`). Read `context.py` first: `deferred_init`.
"""
