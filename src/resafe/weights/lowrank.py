"""Norms and cosines of products B·A, without ever building them.

With ``<X, Y> = sum_ij X_ij Y_ij``::

    <B1 A1, B2 A2> = sum((B1ᵀ B2) * (A1 A2ᵀ))

which costs (out + in)·r² instead of out·in·r, and keeps float64 sums short enough to be exact to
about 1e-15 of their terms.
"""

from __future__ import annotations

import math

from torch import Tensor


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return ``<b1 @ a1, b2 @ a2>`` in float64; b (out, r), a (r, in); the two ranks may differ."""
    b1, a1, b2, a2 = b1.double(), a1.double(), b2.double(), a2.double()
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def cosine(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the cosine of ``b1 @ a1`` and ``b2 @ a2`` as flat vectors, or 1.0 if either is zero."""
    square: float = inner(b1, a1, b1, a1) * inner(b2, a2, b2, a2)
    if square <= 0.0:
        return 1.0
    return max(-1.0, min(1.0, inner(b1, a1, b2, a2) / math.sqrt(square)))


def norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``."""
    square: float = inner(b, a, b, a)
    return math.sqrt(max(0.0, square))
