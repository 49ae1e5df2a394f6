"""How the tests of several ranks wait for each other."""

import time


def meet(comm) -> None:
    """Wait, asleep, until every rank is here; not through the manager that is under test (collective)."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-4)
