"""From indices into a view of a table to the rows and columns of the table that they reach."""

from __future__ import annotations

import torch

from adaloader.views.view_layout import Layout


def rows_and_columns(layout: Layout, indices, open_columns) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return rows, and the columns where these are indexed, of shape `B`; the user's ids go into both."""
    if layout.crosses_rows:
        if open_columns:
            raise IndexError("a view that crosses the rows of a managed table must be indexed in all its dimensions")
        at = sum_of([times(ids, layout.strides[dim]) for dim, ids in indices.items()], layout.offset)
        return torch.div(at, layout.dim, rounding_mode="floor"), at % layout.dim
    steps = {at: layout.strides[at] // layout.dim for at in layout.row_dims}
    rows = sum_of([times(ids, steps[at]) for at, ids in indices.items() if at in steps], layout.offset // layout.dim)
    within = [times(ids, layout.strides[at]) for at, ids in indices.items() if at not in steps]
    if not steps.keys() & indices.keys() and indices:  # columns alone: each goes with the same row
        rows = torch.full_like(next(iter(indices.values())), layout.offset // layout.dim)
    return rows, sum_of(within, layout.offset % layout.dim) if within else None


def times(ids: torch.Tensor, factor: int) -> torch.Tensor:
    return ids if factor == 1 else ids * factor


def sum_of(terms: list[torch.Tensor], start: int) -> torch.Tensor:
    if not terms:
        return torch.tensor(start, device="cpu")
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total + start if start else total


def with_open_rows(layout: Layout, ids: torch.Tensor, open_rows: list[int]) -> torch.Tensor:
    for at in open_rows:
        step = layout.strides[at] // layout.dim
        ids = ids[..., None] + torch.arange(layout.shape[at], device="cpu") * step
    return ids


def offsets_of(layout: Layout, dims: list[int]) -> torch.Tensor:
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for at in dims:
        offsets = offsets[..., None] + torch.arange(layout.shape[at], device="cpu") * layout.strides[at]
    return offsets


def columns_of(rows: torch.Tensor, wanted_T: torch.Tensor) -> torch.Tensor:
    """Return the columns `wanted_T` (any shape, taken flat) of `rows` `[..., dim]`."""
    wanted = wanted_T.flatten()
    first = int(wanted[0]) if len(wanted) else 0
    if torch.equal(wanted, torch.arange(first, first + len(wanted), device=wanted.device)):
        return rows.narrow(-1, first, len(wanted)) if len(wanted) else rows[..., :0]
    return rows.index_select(-1, wanted.to(rows.device))


def order_of_results(broadcast: int, indexed: list[int], open_rows: list[int], open_columns: list[int]) -> list[int]:
    """Return the permutation from [B, open rows, open columns] to the order in which PyTorch has them."""
    places = {at: broadcast + number for number, at in enumerate([*open_rows, *open_columns])}
    others = sorted(places)
    adjacent = bool(indexed) and indexed == list(range(indexed[0], indexed[-1] + 1))
    before = [at for at in others if adjacent and at < indexed[0]]
    after = [at for at in others if at not in before]
    return [places[at] for at in before] + list(range(broadcast)) + [places[at] for at in after]
