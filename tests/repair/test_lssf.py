"""LSSF: the subspace is that of Z = W X, its rank the entropy's, its weights squared."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.locating.lowrank import Calibration
from resafe.model.load import load
from resafe.repairing import lssf
from resafe.repairing.calibrate import with_responses
from resafe.repairing.lssf import LSSF, entropy_rank, output_directions
from resafe.repairing.projection import top_part

from .world import HARMFUL, edited, effective, job, written

PAIRS = [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]


def inputs(folder: Path, text: Calibration) -> dict[str, Tensor]:
    """Return every matrix's inputs at all tokens from a text's start on, by plain hooks, text by text."""
    model = load(folder, merge=True).model
    seen: dict[str, list[Tensor]] = {}
    start = [0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, x, n=f"{name}.weight": seen.setdefault(n, []).append(x[0][0, start[0] :])
            )
    with torch.no_grad():
        for ids, start[0] in zip(text.ids, text.starts, strict=True):
            model(torch.tensor([ids]))
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def normalised(x: Tensor, how: str) -> Tensor:
    if how == "token":
        return x / x.norm(dim=1, keepdim=True)
    return (x - x.mean(0)) / x.std(0, correction=0) if how == "feature" else x


@pytest.mark.parametrize("how", ["token", "feature", "none"])
@pytest.mark.parametrize("tokens", ["all", "response"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_equation(root: Path, tmp_path: Path, pair: tuple[str, str], tokens: str, how: str) -> None:
    """Against the SVD of Z itself."""
    settings = {"eta": 0.8, "alpha": 0.5, "a1": 1.5, "tokens": tokens, "normalise": how}
    edit = edited(job(root, *pair), "lssf", **settings)
    assert isinstance(edit.repair, LSSF)
    written(edit, tmp_path / "out", 2.0, "merged")
    base, aligned, tuned, after = (
        effective(f) for f in (root / "base", root / pair[1], root / pair[0], tmp_path / "out")
    )
    text = with_responses(load(root / pair[1], merge=True), HARMFUL, None)
    if tokens == "all":
        text = Calibration(text.ids, [0] * len(text.ids))
    x = inputs(root / pair[1], text)
    assert set(x) == set(edit.units)
    for name in edit.units:
        z = aligned[name].double() @ normalised(x[name], how).T
        u, s, _ = torch.linalg.svd(z, full_matrices=False)
        p = s.square() / s.square().sum()
        h = -(p * p.clamp(min=1e-300).log()).cumsum(0)
        r = 1 + int((h < 0.8 * h[-1]).sum())
        a = 1 + 0.5 * (s[:r] - s[r - 1]) / (s[0] - s[r - 1])
        assert edit.plan.details["rank"][name] == r
        d = (aligned[name] - base[name]).double()
        expected = tuned[name] + 1.0 * (u[:, :r] * a.square()) @ u[:, :r].T @ d
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-4)
    for name in set(after) - set(edit.units):
        assert torch.equal(after[name], tuned[name])


def test_memory_decides_over_passes_and_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LSSF().prepare(job(root, "tuned", "aligned"))
    monkeypatch.setattr(lssf, "_MEMORY", 1)
    layered = LSSF().prepare(job(root, "tuned", "aligned"))
    assert list(whole) == list(layered)
    assert all(torch.equal(whole[name], layered[name]) for name in whole)


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0.0, (3277, 3482, 3687)), (0.5, (1386, 1839, 2419)), (1.0, (14, 21, 35)), (2.0, (3, 3, 4))],
)
def test_entropy_keeps_more_than_energy(power: float, expected: tuple[int, ...]) -> None:
    """Ranks for sigma falling as i^-power, computed elsewhere."""
    energy = torch.arange(1, 4097).double() ** (-2 * power)
    assert tuple(entropy_rank(energy, eta) for eta in (0.8, 0.85, 0.9)) == expected


def test_the_whole_entropy_is_the_rank() -> None:
    weight, x = torch.randn(12, 30).double(), torch.randn(30, 50).double()
    u, sigma = output_directions(weight, x @ x.T)
    assert entropy_rank(sigma.square(), 1.0) == 12
    few = torch.randn(30, 5).double()
    assert entropy_rank(output_directions(weight, few @ few.T)[1].square(), 1.0) == 5
    assert entropy_rank(torch.tensor([3.0, 0.0, 0.0]), 0.9) == 1
    tall, sizes = output_directions(weight.T, torch.eye(12).double())
    torch.testing.assert_close(sizes, torch.linalg.svdvals(weight))
    torch.testing.assert_close(tall.T @ tall, torch.eye(12).double())
    whole = LSSF(eta=1.0, a1=1.0).basis(weight, x @ x.T).double()
    torch.testing.assert_close(whole @ whole.T, torch.eye(12).double(), rtol=0, atol=1e-6)


def test_without_weights_it_projects() -> None:
    gram = torch.randn(20, 20).double()
    gram = gram @ gram.T
    weight = torch.randn(16, 20).double()
    u = LSSF(eta=0.7, a1=1.0).basis(weight, gram)
    p = u @ u.T
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-5)
    weighted = LSSF(eta=0.7, a1=1.5).basis(weight, gram)
    sizes = (weighted.T @ weighted).diagonal()
    torch.testing.assert_close(sizes[[0, -1]], torch.tensor([2.25, 1.0]), rtol=0, atol=1e-5)
    assert (sizes.diff() < 0).all()
    assert torch.equal(LSSF(a1=1.5).weights(torch.ones(1)), torch.ones(1))


def test_without_data_it_is_lox_post() -> None:
    """U taken from D, that is Z = D: the projection is the truncation of rank r."""
    d = torch.randn(16, 20).double() @ torch.diag(torch.arange(1, 21).double() ** -1)
    u = LSSF(eta=0.8, a1=1.0).basis(d, torch.eye(20).double())
    torch.testing.assert_close(u @ (u.T @ d.float()), top_part(d, u.shape[1]), rtol=0, atol=1e-5)


def test_ranges(root: Path) -> None:
    for wrong, words in (({"eta": 0.0}, "above 0"), ({"a1": 0.5}, "at least 1")):
        with pytest.raises(UserError, match=words):
            LSSF(**wrong)
    with pytest.raises(UserError, match="--harmful"):
        edited(replace(job(root, "tuned", "aligned"), harmful=()), "lssf")
