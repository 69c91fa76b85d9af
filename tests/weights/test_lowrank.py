import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resafe.weights.lowrank import cosine, inner, left_singular, norm


@st.composite
def products(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    out, width = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    factors = []
    for _ in range(2):
        rank = draw(st.integers(1, 9))
        scale = 10.0 ** draw(st.integers(-3, 3))
        factors.append(scale * torch.randn(out, rank, generator=generator))
        factors.append(torch.randn(rank, width, generator=generator))
    shared = draw(st.booleans())  # cosines near 1 are the ones that cancel
    if shared and factors[0].shape == factors[2].shape:
        factors[2:] = [f + 1e-3 * torch.randn(f.shape, generator=generator) for f in factors[:2]]
    return tuple(factors)


@given(products())
@settings(max_examples=80, deadline=None)
def test_the_product_is_never_needed(factors: tuple[torch.Tensor, ...]) -> None:
    b1, a1, b2, a2 = (f.double() for f in factors)
    x, y = b1 @ a1, b2 @ a2
    assert inner(*factors) == pytest.approx(
        float((x * y).sum()), rel=1e-6, abs=1e-6 * float(x.norm() * y.norm())
    )
    assert cosine(*factors) == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)
    assert norm(*factors[:2]) == pytest.approx(float(x.norm()), rel=1e-6)


def test_zero_products_agree() -> None:
    b, a = torch.ones(3, 2), torch.ones(2, 4)
    assert cosine(b * 0, a, b, a) == 1.0
    assert norm(b * 0, a) == 0.0
    assert cosine(b, a, -b, a) == -1.0
    assert not math.isnan(cosine(b * 0, a, b * 0, a))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_leading_directions(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 24, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(40, 24, generator=generator))
    values = torch.tensor([2.0 ** (3 - i) for i in range(24)])
    matrix = u * values @ v.T
    before = torch.random.get_rng_state()
    found, sizes = left_singular(matrix, k)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(sizes, values[:k], rtol=1e-4, atol=1e-6)
    kept = min(k, 12)  # below that the values sink into rounding
    torch.testing.assert_close((found[:, :kept].T @ u[:, :kept]).abs(), torch.eye(kept), rtol=0, atol=1e-3)
    assert torch.equal(found, left_singular(matrix, k)[0])


@pytest.mark.parametrize("shape", [(600, 400), (400, 600)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("k", [2, 8])
def test_slow_spectra_are_no_excuse(shape: tuple[int, int], decay: float, k: int) -> None:
    """The product of rank k is right however slowly the singular values fall, by the exact SVD if need be."""
    generator = torch.Generator().manual_seed(k)
    u, v = (torch.linalg.qr(torch.randn(side, 400, generator=generator))[0] for side in shape)
    matrix = u * torch.arange(1, 401).float() ** -decay @ v.T if decay else torch.randn(shape)
    exact, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    best = exact[:, :k] @ (exact[:, :k].T @ matrix)
    found, values = left_singular(matrix, k)
    assert float((found @ (found.T @ matrix) - best).norm() / best.norm()) <= 1e-3
    torch.testing.assert_close(values, sizes[:k], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.T @ found, torch.eye(k), rtol=0, atol=1e-5)


def test_nothing_has_no_direction_to_miss() -> None:
    found, values = left_singular(torch.zeros(200, 300), 4)
    assert not values.any()
    assert found.isfinite().all()
