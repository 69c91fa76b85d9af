"""Algebra that several repairs share: SafeLoRA's operator C and its ρ, and the top-k part of a delta.

T = tuned - aligned is one matrix in the space ``dense``, and elsewhere a product B·A of which B is edited. The
right factor enters only through its Gram matrix ``A Aᵀ`` (r, r)::

    <X A, Y A> = tr(Xᵀ Y · A Aᵀ)

so that the product is never built.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resafe.repairing.base import Unit
from resafe.repairing.space import AnySpace, FactorSpace, RowSpace
from resafe.weights.lowrank import left_singular


class Likeness(NamedTuple):
    """How much of T the operator C keeps: ``rho = cos(C T, T)``, ``kept = ‖C T‖ / ‖T‖``."""

    rho: float
    kept: float


def operate(d: Tensor, t: Tensor) -> Tensor:
    """Return ``C T`` with ``C = D Dᵀ / ‖D‖_F``; d (out, in), t (out, any). Zero where D is."""
    size = float(d.norm())
    if size == 0.0:
        return torch.zeros_like(t)
    # Of the two ways to bracket, the one whose square matrix is the smaller.
    moved = (d @ d.T) @ t if d.shape[0] < t.shape[1] else d @ (d.T @ t)
    return moved / size


def left_of(unit: Unit, space: AnySpace) -> tuple[Tensor, Tensor | None]:
    """Return T as its left factor, float32, and ``A Aᵀ`` in float64; T itself and None in the space ``dense``."""
    if isinstance(space, RowSpace):
        a = space.parts(unit.name).a.double()
        return unit.delta(), a @ a.T
    if isinstance(space, FactorSpace):
        mine = space.own(unit.name)
        return mine.b.float(), mine.a.double() @ mine.a.double().T
    return unit.delta(), None


def likeness(d: Tensor, t: Tensor, gram: Tensor | None) -> Likeness:
    """Return SafeLoRA's ρ, rounded to 5 decimals as in its code; without D or without T nothing is unlike: 1.

    Args:
        d: alignment delta, (out, in).
        t: T, or its left factor (out, r).
        gram: of the right factor (r, r), None for T itself.
    """
    moved = operate(d, t).double()
    wide = t.double()
    other, old = (moved, wide) if gram is None else (moved @ gram, wide @ gram)
    squares = float((moved * other).sum()), float((wide * old).sum())
    if min(squares) <= 0.0:
        return Likeness(1.0, 0.0)
    rho = float((wide * other).sum()) / math.sqrt(squares[0] * squares[1])
    return Likeness(round(rho, 5), math.sqrt(squares[0] / squares[1]))


def top_part(delta: Tensor, k: int) -> Tensor:
    """Return ``U_k U_kᵀ D``, the best approximation of rank k, float32; of each matrix of a stack by itself.

    ``k = 0`` is the whole delta.
    """
    delta = delta.float()
    if delta.dim() > 2:
        return torch.stack([top_part(part, k) for part in delta])
    if k == 0 or k >= min(delta.shape):
        return delta
    u, _ = left_singular(delta, k)
    return u @ (u.T @ delta)
