"""The `torch.distributed` group of dense parameters: the user's, or one whose address travels over MPI."""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from mpi4py import MPI

ADDRESS_BYTES = 256
"""Room for rank 0's host name, padded with zeros, in the message that every rank gets."""

_gloo_beside: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""For a default group that does not carry the parameters' device (NCCL alone): the one made beside it."""


def process_group(
    comm: MPI.Comm | None, *, device: torch.device | str = "cpu", timeout_seconds: float = 1800.0
) -> dist.ProcessGroup | None:
    """Collective: return a `torch.distributed` group with the ranks of `comm`, or None at one rank.

    A default group that the user has initialised is used as it is. Otherwise one is initialised, with gloo,
    which carries CPU and CUDA tensors, and with NCCL beside it where `device` is a CUDA device and every rank
    has one of its own; the user sets no address and no port. It is destroyed at exit. A second call returns
    the same group.

    Collectives that the user's own code makes on this group must come in the same order on all ranks, as
    ever; those made inside `backward()` (batch statistics over ranks) want a group of their own, for the
    buckets of gradients leave in between.

    Args:
        comm: an mpi4py communicator; None is one process without MPI.
        device: where the dense parameters are.
        timeout_seconds: how long one collective may take; of a group that the user initialised, the user's
            holds.

    Raises:
        ValueError: the user's group has another number of ranks, or numbers them otherwise, than `comm`; or
            only some ranks have initialised one.
    """
    if comm is None or comm.size == 1:
        return None
    if _initialised(comm):
        return _carrying(torch.device(device), timeout_seconds)
    _initialise(comm, torch.device(device), timeout_seconds)
    return dist.group.WORLD


def _initialised(comm: MPI.Comm) -> bool:
    """Collective: whether all ranks have a default group, numbered as `comm` is; else raise."""
    there = dist.is_available() and dist.is_initialized()
    mine = np.array([there, dist.get_world_size() if there else 0, dist.get_rank() if there else 0], dtype=np.int64)
    all_ranks = np.empty((comm.size, 3), dtype=np.int64)
    comm.Allgather(mine, all_ranks)
    if not all_ranks[:, 0].any():
        return False
    for rank, (initialised, size, number) in enumerate(all_ranks.tolist()):
        if not initialised:
            raise ValueError(
                f"rank {rank} of {comm.size} has not initialised torch.distributed and others have: "
                "call init_process_group on every rank, or on none"
            )
        if (size, number) != (comm.size, rank):
            raise ValueError(
                f"torch.distributed says rank {number} of {size}, the MPI communicator says rank {rank} of "
                f"{comm.size}: initialise the process group with rank=comm.rank and world_size=comm.size, "
                "pass a communicator that fits (comm=), or let AdaLoader initialise it"
            )
    return True


def _carrying(device: torch.device, timeout_seconds: float) -> dist.ProcessGroup:
    """Collective: return the default group if it carries tensors of `device`, else a gloo group beside it."""
    default = dist.group.WORLD
    config = dist.get_backend_config(default)  # "cpu:gloo,cuda:nccl", say
    if any(part.startswith(f"{device.type}:") for part in config.split(",")):
        return default
    if default not in _gloo_beside:
        _gloo_beside.clear()
        _gloo_beside[default] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return _gloo_beside[default]


def _initialise(comm: MPI.Comm, device: torch.device, timeout_seconds: float) -> None:
    """Collective: initialise the default group through a store that rank 0 holds."""
    timeout = timedelta(seconds=timeout_seconds)
    one_host = _is_one_host(comm)
    backend = "cpu:gloo,cuda:nccl" if _own_gpu_each(comm, device) else "gloo"
    port = np.zeros(1, dtype=np.int64)
    host = np.zeros(ADDRESS_BYTES, dtype=np.uint8)
    if comm.rank == 0:
        name = "127.0.0.1" if one_host else socket.gethostname()
        store = dist.TCPStore(name, 0, comm.size, is_master=True, timeout=timeout, wait_for_workers=False)
        port[0] = store.port
        encoded = name.encode()
        host[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    comm.Bcast(port, root=0)
    comm.Bcast(host, root=0)
    if comm.rank != 0:
        name = host.tobytes().rstrip(b"\0").decode()
        store = dist.TCPStore(name, int(port[0]), comm.size, is_master=False, timeout=timeout)
    with _loopback() if one_host else _as_set():
        dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size, timeout=timeout)
    atexit.register(_destroy)


def _is_one_host(comm: MPI.Comm) -> bool:
    """Collective: whether all ranks share memory, so that 127.0.0.1 reaches them whatever names say."""
    from mpi4py import MPI

    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = local.size
    local.Free()
    return size == comm.size


def _own_gpu_each(comm: MPI.Comm, device: torch.device) -> bool:
    """Collective: whether every rank's device is a GPU that no other rank uses; NCCL refuses a shared one."""
    mine = np.zeros(16, dtype=np.uint8)
    if device.type == "cuda" and dist.is_nccl_available():
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        mine[:] = np.frombuffer(hashlib.blake2b(uuid.encode(), digest_size=16).digest(), dtype=np.uint8)
    everyone = np.empty((comm.size, mine.size), dtype=np.uint8)
    comm.Allgather(mine, everyone)
    return bool(everyone.any(axis=1).all()) and len(np.unique(everyone, axis=0)) == comm.size


@contextmanager
def _as_set() -> Iterator[None]:
    yield


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo bind to the loopback interface meanwhile, unless the user chose an interface."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if "GLOO_SOCKET_IFNAME" in os.environ or not names:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
