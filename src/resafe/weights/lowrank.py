"""Norms and cosines of products B·A, without ever building them.

With ``<X, Y> = sum_ij X_ij Y_ij``::

    <B1 A1, B2 A2> = sum((B1ᵀ B2) * (A1 A2ᵀ))

which costs (out + in)·r² instead of out·in·r, and keeps float64 sums short enough to be exact to
about 1e-15 of their terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 1 << 20  # entries that are looked at together
_EXTRA = 8  # directions beside those asked for
_RESIDUAL = 3e-4


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return ``<b1 @ a1, b2 @ a2>`` in float64; b (out, r), a (r, in); the two ranks may differ."""
    b1, a1, b2, a2 = b1.double(), a1.double(), b2.double(), a2.double()
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def cosine(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the cosine of ``b1 @ a1`` and ``b2 @ a2`` as flat vectors, or 1.0 if either is zero."""
    b1, a1, b2, a2 = b1.double(), a1.double(), b2.double(), a2.double()  # once, for all three products
    square: float = inner(b1, a1, b1, a1) * inner(b2, a2, b2, a2)
    if square <= 0.0:
        return 1.0
    return max(-1.0, min(1.0, inner(b1, a1, b2, a2) / math.sqrt(square)))


def norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``."""
    square: float = inner(b, a, b, a)
    return math.sqrt(max(0.0, square))


def rounding(tensor: Tensor, where: Tensor | None = None) -> float:
    """Return the sum of squares that rounding to the tensor's type has put into it, on average.

    A value whose neighbours are ``u`` apart is rounded by at most ``u / 2`` either way: u² / 12 on average.

    Args:
        tensor: the rounded values.
        where: which of them to count (default: all).
    """
    flat, total = tensor.reshape(-1), 0.0
    half = torch.finfo(tensor.dtype).eps / 2
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, start + _BLOCK)
        ulp = half * torch.exp2(torch.frexp(flat[block].float())[1])
        squares = ulp.double().square()
        total += float(squares.sum() if where is None else squares[where.reshape(-1)[block]].sum()) / 12
    return total


def left_singular(matrix: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the k leading left singular vectors (out, k) and singular values (k,) of a matrix, float32.

    A randomised block Krylov method (Musco and Musco, https://arxiv.org/abs/1504.05477), seeded here and now: an
    orthonormal basis of ``[Y, (M Mᵀ) Y, (M Mᵀ)² Y, ...]`` with Y = M Ω, grown until ``‖M V - U S‖ <= 3e-4 ‖S‖``,
    or the exact SVD where the basis would outgrow a quarter of the smaller side: there the shortcut neither saves
    time nor is sure.
    """
    matrix = matrix.float()
    width = k + _EXTRA
    drawn = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
    basis = _orthonormal(matrix @ drawn.to(matrix))
    back = matrix.T @ basis  # (in, m)
    while basis.shape[1] + width <= min(matrix.shape) / 4:
        block = matrix @ back[:, -width:]
        block = block - basis @ (basis.T @ block)
        block = _orthonormal(block - basis @ (basis.T @ block))  # once more: rounding leaves a remnant
        basis, back = torch.cat([basis, block], dim=1), torch.cat([back, matrix.T @ block], dim=1)
        found = _within(basis, back, matrix, k)
        if found is not None:
            return found
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k]


def _within(basis: Tensor, back: Tensor, matrix: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return what ``basis`` (out, m) holds of the k leading directions, or None where that is not yet sure."""
    values, vectors = torch.linalg.eigh((back.T @ back).double())
    s, w = values[-k:].flip(0).clamp(min=0).sqrt().float(), vectors[:, -k:].flip(1).float()
    u, v = basis @ w, back @ (w / s.clamp(min=torch.finfo(torch.float32).tiny))
    sure = s > 1e-6 * s[0]  # directions below the grain of float32 cannot be told apart, and need not be
    residual = (matrix @ v - u * s)[:, sure].norm()
    return (u, s) if float(residual) <= _RESIDUAL * float(s.norm()) else None


def _orthonormal(block: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(block)[0]
    return q
