"""What ranks settle before they train: that they hold the same model, with the values of rank 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist

CHUNK_BYTES = 25 << 20
"""How much `broadcast` sends in one message, for it copies what it sends."""


@torch.no_grad()
def broadcast(module_tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None, source_rank: int = 0) -> None:
    """Collective: overwrite the tensors with those of one rank, in place; few messages, of at most 25 MiB or
    one tensor.

    Args:
        module_tensors: parameters and buffers, any dtype and device, the same on all ranks but for their
            values.
        group: see `process_group`; None (one rank) does nothing.
        source_rank: whose tensors all ranks get.

    Raises:
        ValueError: the ranks' tensors differ in number, shape or dtype.
    """
    if group is None:
        return
    tensors = list({id(tensor): tensor.detach() for tensor in module_tensors}.values())
    check_same_on_all_ranks([(tensor.shape, tensor.dtype) for tensor in tensors], group)
    chunks: dict[tuple, list[list[torch.Tensor]]] = {}
    for tensor in tensors:
        of_kind = chunks.setdefault((tensor.dtype, tensor.device), [[]])
        if sum(t.numel() * t.itemsize for t in of_kind[-1]) + tensor.numel() * tensor.itemsize > CHUNK_BYTES:
            of_kind.append([])
        of_kind[-1].append(tensor)
    source = dist.get_global_rank(group, source_rank)
    for chunk in (chunk for of_kind in chunks.values() for chunk in of_kind if chunk):
        flat = torch.cat([tensor.reshape(-1) for tensor in chunk])
        dist.broadcast(flat.view(torch.uint8), source, group=group)
        for tensor, part in zip(chunk, flat.split([t.numel() for t in chunk]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def check_same_on_all_ranks(description: object, group: dist.ProcessGroup) -> None:
    """Collective: raise ValueError on every rank unless all ranks' `description` has the same text."""
    digest = hashlib.blake2b(repr(description).encode(), digest_size=8).digest()
    mine = torch.from_numpy(np.frombuffer(digest, dtype=np.int64).copy())
    mine = mine.to(device_of(group))
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, mine, group=group)
    values = [int(digest) for digest in digests]
    differing = [rank for rank, value in enumerate(values) if value != values[0]]
    if differing:
        raise ValueError(
            f"the model differs between ranks: names, shapes or dtypes on ranks {differing} are not those on "
            "rank 0: construct the same model on every rank"
        )


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors must be for this group to carry them: on the host; with NCCL alone, on the GPU."""
    on_host = any(part.startswith("cpu:") for part in dist.get_backend_config(group).split(","))
    return torch.device("cpu" if on_host else "cuda")
