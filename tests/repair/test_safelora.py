"""SafeLoRA: the equation in every space, the choice by rho, its control from the other end."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resafe.errors import UserError
from resafe.repairing.projection import likeness, operate
from resafe.repairing.safelora import SafeLoRA
from resafe.repairing.space import DenseSpace, RowSpace

from .world import close, edited, effective, job, written

PAIRS = [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]
EVERY = {"select": "threshold", "threshold": 1.0}


def deltas(root: Path, tuned: str, aligned: str) -> dict[str, tuple[Tensor, Tensor]]:
    base, reference, model = (effective(root / name) for name in ("base", aligned, tuned))
    return {n: ((reference[n] - base[n]).double(), (model[n] - reference[n]).double()) for n in model}


def rho(d: Tensor, t: Tensor) -> float:
    moved = d @ d.T @ t
    return float((moved * t).sum() / (moved.norm() * t.norm()))


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_chosen_matrices_follow_the_equation(
    root: Path, tmp_path: Path, pair: tuple[str, str], strength: float
) -> None:
    """T <- C T where rho is among the five lowest, through factors and in whole matrices alike."""
    edit = edited(job(root, *pair), "safelora", number=5)
    assert isinstance(edit.space, DenseSpace if pair[0] == "tuned" else RowSpace)
    written(edit, tmp_path / "out", strength)
    after, before, found = effective(tmp_path / "out"), effective(root / pair[0]), deltas(root, *pair)
    truth = {name: rho(*found[name]) for name in edit.units}
    assert edit.plan.units == set(sorted(truth, key=truth.get)[:5])
    for name, tensor in before.items():
        d, t = found[name]
        moved = strength * (d @ d.T @ t / d.norm() - t) if name in edit.plan.units else 0.0
        torch.testing.assert_close(after[name].double(), tensor.double() + moved, rtol=0, atol=2e-5)
    for name, value in truth.items():
        assert edit.plan.details["matrices"][name]["rho"] == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_threshold_decides(root: Path, pair: tuple[str, str]) -> None:
    work = job(root, *pair)
    every = edited(work, "safelora", **{**EVERY, "threshold": 1.01})
    assert every.plan.units == set(every.units)
    with pytest.raises(UserError, match="raise threshold"):
        edited(work, "safelora", **{**EVERY, "threshold": -1.01})
    found = {name: m["rho"] for name, m in every.plan.details["matrices"].items()}
    tau = sorted(found.values())[7]
    some = edited(work, "safelora", **{**EVERY, "threshold": tau})
    assert some.plan.units == {name for name, value in found.items() if value <= tau}
    assert edited(work, "safelora", number=8).plan.units == some.plan.units
    assert edited(work, "safelora", select="share", share=8 / 21).plan.units == some.plan.units
    assert edited(work, "safelora", number=999).plan.units == set(every.units)


@pytest.mark.parametrize("how", [{"number": 6}, {"select": "threshold", "threshold": 0.25}])
def test_reversed_as_many_from_the_other_end(root: Path, how: dict[str, object]) -> None:
    work = job(root, "tuned", "aligned")
    plain, other = (edited(work, "safelora", reverse=reverse, **how) for reverse in (False, True))
    assert len(plain.plan.units) == len(other.plan.units) in range(1, 11)
    found = {name: m["rho"] for name, m in plain.plan.details["matrices"].items()}
    rest = set(found) - other.plan.units
    assert min(found[name] for name in other.plan.units) >= max(found[name] for name in rest)
    assert not plain.plan.units & other.plan.units


def test_fgsn_on_all_rows_is_safelora_on_all_matrices(root: Path, tmp_path: Path) -> None:
    work = job(root, "fresh", "aligned")
    written(edited(work, "fgsn", dim="fro", q=1.0, p=0.0, band="0-2"), tmp_path / "fgsn")
    written(edited(work, "safelora", **EVERY), tmp_path / "safelora")
    close(effective(tmp_path / "fgsn"), effective(tmp_path / "safelora"))


@given(st.integers(0, 1 << 30), st.integers(2, 12), st.integers(2, 12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_product_and_the_operator_are_never_built(seed: int, out: int, width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d, b, a = (torch.randn(*s, generator=generator) for s in ((out, width), (out, rank), (rank, width)))
    c = d @ d.T / d.norm()
    for t in (b, b @ a, torch.randn(out, 20, generator=generator)):
        torch.testing.assert_close(operate(d, t), c @ t, rtol=1e-4, atol=1e-4)
    wide = a.double() @ a.double().T
    by_traces, whole = likeness(d, b, wide), likeness(d, b @ a, None)
    assert by_traces == pytest.approx(whole, rel=1e-4, abs=3e-5)
    assert likeness(7.0 * d, b, wide).rho == pytest.approx(
        by_traces.rho, abs=1e-5
    )  # whatever C is divided by
    assert whole.rho == pytest.approx(rho(d.double(), (b @ a).double()), abs=3e-5)


def test_nothing_is_unlike_nothing() -> None:
    some = torch.randn(4, 6)
    for d, t in ((some * 0, some), (some, some * 0)):
        assert likeness(d, t, None) == (1.0, 0.0)
        assert not operate(d, t).any()


def test_ranges() -> None:
    for wrong, words in (({"number": 0}, "at least 1"), ({"share": 0.0}, "above 0")):
        with pytest.raises(UserError, match=words):
            SafeLoRA(**wrong)
