"""Buckets: the flat buffers in which the gradients of dense parameters are summed over ranks.

A bucket's buffer is [gradients | header | one flag per parameter for a dense gradient | the same for a sparse
one | one "again" flag per other bucket, in the last bucket only]. All of it is summed by one all-reduce, so a
bucket says of itself whose sum it is. A sum of flags says on how many ranks a thing holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn import Parameter

from adaloader.dense.in_flight import keep
from adaloader.dense.patience import wait

COUNT_MODULUS = 64
"""Steps travel modulo this: a sum of squares below 2**24 is exact in float32, up to 4,000 ranks."""


@dataclass(frozen=True)
class Header:
    """What a rank says of itself in a bucket; in a bucket that was reduced, the sums over ranks.

    With `step`, `step_squared` and the number of ranks each rank sees whether all are in one step: the
    variance is 0.
    """

    weight: float = 0.0
    total_is_known: float = 0.0
    joined: float = 0.0
    carries: float = 0.0
    step: float = 0.0
    step_squared: float = 0.0
    index: float = 0.0
    index_squared: float = 0.0
    abandoned: float = 0.0

    def values(self) -> list[float]:
        return [getattr(self, name) for name in HEADER_FIELDS]


HEADER_FIELDS = tuple(field.name for field in fields(Header))


class Bucket:
    """Gradients of some parameters of one device, in one preallocated buffer that every reduction reuses.

    Invariant: between `launch` and `wait` nothing touches the buffer; after `wait` it holds sums over all
    ranks, the same bits on each.

    The buffer is float64 for float64 and complex128 parameters, else float32: gradients of lower precision
    are summed in float32, and rounded once.
    """

    def __init__(self, parameters: list[tuple[str, Parameter]], again_flags: int, header_device: torch.device) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        dtype, device = wire_kind(self.parameters[0]) if parameters else (torch.float64, header_device)
        sizes = [_as_real(parameter.detach()).numel() for parameter in self.parameters]
        self.numel = sum(sizes)
        tail = len(HEADER_FIELDS) + 2 * len(sizes) + again_flags
        self.flat = torch.zeros(self.numel + tail, dtype=dtype, device=device)
        slices = self.flat[: self.numel].split(sizes) if sizes else ()
        self.views = [s.view(_as_real(p.detach()).shape) for s, p in zip(slices, self.parameters, strict=True)]
        self._scale = 0.0
        self._works: list[dist.Work] = []

    @torch.no_grad()
    def launch(self, header: Header, scale: float, again: list[bool], group: dist.ProcessGroup) -> None:
        """Collective: fill the buffer with `scale` x gradients and begin to sum it over ranks.

        A scale of 0 contributes zeros whatever the gradients are: the mean loss of no samples has NaN
        gradients.
        """
        self._scale = scale
        dense, sparse = self._fill() if scale else ([0.0] * len(self.views), [0.0] * len(self.views))
        gradients = self.flat[: self.numel]
        if scale == 0.0:
            gradients.zero_()
        elif scale != 1.0:
            gradients.mul_(scale)
        tail = [*header.values(), *dense, *sparse, *map(float, again)]
        self.flat[self.numel :].copy_(torch.tensor(tail, dtype=self.flat.dtype))
        self._works = [dist.all_reduce(self.flat, group=group, async_op=True)]
        keep(self, self._works)

    def _fill(self) -> tuple[list[float], list[float]]:
        """Copy every gradient to its place; return the flags of the dense ones and of the sparse ones."""
        dense, sparse, sources, places = [], [], [], []
        for name, parameter, view in zip(self.names, self.parameters, self.views, strict=True):
            grad = parameter.grad
            is_sparse = grad is not None and _is_row_sparse(grad, name)
            dense.append(float(grad is not None and not is_sparse))
            sparse.append(float(is_sparse))
            if grad is None:
                view.zero_()
            else:
                sources.append(_as_real(grad.detach().to_dense() if is_sparse else grad.detach()))
                places.append(view)
        if places:
            torch._foreach_copy_(places, sources)
        return dense, sparse

    def wait(self, timeout: timedelta, in_vain: Callable[[], str | None]) -> tuple[Header, list[float]]:
        """Wait for the sums, at most `timeout` and not `in_vain()`; return the summed header and "again" flags."""
        if self.flat.device.type == "cpu":
            wait(self._works[0], timeout, in_vain)
        else:
            self._works[0].wait(timeout)
        self._tail = self.flat[self.numel :].tolist()
        header = Header(*self._tail[: len(HEADER_FIELDS)])
        return header, self._tail[len(HEADER_FIELDS) + 2 * len(self.views) :]

    @torch.no_grad()
    def write_back(self, divisor: float, group: dist.ProcessGroup) -> None:
        """Collective: set every parameter's gradient to its sum / `divisor`; None where no rank had one."""
        if divisor != 1.0:
            self.flat[: self.numel].div_(divisor)
        count = len(self.views)
        flags = self._tail[len(HEADER_FIELDS) : len(HEADER_FIELDS) + 2 * count]
        grads, views = [], []
        for number, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            dense, sparse = flags[number], flags[count + number]
            if dense:
                parameter.grad = _writable(parameter)
                grads.append(_as_real(parameter.grad.detach()))
                views.append(view)
            elif sparse:
                parameter.grad = self._sparse_grad(parameter, view, group)
            else:
                parameter.grad = None
        if grads:
            torch._foreach_copy_(grads, views)

    def _sparse_grad(self, parameter: Parameter, view: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Collective: the reduced gradient, sparse, with all rows that any rank has, zero or not."""
        used = torch.zeros(parameter.shape[0], dtype=torch.uint8, device=parameter.device)
        if parameter.grad is not None and self._scale:
            used[parameter.grad.detach()._indices()[0]] = 1
        work = dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group, async_op=True)
        self._works.append(work)
        work.wait()
        rows = used.nonzero().squeeze(1)
        values = torch.view_as_complex(view[rows]) if parameter.is_complex() else view[rows]
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0),
            values.to(parameter.dtype),
            parameter.shape,
            is_coalesced=True,
            check_invariants=False,
        )


def plan(
    parameters: list[tuple[str, Parameter]],
    bucket_bytes: int,
    first_bucket_bytes: int,
    header_device: torch.device,
) -> tuple[list[Bucket], dict[Parameter, int]]:
    """Split parameters over buckets; return these, and the number of each parameter's bucket.

    Backward makes gradients roughly in the reverse order of the parameters, so that is the buckets' order. A
    bucket ends when it is full, the first one early, so that the wire has work soon. There is always a last
    bucket; without any parameter it holds no more than a header, on `header_device`.
    """
    groups: list[list[tuple[str, Parameter]]] = []
    open_groups: dict[tuple[torch.dtype, torch.device], tuple[list[tuple[str, Parameter]], int]] = {}
    for name, parameter in reversed(parameters):
        kind = wire_kind(parameter)
        group, size_bytes = open_groups.get(kind, ([], 0))
        group.append((name, parameter))
        size_bytes += _as_real(parameter.detach()).numel() * kind[0].itemsize
        open_groups[kind] = (group, size_bytes)
        if size_bytes >= (bucket_bytes if groups else first_bucket_bytes):
            groups.append(group)
            del open_groups[kind]
    groups.extend(group for group, _ in open_groups.values())
    groups = groups or [[]]
    last = len(groups) - 1
    buckets = [Bucket(group, last if number == last else 0, header_device) for number, group in enumerate(groups)]
    places = {parameter: number for number, group in enumerate(groups) for _, parameter in group}
    return buckets, places


def wire_kind(parameter: Parameter) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device in which this parameter's gradients are summed."""
    wide = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32, parameter.device


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_row_sparse(grad: torch.Tensor, name: str) -> bool:
    """Whether a gradient is sparse by rows, as of `nn.Embedding(sparse=True)`; raise for other kinds."""
    if grad.layout is torch.strided:
        return False
    if grad.layout is torch.sparse_coo and grad.sparse_dim() == 1:
        return True
    raise TypeError(
        f"the gradient of {name} has layout {grad.layout}: it must be dense, or sparse in its first "
        "dimension only (as that of nn.Embedding(sparse=True) is)"
    )


def _writable(parameter: Parameter) -> torch.Tensor:
    """Return a tensor for the parameter's gradient that can be written to, its present one if fit."""
    grad = parameter.grad
    if grad is None or grad.layout is not torch.strided:
        return torch.empty_like(parameter, requires_grad=False)
    if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
        return torch.empty_like(parameter, requires_grad=False)
    return grad
