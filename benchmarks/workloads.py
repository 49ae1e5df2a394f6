"""What ranks look up in a step: four workloads, by name.

ctr        26 fields, each with its share of the rows, ids Zipf-distributed (1.05)
graph      rows are partitioned over the ranks; of a sample's 10 neighbours one is drawn from anywhere
knowledge  triples of Zipf-distributed entities (1.0), few relations, and negatives drawn uniformly, 8 a triple
uniform    26 ids from anywhere
"""

from __future__ import annotations

import numpy as np

FIELDS = 26
NEIGHBOURS = 10
NEGATIVES = 8
RELATIONS = 200


def zipf(rng: np.random.Generator, exponent: float, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return Zipf-distributed ids below `rows`, low ones most often (by inverting the continuous distribution)."""
    u = rng.random(shape)
    if exponent == 1.0:
        ids = np.exp(u * np.log(rows + 1.0))
    else:
        power = 1.0 - exponent
        ids = (1.0 + u * ((rows + 1.0) ** power - 1.0)) ** (1.0 / power)
    return np.minimum(ids.astype(np.int64) - 1, rows - 1)


def ctr(rng: np.random.Generator, rows: int, samples: int, rank: int, ranks: int) -> np.ndarray:
    per_field = rows // FIELDS
    return zipf(rng, 1.05, per_field, (samples, FIELDS)) + per_field * np.arange(FIELDS)


def graph(rng: np.random.Generator, rows: int, samples: int, rank: int, ranks: int) -> np.ndarray:
    part = rows // ranks
    mine = rng.integers(0, part, (samples, NEIGHBOURS)) + part * rank
    mine[:, 0] = rng.integers(0, rows, samples)
    return mine


def knowledge(rng: np.random.Generator, rows: int, samples: int, rank: int, ranks: int) -> np.ndarray:
    entities = rows - RELATIONS
    heads_and_tails = zipf(rng, 1.0, entities, (samples, 2)) + RELATIONS
    relations = zipf(rng, 1.0, RELATIONS, (samples, 1))
    negatives = rng.integers(RELATIONS, rows, (samples, NEGATIVES))
    return np.concatenate([heads_and_tails, relations, negatives], axis=1)


def uniform(rng: np.random.Generator, rows: int, samples: int, rank: int, ranks: int) -> np.ndarray:
    return rng.integers(0, rows, (samples, FIELDS))


WORKLOADS = {draw.__name__: draw for draw in (ctr, graph, knowledge, uniform)}
