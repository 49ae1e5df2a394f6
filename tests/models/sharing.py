"""A rank's share of a batch of any form, and the training of a case on several ranks."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from adaloader import AdaLoader, full_state_dict
from tests.models.zoo import EPOCHS, OPTIMIZERS, Case, Run


def samples_in(batch: object) -> int:
    """Return how many samples a batch has: the first size of the first tensor or list of tensors in it."""
    if isinstance(batch, torch.Tensor) or is_list_of_sequences(batch):
        return len(batch)
    found = [samples_in(part) for part in parts_of(batch)]
    return next((size for size in found if size), 0)


def share_of(batch: object, rank: int, ranks: int, samples: int | None = None) -> object:
    """Return the contiguous part of a batch that is for `rank`; the first ranks get one sample more where it does not
    divide."""
    samples = samples_in(batch) if samples is None else samples
    start, stop = (samples * at // ranks for at in (rank, rank + 1))
    if isinstance(batch, torch.Tensor) or is_list_of_sequences(batch):
        return batch[start:stop] if len(batch) == samples else batch
    if isinstance(batch, dict):
        return {name: share_of(part, rank, ranks, samples) for name, part in batch.items()}
    if dataclasses.is_dataclass(batch):
        parts = {f.name: share_of(getattr(batch, f.name), rank, ranks, samples) for f in dataclasses.fields(batch)}
        return type(batch)(**parts)
    if isinstance(batch, tuple):
        parts = [share_of(part, rank, ranks, samples) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def is_list_of_sequences(batch: object) -> bool:
    return isinstance(batch, list) and all(isinstance(part, torch.Tensor) for part in batch)


def parts_of(batch: object) -> list[object]:
    if isinstance(batch, dict):
        return list(batch.values())
    if dataclasses.is_dataclass(batch):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return list(batch) if isinstance(batch, tuple) else []


def train_shared(comm, case: Case, optimizer: str, seed: int, *, managed: bool) -> Run:
    """Train a case in evaluation mode: on all ranks, each with its share of every batch, or in plain PyTorch on whole
    batches (collective). Losses are those of whole batches."""
    torch.manual_seed(seed)
    model = case.make_model().eval()
    made = OPTIMIZERS[optimizer](model.parameters())
    batches = [batch for batch in case.make_batches(model) if samples_in(batch) >= comm.size]
    loader = batches
    if managed:
        shares = [share_of(batch, comm.rank, comm.size) for batch in batches]
        weight = None if comm.size == 1 else samples_in
        loader = AdaLoader.wrap(shares, model=model, optimizer=made, min_rows=1, batch_weight=weight)
    sums = []
    for _ in range(EPOCHS):
        for batch in loader:
            made.zero_grad()
            loss = case.loss_of(model, batch)
            loss.backward()
            made.step()
            sums.append((loss.item() * samples_in(batch), samples_in(batch)))
    total = np.array(sums)
    if not managed:
        return Run((total[:, 0] / total[:, 1]).tolist(), dict(model.state_dict()))
    comm.Allreduce(np.array(sums), total)
    weights, names = full_state_dict(model), tuple(loader.stats()["tables"])
    comm.Barrier()  # a rank that is closed serves no rows to others
    loader.close()
    return Run((total[:, 0] / total[:, 1]).tolist(), weights, managed=names)
