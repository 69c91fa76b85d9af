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


def left_singular(matrix: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the k leading left singular vectors (out, k) and singular values (k,) of a matrix.

    Randomised with 8 extra directions and 4 subspace iterations, seeded here and now; the exact SVD where
    k is more than a quarter of the smaller side, since there the shortcut neither saves time nor is sure.
    """
    if k > min(matrix.shape) / 4:
        u, s, _ = torch.linalg.svd(matrix.float(), full_matrices=False)
        return u[:, :k], s[:k]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix.float(), q=min(k + 8, *matrix.shape), niter=4)
    return u[:, :k], s[:k]
