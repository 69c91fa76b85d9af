"""Safe Delta: its two ends, its budget, and the compensation against the textbook form."""

from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.repairing import safedelta
from resafe.repairing.safedelta import SafeDelta, upper_factor

from .world import close, edited, effective, job, written


@pytest.mark.parametrize(
    "pair", [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]
)
@pytest.mark.parametrize("others", ["aligned", "tuned"])
def test_no_budget_is_the_aligned_model(
    root: Path, tmp_path: Path, pair: tuple[str, str], others: str
) -> None:
    edit = edited(job(root, *pair), "safedelta", s=0.0, others=others)
    written(edit, tmp_path / "out", 1.0, "merged")
    after, aligned, tuned = (effective(f) for f in (tmp_path / "out", root / pair[1], root / pair[0]))
    inside = set(edit.units)
    assert len(inside) == (21 if others == "tuned" else len(tuned))
    close({n: after[n] for n in inside}, {n: aligned[n] for n in inside})
    close({n: after[n] for n in set(after) - inside}, {n: tuned[n] for n in set(after) - inside}, atol=0)


@pytest.mark.parametrize("parameters", [{"s": 1e9}, {"s": 1.0, "budget": "share"}])
def test_all_the_budget_and_nothing_dropped_is_the_tuned_model(root: Path, parameters: dict) -> None:
    edit = edited(job(root, "tuned", "aligned"), "safedelta", drop=0.0, others="tuned", **parameters)
    assert edit.share(1.0).changed == 0


def test_the_dropped_entries_are_the_most_important_ones() -> None:
    method = SafeDelta(s=1e9, drop=0.25)
    d = torch.tensor([0.5, 3.0, 1.0, 2.0])  # importance 1/d²: column 0 matters most
    accepted = method.accepted(torch.zeros(4, 4), torch.ones(4, 4), d)
    assert torch.equal(accepted, torch.tensor([False, True, True, True]).expand(4, 4))


def test_the_budget_is_what_is_spent() -> None:
    torch.manual_seed(0)
    weight, tuned, d = torch.randn(8, 12), torch.randn(8, 12), torch.rand(12) + 0.1
    damage = (tuned - weight).square() / d.square()
    before = torch.zeros(8, 12, dtype=torch.bool)
    for s in (0.0, 0.1, 0.4, 0.8, 1.0):
        now = SafeDelta(s=s, budget="share", drop=0.0).accepted(weight, tuned, d)
        spent = float(damage[now].sum() / damage.sum())
        assert spent <= s + 1e-6
        if s < 1.0:  # one more entry would be too much
            left = damage.masked_fill(now, torch.inf)[:, d.argsort(descending=True)].T.reshape(-1)
            following = left[left.isfinite()][0]
            assert spent + float(following / damage.sum()) > s
        assert bool((now | ~before).all())
        before = now
    published = SafeDelta(s=2.0, drop=0.0).accepted(weight, tuned, d)
    limit = d.square().reciprocal().mean() * 2.0 / 2 * 8 / 4096
    assert float(damage[published].sum()) <= limit


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)).double()
    h = x.T @ x
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(30)
    u = upper_factor(h.clone(), 0.01)
    torch.testing.assert_close(u.T @ u, damped.inverse())
    assert torch.equal(u, u.triu())
    assert bool((u.diagonal() > 0).all())


def test_wide_inputs_are_factored_in_float32_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(2)).double()
    exact = upper_factor(x.T @ x, 0.01)
    monkeypatch.setattr(safedelta, "_EXACT", 8)
    rough = upper_factor(x.T @ x, 0.01)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("block", "step", "chunk"), [(2048, 4, 128), (7, 4, 128), (16, 3, 8), (10, 4, 2)])
def test_columns_in_chunks_are_columns_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, block: int, step: int, chunk: int
) -> None:
    monkeypatch.setattr(safedelta, "_CHUNK", chunk)
    torch.manual_seed(3)
    x, aligned, tuned = torch.randn(60, 23).double(), torch.randn(9, 23), torch.randn(9, 23)
    factor = upper_factor(x.T @ x, 0.01).float()
    method = SafeDelta(s=0.5, budget="share", block=block, step=step)
    value, accepted = method.merged(aligned, tuned, factor)
    weight = aligned.clone()
    for start in range(0, 23, block):
        end = min(start + block, 23)
        mask = method.accepted(weight[:, start:end], tuned[:, start:end], factor.diagonal()[start:end])
        assert torch.equal(mask, accepted[:, start:end])
        for first in range(start, end, step):
            last = min(first + step, end)
            settled = torch.where(accepted[:, first:last], tuned[:, first:last], weight[:, first:last])
            error = (weight[:, first:last] - settled) / factor.diagonal()[first:last]
            weight[:, first:last] = settled
            weight[:, last:] -= error @ factor[first:last, last:]
    torch.testing.assert_close(value, weight, rtol=1e-4, atol=1e-4)


def test_compensation_keeps_what_the_texts_see() -> None:
    """With the rest made up for, outputs on the calibration inputs move less than without."""
    torch.manual_seed(4)
    x = torch.randn(200, 24).double() @ torch.randn(24, 24).double()
    aligned, tuned = torch.randn(16, 24), torch.randn(16, 24)
    value, accepted = SafeDelta(s=0.3, budget="share").merged(
        aligned, tuned, upper_factor(x.T @ x, 0.01).float()
    )
    plain = torch.where(accepted, tuned, aligned)
    moved, uncompensated = (((w - aligned).double() @ x.T).norm() for w in (value, plain))
    assert 0 < moved < 0.9 * uncompensated


def test_moments_larger_than_the_memory_for_them_come_in_several_passes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = edited(job(root, "tuned", "aligned"), "safedelta", budget="share", s=0.3)
    monkeypatch.setattr(safedelta, "GRAM_BYTES", 8 * 16 * 16 * 3)
    parts = edited(job(root, "tuned", "aligned"), "safedelta", budget="share", s=0.3)
    for name in whole.units:
        assert torch.equal(whole.weight(name, 1.0), parts.weight(name, 1.0))


def test_ranges(root: Path) -> None:
    for parameters in ({"s": -1.0}, {"drop": 1.5}, {"damp": 0.0}, {"block": 0}, {"step": 0}):
        with pytest.raises(UserError, match="safedelta"):
            edited(job(root, "tuned", "aligned"), "safedelta", **parameters)
