"""RESTA: the vector is added, and DARE's mean is the delta itself."""

from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.repairing.resta import RESTA, dare

from .world import close, edited, effective, job, written

PAIRS = [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_safety_vector_is_added_everywhere(
    root: Path, tmp_path: Path, pair: tuple[str, str], strength: float
) -> None:
    edit = edited(job(root, *pair), "resta", gamma=0.4)
    assert isinstance(edit.repair, RESTA)
    written(edit, tmp_path / "out", strength, "merged")
    base, aligned, tuned, after = (
        effective(f) for f in (root / "base", root / pair[1], root / pair[0], tmp_path / "out")
    )
    close(after, {n: tuned[n] + 0.4 * strength * (aligned[n] - base[n]) for n in tuned})


def test_an_unaligned_model_may_stand_for_the_base(root: Path) -> None:
    edit = edited(job(root, "tuned", "aligned", "sharded"), "resta", gamma=1.0)
    unaligned, aligned, tuned = (effective(root / n) for n in ("sharded", "aligned", "tuned"))
    for name in edit.chosen:
        expected = tuned[name] + aligned[name] - unaligned[name]
        torch.testing.assert_close(edit.weight(name, 1.0), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("which", ["safety", "task"])
def test_dare_takes_entries_of_the_one_delta(root: Path, which: str) -> None:
    work = job(root, "tuned", "aligned")
    edit = edited(work, "resta", gamma=0.4, dare=which, p=0.6, seed=3)
    base, aligned, tuned = (effective(root / n) for n in ("base", "aligned", "tuned"))
    kept = total = 0
    for name in edit.chosen:
        v, t = aligned[name] - base[name], tuned[name] - aligned[name]
        moved = edit.weight(name, 1.0) - aligned[name]
        left = (moved - t) / 0.4 if which == "safety" else moved - 0.4 * v
        whole = v if which == "safety" else t
        mask = left.abs() > 1e-6
        torch.testing.assert_close(left[mask], whole[mask] / 0.4, rtol=1e-3, atol=1e-5)
        kept, total = kept + int(mask.sum()), total + mask.numel()
    assert kept / total == pytest.approx(0.4, abs=0.03)
    again, other = (edited(work, "resta", dare=which, p=0.6, seed=seed) for seed in (3, 4))
    same = edited(work, "resta", dare=which, p=0.6, seed=3)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again.weight(name, 1.0), same.weight(name, 1.0))
    assert not torch.equal(again.weight(name, 1.0), other.weight(name, 1.0))


def test_the_mean_over_seeds_is_the_delta() -> None:
    v = torch.randn(20, 30)
    draws = torch.stack([dare(v, 0.5, seed, "w") for seed in range(2000)])
    deviation = v.abs() / 2000**0.5  # of the mean at p = 1/2
    assert ((draws.mean(0) - v).abs() <= 5 * deviation).all()
    assert torch.equal(dare(v, 0.0, 1, "w"), v)
    assert not torch.equal(dare(v, 0.5, 1, "w"), dare(v, 0.5, 1, "u"))  # one draw for each tensor


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(UserError, match="below 1"):
        RESTA(p=1.0)
