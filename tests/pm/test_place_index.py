"""PlaceIndex against two dictionaries."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from pm.asynchronous.place_index import PlaceIndex


@pytest.mark.parametrize("by_key", [False, True])
def test_records_and_copies_share_one_index(by_key):
    seed = secrets.randbits(32)
    print(f"{seed=}")  # shown where the test fails
    rng = np.random.default_rng(seed)
    index, records, copies = PlaceIndex(60 if by_key else None), {}, {}
    everything = np.arange(60)
    for _ in range(300):
        keys = rng.permutation(everything)[: rng.integers(0, 20)]
        slots = rng.integers(0, 1 << (30 if by_key else 40), len(keys))
        here = np.array([key in records or key in copies for key in keys.tolist()], bool)
        owned = np.array([key in records for key in keys.tolist()], bool)
        match rng.integers(5):
            case 0:
                index.copies.add(keys[~here], slots[~here])
                copies.update(zip(keys[~here].tolist(), slots[~here].tolist(), strict=True))
            case 1:
                index.records.add(keys[~here], slots[~here])
                records.update(zip(keys[~here].tolist(), slots[~here].tolist(), strict=True))
            case 2:
                index.records.put(keys[~owned], slots[~owned])
                records.update(zip(keys[~owned].tolist(), slots[~owned].tolist(), strict=True))
                for key in keys[~owned].tolist():
                    copies.pop(key, None)
            case 3:
                assert index.records.remove(keys[owned]).tolist() == [records.pop(k) for k in keys[owned].tolist()]
            case 4:
                copied = here & ~owned
                assert index.copies.remove(keys[copied]).tolist() == [copies.pop(k) for k in keys[copied].tolist()]
        keys = everything.tolist()
        assert index.records.find(everything).tolist() == [records.get(key, -1) for key in keys]
        assert index.copies.find(everything).tolist() == [copies.get(key, -1) for key in keys]
        places = [records.get(key, -2 - copies[key] if key in copies else -1) for key in keys]
        assert index.find(everything).tolist() == places
        found = index.records.items()
        assert dict(zip(*(part.tolist() for part in found), strict=True)) == records
