"""Write an edit of whole matrices as a LoRA adapter over the tuned model, where it is of low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.repairing.engine import Edit, ShareCounter
from resafe.repairing.space import DenseSpace
from resafe.weights.adapter import PREFIX, Adapter, Factors
from resafe.weights.lowrank import left_singular, rounding
from resafe.weights.shard import read

TOLERANCE = 1e-3  # relative error of a matrix's change
_ROUNDING = 2  # or so many times what storing the edited matrix in its own type rounds away
_FIRST = 8  # the first rank that is tried; then twice as many


class Factored(NamedTuple):
    """A change as ``b @ a``, and the relative error of that."""

    b: Tensor  # (out, k)
    a: Tensor  # (k, in)
    error: float


def factored(change: Tensor, tolerance: float) -> Factored | None:
    """Return the product of least rank within a relative error; None where it is no smaller than the matrix.

    ``change`` is (out, in), float32. With U the leading left singular vectors, ``b = U`` and ``a = Uᵀ change``,
    the rows of which have the singular values as norms.
    """
    out, width = change.shape
    most = out * width // (out + width)
    size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    rank = min(_FIRST, most)
    while rank:
        u, _ = left_singular(change, rank)
        a = u.T @ change
        lost = float((change - u @ a).norm()) / size
        if lost <= tolerance:
            return _trimmed(u, a, lost, size, tolerance)
        if rank == most:
            return None
        rank = min(2 * rank, most)
    return None


def _trimmed(u: Tensor, a: Tensor, lost: float, size: float, tolerance: float) -> Factored:
    """Leave out the last directions that the tolerance does not need."""
    squares = (a.double().norm(dim=1) / size).square().flip(0)
    errors = (
        lost**2 + torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    ).sqrt()  # with the last 0, 1, ... gone
    gone = min(int((errors <= tolerance).sum()) - 1, len(a) - 1)
    rank = len(a) - gone
    return Factored(u[:, :rank], a[:rank], float(errors[gone]))


def as_adapter(edit: Edit, strength: float, counter: ShareCounter) -> dict[str, Tensor]:
    """Return the tensors of the adapter that leads from the tuned model to the edited one.

    Over a tuned adapter it is that adapter with wider factors: ``s·[B, b/s]·[A; a]``.

    Raises:
        UserError: the edit changes something that is no matrix of a block, or is not of low rank.
    """
    tuned = edit.space.tuned
    own = tuned if isinstance(tuned, Adapter) else None
    parts = {name: own.factors(name) for name in own.modules} if own else {}
    found = {name: _of(edit, name, strength, counter) for name in edit.chosen if strength}
    news = {name: new for name, new in found.items() if new is not None}
    for name, new in news.items():
        old = parts.get(name)
        scale = old.scale if old else 1.0
        a = torch.cat([old.a.float(), new.a]) if old else new.a
        b = torch.cat([old.b.float(), new.b / scale], dim=1) if old else new.b
        parts[name] = Factors(a, b, scale)
    if news:
        ranks = sorted(len(new.a) for new in news.values())
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else "")
        worst = max(new.error for new in news.values())
        edit.job.note(
            f"the adapter holds the edit of {len(news)} matrices at {span}, to within {100 * worst:.2g} % of each"
        )
    return _tensors(own, parts)


def _of(edit: Edit, name: str, strength: float, counter: ShareCounter) -> Factored | None:
    """Return the change of one matrix, factored; None where there is none."""
    new = edit.tensors(name, strength, counter)[name]
    if not counter.changed[name]:
        return None
    assert isinstance(edit.space, DenseSpace)
    matrix = edit.space.catalogue.matrices.get(name)
    if matrix is None or not matrix.whole:  # a norm, an embedding, experts in one tensor, a turned matrix
        raise UserError(
            f"{edit.method.name} also changes {name}, which an adapter's factors cannot hold; use --format merged"
        )
    unit = edit.space.unit(name)
    target, tuned = edit.repair.edit(unit, edit.plan, edit.statistics)[name], unit.tuned[name]
    change = strength * (target.value.float() - tuned.float())  # not rounded, as `new` is
    change = change if target.mask is None else change * target.mask
    noise = math.sqrt(rounding(new)) / float(change.norm())
    tolerance = max(TOLERANCE, _ROUNDING * noise)
    found = factored(change, tolerance)
    if found is None:
        raise UserError(
            f"the edit of {name} by {edit.method.name} is not of low rank: an adapter within {100 * tolerance:.2g} % "
            "of it would be larger than the matrix itself; use --format merged or patch"
        )
    return found


def _tensors(own: Adapter | None, parts: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors = {PREFIX + name: read(info) for name, info in own.replaced.items()} if own else {}
    for name, factors in parts.items():
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"{module}.lora_B.weight"] = factors.b.contiguous()
    return tensors
