"""What may be done to a row gradient: every function here takes `RowSum`s, and is exact for one rank and for several.

On several ranks these are collective, but for a multiplication by a number: the ranks combine the gradient first
(`combining.py`), and then each works on the rows that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from adaloader.errors import ManagedTableError
from adaloader.gradients.parts import Part
from adaloader.gradients.row_sum import RowSum, refusal
from adaloader.memory.device_memory import on_host

MOST_DENSE_BYTES = 1 << 30
"""Of a table whose gradient may be asked for as an ordinary tensor."""


def norm(gradient: RowSum, order: float, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the `order`-norm (0 or more, or inf) of all values, absent rows being zero; the same on all ranks."""
    if not gradient.is_spread:
        return _own_norm(gradient, order, dtype)
    gradient.ready()
    key = order, dtype
    if key not in gradient.norms:
        _exchange_norms(gradient, order, dtype)
    return gradient.norms.pop(key)


def _own_norm(gradient: RowSum, order: float, dtype: torch.dtype | None) -> torch.Tensor:
    values = gradient.whole().values
    if not torch.is_grad_enabled():
        values = values.detach()
    return torch.linalg.vector_norm(values if len(values) else values.new_zeros(1), order, dtype=dtype)


def _exchange_norms(gradient: RowSum, order: float, dtype: torch.dtype | None) -> None:
    """Set this norm of `gradient` and, as those who clip ask for all of them, of the other tables' gradients."""
    model = gradient.table.owner
    group = [table.gradient for table in model.tables_in_order()] if gradient.belongs_to_table else [gradient]
    own = np.zeros(len(model.manager.tables), np.float64)
    for each in group:
        own[each.table.table.number] = _own_norm(each, order, torch.float64).item()
    by_rank = torch.from_numpy(np.stack(gradient.gather(own)))
    together = by_rank.sum(0) if order == 0 else torch.linalg.vector_norm(by_rank, order, dim=0)
    for each in group:
        parameter = each.table.parameter
        each.norms[order, dtype] = together[each.table.table.number].to(parameter.device, dtype or parameter.dtype)


def clamp_(gradient: RowSum, low: float | None, high: float | None) -> None:
    """Clamp the values in place; the bounds must have 0 between them, so that absent rows stay as they are."""
    low, high = _number_or_none(gradient, low), _number_or_none(gradient, high)
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise refusal(gradient.table, f"clamp_(min={low!r}, max={high!r}), which changes the zeros of absent rows,")
    with torch.no_grad():
        gradient.whole().values.clamp_(low, high)
    gradient.changed()


def _number_or_none(gradient: RowSum, value) -> float | None:
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    raise refusal(gradient.table, "clamping to anything but one number")


def add_(gradient: RowSum, other: RowSum, factor: float) -> None:
    """Add `factor` x `other`, of the same table."""
    if other is gradient:
        gradient.scale(1.0 + factor)
        return
    for part in other.copied():
        part.scale = factor
        gradient.parts.append(part)
    gradient.changed()


def unscale(gradients: Sequence[RowSum], found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    """Multiply by `inverse_scale` `[1]`; set `found_inf` `[1]` on all ranks where a value of any is not finite."""
    finite, factor = True, float(inverse_scale)
    gradients[0].table.owner.scalers.in_use()
    for gradient in gradients:
        finite &= bool(torch.isfinite(gradient.whole().values.detach()).all())
        gradient.scale(factor)
    said = np.stack(gradients[0].gather(np.array([0.0 if finite else 1.0, factor])))
    if said[:, 0].any():
        found_inf.fill_(1.0)
    if (said[:, 1] != factor).any():
        raise ManagedTableError(
            f"the ranks' losses were scaled by {(1 / said[:, 1]).tolist()}: GradScaler.update() must be called equally "
            "often on all ranks, for their gradients are averaged"
        )


def tested(gradient: RowSum, test: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `test` of every value that is there: `[U, dim]`; on several ranks of those of all ranks, in any order."""
    result = test(gradient.whole().values.detach())
    if not gradient.is_spread:
        return result
    own = np.array([result.sum().item(), (~result).sum().item()], np.float64)
    passed, failed = np.stack(gradient.gather(own)).sum(0)
    tests = [result.new_ones(int(passed)), result.new_zeros(int(failed))]
    return torch.cat(tests)


def total(gradient: RowSum, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the sum of all values."""
    values = gradient.whole().values
    if not gradient.is_spread:
        return values.sum(dtype=dtype)
    sums = gradient.gather(np.array([values.detach().sum(dtype=torch.float64).item()]))
    return torch.tensor(np.stack(sums).sum(), dtype=dtype or values.dtype, device=values.device)


def mean(gradient: RowSum, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the mean over the whole table, absent rows being zero."""
    spec = gradient.table.table.spec
    return total(gradient, dtype) / (spec.rows * spec.dim)


def extreme(gradient: RowSum, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the largest or least value (`choose` is `torch.max` or `torch.min`), absent rows being zero."""
    part = gradient.whole()
    values = part.values if torch.is_grad_enabled() else part.values.detach()
    zero = values.new_zeros(1)
    if not gradient.is_spread:
        is_full = len(part.rows) == gradient.table.table.spec.rows
        return choose(values if is_full else torch.cat([values.reshape(-1), zero]))
    own = np.array([len(part.rows), choose(values).item() if values.numel() else 0.0, float(values.numel() > 0)])
    said = np.stack(gradient.gather(own))
    found = said[said[:, 2] > 0, 1].tolist()
    if said[:, 0].sum() < gradient.table.table.spec.rows:
        found.append(0.0)
    return choose(torch.tensor(found, dtype=values.dtype, device=values.device))


def to_dense(gradient: RowSum) -> torch.Tensor:
    """Return the gradient as an ordinary tensor `[num_rows, dim]`, the same on all ranks."""
    spec = gradient.table.table.spec
    part = gradient.whole()
    size_bytes = spec.rows * spec.dim * part.values.element_size()
    if size_bytes > MOST_DENSE_BYTES:
        raise refusal(
            gradient.table,
            f"to_dense(), which would take {size_bytes / 2**30:.1f} GiB,",
            "use its .rows and .values",
        )
    dense = part.values.new_zeros(spec.rows, spec.dim)
    if not gradient.is_spread:
        return dense.index_add(0, gradient.table.here(part.rows), part.values)
    rows = gradient.gather(part.rows)
    values = gradient.gather(on_host(part.values).copy())
    here = gradient.table.here
    return dense.index_add(0, here(np.concatenate(rows)), here(np.concatenate(values)))


def scaled(gradient: RowSum, factor: float) -> RowSum:
    return gradient.mapped(lambda values: values * factor)


def clamped(gradient: RowSum, low, high) -> RowSum:
    result = RowSum(gradient.table, gradient.copied(), belongs_to_table=False)
    clamp_(result, low, high)
    return result


def power(gradient: RowSum, exponent: float) -> RowSum:
    if not (isinstance(exponent, (int, float)) and exponent > 0):
        raise refusal(gradient.table, f"a power of {exponent!r}, which changes the zeros of absent rows,")
    return gradient.mapped(lambda values: values**exponent)


def added(gradient: RowSum, other: RowSum, factor: float) -> RowSum:
    parts = [*gradient.copied(), *scaled(other, factor).parts]
    return RowSum(gradient.table, parts, belongs_to_table=False)


def replace(gradient: RowSum, other: RowSum) -> None:
    """Make `gradient` what `other`, of the same table, is."""
    gradient.parts = [Part(part.rows, part.values.detach(), None, part.scale) for part in other.copied()]
    gradient.changed()


def inverse(divisor: float) -> float:
    """Return 1 / divisor, infinite for 0 as in PyTorch."""
    return 1.0 / divisor if divisor else math.copysign(math.inf, divisor)
