"""FGSN: planted rows are found, the projection is the equation's, the ledger is kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.locating.fgsn import layer_gap, safety_band, top_share
from resafe.neurons import NeuronSet
from resafe.repairing.fgsn import FGSN, Activity
from resafe.repairing.space import DenseSpace, RowSpace
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint
from tests.conftest import contents

from .world import close, edited, effective, job, written

BAND = {"band": "1-2"}
FULL = {"q": 1.0, "p": 0.0, "band": "0-2"}


def divisor(d: torch.Tensor, dim: str) -> float:
    numbers = {"numel": d.numel(), "out": d.shape[0], "in": d.shape[1], "fro": float(d.norm())}
    return numbers[dim] if dim in numbers else float(torch.linalg.matrix_norm(d, 2)) ** 2


@pytest.mark.parametrize("dim", ["numel", "out", "in", "fro", "spectral"])
@pytest.mark.parametrize(
    "pair", [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]
)
def test_all_rows_projected_are_the_equation(
    root: Path, tmp_path: Path, pair: tuple[str, str], dim: str
) -> None:
    """T <- D Dᵀ T / dim(D), on whole matrices and through the left factor alike."""
    edit = edited(job(root, *pair), "fgsn", dim=dim, **FULL)
    assert isinstance(edit.space, DenseSpace if pair[0] == "tuned" else RowSpace)
    written(edit, tmp_path / "out")
    base, aligned, tuned, after = (
        effective(f) for f in (root / "base", root / pair[1], root / pair[0], tmp_path / "out")
    )
    assert set(edit.chosen) == set(edit.units)
    for name in edit.units:
        d, t = (aligned[name] - base[name]).double(), (tuned[name] - aligned[name]).double()
        expected = aligned[name] + d @ d.T @ t / divisor(d, dim)
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=2e-5)


def test_one_projection_onto_directions_is_enough(root: Path) -> None:
    method = FGSN(dim="ortho", ortho_rank=3)
    d, t = torch.randn(16, 24), torch.randn(16, 5)
    once = method.project(d, t)
    torch.testing.assert_close(method.project(d, once), once)
    assert torch.linalg.matrix_rank(once) == 3


def test_only_the_chosen_rows_move(root: Path, tmp_path: Path) -> None:
    edit = edited(job(root, "tuned", "aligned"), "fgsn", **BAND)
    written(edit, tmp_path / "out", 0.5)
    before, after = (Checkpoint.open(f) for f in (root / "tuned", tmp_path / "out"))
    for name in before.names:
        moved = (before.tensor(name) != after.tensor(name)).reshape(before.info(name).shape[0], -1).any(1)
        chosen = edit.plan.masks.get(name)
        assert torch.equal(moved, torch.zeros_like(moved) if chosen is None else chosen)
        assert bool(moved.any()) is (name in edit.plan.units)
    assert {name.split(".")[2] for name in edit.plan.units} == {"1", "2"}


def test_no_neuron_is_an_error(root: Path) -> None:
    for parameters in ({"q": 0.0}, {"q": 0.2, "p": 1.0}, {"q": 0.01}):
        with pytest.raises(UserError, match="chose no neuron"):
            edited(job(root, "tuned", "aligned"), "fgsn", **BAND, **parameters)


def test_rows_that_answer_harmful_prompts_are_found(root: Path) -> None:
    """Plant inputs: one column is loud on harmful prompts, one on benign ones, and rows that listen to each."""
    space = DenseSpace(Checkpoint.open(root / "tuned"), Checkpoint.open(root / "aligned"), None)
    name = "model.layers.1.mlp.up_proj.weight"
    unit = space.unit(name)
    weight = torch.zeros_like(unit.tuned[name])
    weight[3, 5] = weight[7, 5] = 1.0
    weight[9, 2] = 1.0
    weight[7, 2] = 2.0  # listens to both: it is taken away again
    loud, quiet = torch.full((16,), 0.1), torch.full((16,), 0.1)
    loud[5], quiet[2] = 10.0, 10.0
    activity = Activity({name: loud}, {name: quiet}, range(1, 2), (), None, {}, "")
    mask = FGSN(q=2 / 24, p=2 / 24).measure(replace(unit, weight=lambda: weight), activity)
    assert mask.nonzero().flatten().tolist() == [3]
    entries = FGSN(q=2 / (24 * 16), p=1 / (24 * 16), neuron="entry")
    mask = entries.measure(replace(unit, weight=lambda: weight), activity)
    assert mask.nonzero().tolist() == [[3, 5], [7, 5]]


def test_a_second_call_with_the_ledger_of_the_first_finds_nothing(root: Path, tmp_path: Path) -> None:
    work = job(root, "fresh", "aligned")
    first = edited(work, "fgsn", **BAND)
    written(first, tmp_path / "first")
    ledger = str(tmp_path / "first" / "neurons.safetensors")
    with pytest.raises(UserError, match="chose no neuron"):
        edited(work, "fgsn", ledger=ledger, **BAND)
    wider = edited(work, "fgsn", ledger=ledger, q=0.6, **BAND)
    for name, mask in wider.plan.masks.items():
        assert not bool((mask & first.plan.masks[name]).any())
    whole = wider.plan.neurons
    assert whole is not None
    assert len(whole) == len(first.plan.neurons) + sum(int(m.sum()) for m in wider.plan.masks.values())


def test_a_ledger_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    written(edited(job(root, "fresh", "aligned"), "fgsn", **BAND), tmp_path / "first")
    ledger = str(tmp_path / "first" / "neurons.safetensors")
    with pytest.raises(UserError, match="another reference"):
        edited(job(root, "tuned", "base"), "fgsn", ledger=ledger, **BAND)
    with pytest.raises(UserError, match="site"):
        edited(job(root, "tuned", "aligned"), "fgsn", ledger=ledger, neuron="entry", **BAND)


def test_saved_neurons_give_the_same_bytes_and_need_no_prompts(root: Path, tmp_path: Path) -> None:
    written(edited(job(root, "fresh", "aligned"), "fgsn", **BAND), tmp_path / "first")
    saved = NeuronSet.load(tmp_path / "first" / "neurons.safetensors")
    work = replace(job(root, "fresh", "aligned", neurons=saved), harmful=(), benign=())
    written(edited(work, "fgsn", **BAND), tmp_path / "again")
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def test_neurons_of_other_matrices_are_refused(root: Path, tmp_path: Path) -> None:
    """Found for an adapter on two kinds of matrices; an adapter on all seven needs more."""
    written(edited(job(root, "fresh-part", "aligned"), "fgsn", **BAND), tmp_path / "first")
    saved = NeuronSet.load(tmp_path / "first" / "neurons.safetensors")
    with pytest.raises(UserError, match="gate_proj"):
        edited(job(root, "fresh", "aligned", neurons=saved), "fgsn", **BAND)


def test_entries_and_whole_weights_need_whole_matrices(root: Path, tmp_path: Path) -> None:
    for parameters in ({"neuron": "entry"}, {"target": "full"}):
        edit = edited(job(root, "fresh", "aligned"), "fgsn", **parameters, **BAND)
        assert isinstance(edit.space, DenseSpace)
        assert edit.share(1.0).changed > 0
    with pytest.raises(UserError, match="dense result"):
        edited(job(root, "fresh", "aligned"), "fgsn", weights="aligned", **BAND)
    edited(job(root, "fresh", "aligned", dense_output=True), "fgsn", weights="aligned", **BAND)


def test_tau_leaves_aligned_matrices_alone(root: Path) -> None:
    every = edited(job(root, "tuned", "aligned"), "fgsn", dim="fro", tau=1.0, **FULL)
    none = pytest.raises(UserError, match="chose no neuron")
    assert len(every.chosen) == 21
    with none:
        edited(job(root, "tuned", "aligned"), "fgsn", dim="fro", tau=-1.0, **FULL)
    some = edited(job(root, "tuned", "aligned"), "fgsn", dim="fro", tau=0.3, **FULL)
    base, aligned, tuned = (effective(root / name) for name in ("base", "aligned", "tuned"))
    for name in every.units:
        d, t = (aligned[name] - base[name]).double(), (tuned[name] - aligned[name]).double()
        moved = d @ d.T @ t
        cosine = float((moved * t).sum() / (moved.norm() * t.norm()))
        assert (name in some.chosen) is (cosine <= 0.3)


def test_the_band_of_an_adapter_counts_layers_of_its_base(root: Path) -> None:
    edit = edited(job(root, "fresh", "aligned"), "fgsn", band="67%-100%")
    assert {name.split(".")[2] for name in edit.chosen} == {"2"}
    assert isinstance(edit.space.tuned, Adapter)


def test_the_gap_and_its_band() -> None:
    generator = torch.Generator().manual_seed(0)
    benign, harmful = torch.randn(6, 5, 8, generator=generator), torch.randn(7, 5, 8, generator=generator)
    entries = {
        (group, f"layer.{layer}"): {
            "n": torch.tensor([float(len(x))]).double(),
            "sum": torch.nn.functional.normalize(x[:, layer].double(), dim=-1).sum(0),
        }
        for group, x in (("benign", benign), ("harmful", harmful))
        for layer in range(5)
    }
    gap = layer_gap(lambda group, place: entries[group, place], 5)
    for layer in range(5):
        b, h = (torch.nn.functional.normalize(x[:, layer].double(), dim=-1) for x in (benign, harmful))
        among = [float(b[i] @ b[j]) for i in range(6) for j in range(6) if i != j]
        across = [float(x @ y) for x in b for y in h]
        assert gap[layer] == pytest.approx(sum(among) / 30 - sum(across) / 42, abs=1e-9)
    steps = (0.0, 0.01, 0.3, 0.9, 0.95, 0.96)
    assert safety_band(steps, 0.1, "peak") == range(2, 4)
    assert safety_band(steps, 0.1, "flat") == range(2, 4)
    assert safety_band(steps, 0.1, "last") == range(2, 6)
    with pytest.raises(UserError, match="in no layer"):
        safety_band((-0.1, 0.0), 0.1, "flat")


def test_top_share_breaks_ties_by_position() -> None:
    score = torch.tensor([[1.0, 3.0], [3.0, 0.0], [3.0, 1.0]])
    assert top_share(score, 2 / 6).tolist() == [[False, True], [True, False], [False, False]]
    assert not bool(top_share(score, 0.0).any())
    assert bool(top_share(score, 1.0).all())


def test_an_adapter_equals_the_merged_model(root: Path, tmp_path: Path) -> None:
    for merged in (False, True):
        edit = edited(job(root, "fresh-part", "aligned", dense_output=merged), "fgsn", dim="fro", **FULL)
        written(edit, tmp_path / str(merged), 0.6, "merged" if merged else "same")
    close(effective(tmp_path / "True"), effective(tmp_path / "False"))
