"""NLSR: its shortcuts against the long way, its bases, its transplants, its saved neurons."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.lowrank import set_weight
from resafe.model.chat import encode_with_response
from resafe.model.load import LoadedModel, load
from resafe.neurons import NeuronSet
from resafe.repairing.engine import Edit
from resafe.repairing.nlsr import NLSR, Regions, common_basis
from resafe.repairing.space import DenseSpace, FactorSpace
from resafe.weights.adapter import WEIGHTS, Adapter
from tests.conftest import contents

from .world import HARMFUL, close, edited, effective, job, logits, rotated, written

ALL = {"share": 1.0}


def response_inputs(loaded: LoadedModel, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return each matrix's stacked inputs at response tokens, one prompt at a time, without padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    ids, starts = encode_with_response(loaded.tokenizer, HARMFUL, [p.response or "" for p in HARMFUL])
    for text, start in zip(ids, starts, strict=True):
        hooks = []
        for name in names:

            def keep(module: object, inputs: tuple[Tensor], n: str = name, s: int = start) -> None:
                seen[n].append(inputs[0][0, s:])

            module = loaded.model.get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            loaded.model(torch.tensor([text]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def by_svd(w: Tensor, x: Tensor, k: int, sparsity: float, scope: str) -> Tensor:
    """Return the mask of a matrix the long way: SVD of X Wᵀ, projection, order of the entries."""
    w = w.double()
    v = torch.linalg.svd(x @ w.T, full_matrices=False).Vh[:k].T
    score = (v @ (v.T @ w)).abs().float()
    flat = score.reshape(1, -1) if scope == "matrix" else score
    threshold = flat.sort(dim=1).values[:, int(flat.shape[1] * sparsity)]
    return (flat > threshold[:, None]).reshape(w.shape)


@pytest.mark.parametrize(("keep_rank", "k"), [("paper", 1), ("reference", 2), (3, 3)])
@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("amplify", ["product", "per-factor"])
def test_gram_masks_are_the_masks_of_the_svd(
    root: Path, scope: str, keep_rank: str | int, k: int, amplify: str
) -> None:
    method = NLSR(sparsity=0.6, keep_rank=keep_rank, scope=scope, beta=0.7, amplify=amplify)
    masks = method.prepare(job(root, "continued", "aligned-adapter")).masks
    reference = Adapter.open(root / "aligned-adapter")
    loaded = load(root / "base")
    scales = {"product": (1.0, 1.7), "per-factor": (1.4, 1.4)}[amplify]
    factors = {}
    for name in reference.modules:
        found = reference.factors(name)
        factors[name] = (found.a * scales[0], found.b * scales[1])
        whole = reference.base.tensor(name) + found.scale * (factors[name][1] @ factors[name][0])
        set_weight(loaded, name, whole)
    inputs = response_inputs(loaded, reference.modules)
    different = total = 0
    for name, (a, b) in factors.items():
        x = inputs[name]
        assert len(x) > a.shape[0]
        expected = {"A": by_svd(a, x, k, 0.6, scope), "B": by_svd(b, x @ a.double().T, k, 0.6, scope)}
        for which, mask in expected.items():
            ours = masks[reference.key(name, which)]
            assert ours.shape == mask.shape
            assert 0 < int(mask.sum()) < mask.numel()
            different += int((ours ^ mask).sum())
            total += mask.numel()
    assert different <= 1e-3 * total  # near ties, decided in float32 by one and in float64 by the other


def plain_product(root: Path, regions: Regions, beta: float) -> dict[str, Tensor]:
    """Return the paper's equation: M∘reference product plus the rest of the tuned one, no cross terms."""
    tuned, aligned = (Adapter.open(root / name) for name in ("continued", "aligned-adapter"))
    expected = {}
    for name in tuned.modules:
        mine, other = tuned.factors(name), aligned.factors(name)
        mask_a, mask_b = (regions.masks[tuned.key(name, which)] for which in "AB")
        reference = ((1 + beta) * other.b * mask_b).double() @ (other.a * mask_a).double()
        kept = (mine.b * ~mask_b).double() @ (mine.a * ~mask_a).double()
        expected[name] = tuned.base.tensor(name).double() + mine.scale * (reference + kept)
    return expected


def test_exact_transplant_has_no_cross_terms(root: Path, tmp_path: Path) -> None:
    edit = edited(job(root, "continued", "aligned-adapter"), "nlsr", transplant="exact", sparsity=0.5, **ALL)
    written(edit, tmp_path / "out")
    written(edit, tmp_path / "merged", 1.0, "merged")
    assert isinstance(edit.statistics, Regions)
    after = effective(tmp_path / "out")  # PEFT loads it
    for name, expected in plain_product(root, edit.statistics, 0.9).items():
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=2e-6)
    assert {Adapter.open(tmp_path / "out").rank(name) for name in edit.units} == {8}
    close(after, effective(tmp_path / "merged"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "merged"), rtol=0, atol=2e-3)
    with pytest.raises(UserError, match="strength 1 only"):
        written(edit, tmp_path / "half", 0.5)


def test_factor_transplant_overwrites_entries(root: Path, tmp_path: Path) -> None:
    edit = edited(job(root, "continued", "aligned-adapter"), "nlsr", beta=0.4, **ALL)
    written(edit, tmp_path / "out")
    tuned, aligned, out = (
        Adapter.open(f) for f in (root / "continued", root / "aligned-adapter", tmp_path / "out")
    )
    assert isinstance(edit.statistics, Regions)
    for name in tuned.modules:
        mine, other, new = (adapter.factors(name) for adapter in (tuned, aligned, out))
        for which, old, reference, got in (
            ("A", mine.a, other.a, new.a),
            ("B", mine.b, 1.4 * other.b, new.b),
        ):
            mask = edit.statistics.masks[tuned.key(name, which)]
            assert torch.equal(got[~mask], old[~mask])
            torch.testing.assert_close(got[mask], reference[mask], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "parameters",
    [{"sparsity": 0.0, "keep_rank": 4, "beta": 0.0}, {"sparsity": 0.0, "keep_rank": 4, "beta": 0.9}],
)
def test_all_neurons_of_all_modules_are_the_amplified_reference(
    root: Path, tmp_path: Path, parameters: Mapping[str, object]
) -> None:
    """With P_SR = 0 every entry but the least one of each factor comes from the reference."""
    edit = edited(job(root, "continued", "aligned-adapter"), "nlsr", **parameters, **ALL)
    masks = {key: torch.ones_like(m) for key, m in edit.statistics.masks.items()}
    assert all(int((~m).sum()) == 1 for m in edit.statistics.masks.values())
    full = replace(edit, statistics=replace(edit.statistics, masks=masks))
    written(full, tmp_path / "out")
    beta, out = parameters["beta"], effective(tmp_path / "out")
    aligned = Adapter.open(root / "aligned-adapter")
    for name in aligned.modules:
        expected = aligned.base.tensor(name) + (1 + beta) * aligned.factors(name).delta()
        torch.testing.assert_close(out[name], expected, rtol=0, atol=3e-6)


def test_no_neuron_is_no_change(root: Path, tmp_path: Path) -> None:
    edit = edited(job(root, "continued", "aligned-adapter"), "nlsr", **ALL)
    masks = {key: torch.zeros_like(mask) for key, mask in edit.statistics.masks.items()}
    empty = replace(edit, statistics=replace(edit.statistics, masks=masks))
    assert empty.share(1.0).changed == 0
    with pytest.raises(UserError, match="changed nothing"):
        written(empty, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_rotated_adapter_is_brought_back(root: Path, tmp_path: Path) -> None:
    """B R⁻¹ and R A are the same delta; mended, the repair is the same repair."""
    straight = edited(job(root, "continued", "aligned-adapter"), "nlsr", sparsity=0.6, **ALL)
    notes: list[str] = []
    work = replace(job(root, "rotated", "aligned-adapter"), note=notes.append)
    mended = edited(work, "nlsr", sparsity=0.6, **ALL)
    assert isinstance(straight.space, FactorSpace)
    assert isinstance(mended.space, FactorSpace)
    assert straight.statistics.basis == "shared"
    assert mended.statistics.basis == "mended"
    assert any("rotation" in note for note in notes)
    close(effective(root / "rotated"), effective(root / "continued"))
    for name in straight.units:
        mine, other = straight.space.own(name), mended.space.own(name)
        assert (
            float((mine.a - other.a).norm() / mine.a.norm()) < 0.35
        )  # noise of the fine-tune turns R a little
        torch.testing.assert_close(mine.delta(), other.delta(), rtol=0, atol=2e-6)
        assert straight.plan.details["modules"][name]["similarity"] == pytest.approx(
            mended.plan.details["modules"][name]["similarity"], abs=0.1
        )
    written(mended, tmp_path / "out")
    reference, raw = effective(root / "aligned-adapter"), effective(root / "rotated")
    after = effective(tmp_path / "out")
    amplified = {n: 1.9 * (reference[n] - straight.space.tuned.base.tensor(n)) for n in straight.units}
    base = {n: straight.space.tuned.base.tensor(n) for n in straight.units}
    nearer = sum(
        (after[n] - base[n] - amplified[n]).norm() < (raw[n] - base[n] - amplified[n]).norm()
        for n in straight.units
    )
    assert nearer == len(straight.units)


def test_a_rotation_alone_is_undone_exactly(root: Path, tmp_path: Path) -> None:
    """Rotate the reference itself: R is found, and the masked factors agree."""

    rotated(tmp_path / "turned", root / "aligned-adapter")
    shutil.copytree(root / "aligned-adapter", tmp_path / "aligned-adapter")
    work = job(tmp_path, "turned", "aligned-adapter", None)
    rotations = common_basis(work)
    assert rotations is not None
    assert len(rotations) == 21
    space = FactorSpace(work.tuned, work.aligned, rotations)
    for name in space.matrices():
        torch.testing.assert_close(space.own(name).a, work.aligned.factors(name).a, rtol=0, atol=1e-5)
        torch.testing.assert_close(space.own(name).b, work.aligned.factors(name).b, rtol=0, atol=1e-5)
    edit = edited(work, "nlsr", **ALL)
    for numbers in edit.plan.details["modules"].values():
        assert numbers["similarity"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("transplant", ["factor", "exact"])
def test_mended_modules_that_are_not_chosen_keep_their_delta(
    root: Path, tmp_path: Path, transplant: str
) -> None:
    edit = edited(job(root, "rotated", "aligned-adapter"), "nlsr", share=0.3, transplant=transplant)
    assert 0 < len(edit.chosen) < len(edit.units)
    written(edit, tmp_path / "out")
    before, after = effective(root / "rotated"), effective(tmp_path / "out")
    for name in before:
        if name in edit.chosen:
            assert not torch.allclose(before[name], after[name], atol=1e-4)
        else:
            torch.testing.assert_close(before[name], after[name], rtol=0, atol=2e-6)
    trial = {name: edit.weight(name, 1.0) for name in edit.chosen}
    close({name: after[name] for name in trial}, trial)


@pytest.mark.parametrize(
    "pair", [("unrelated", "aligned-adapter"), ("tuned", "aligned"), ("fresh", "aligned")]
)
def test_models_without_a_common_basis_go_dense(root: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    notes: list[str] = []
    edit = edited(replace(job(root, *pair), note=notes.append), "nlsr", sparsity=0.6, **ALL)
    assert isinstance(edit.space, DenseSpace)
    assert "dense" in notes[0]
    written(edit, tmp_path / "out", 1.0, "merged")
    base, aligned, tuned, after = (
        effective(f) for f in (root / "base", root / pair[1], root / pair[0], tmp_path / "out")
    )
    for name in edit.chosen:
        amplified = base[name] + 1.9 * (aligned[name] - base[name])
        taken = (after[name] - amplified).abs() < 1e-5
        kept = (after[name] - tuned[name]).abs() < 1e-5
        assert bool((taken | kept).all())
        assert 0.35 <= float(taken.float().mean()) <= 0.45


def run(root: Path, out: Path, **more: object) -> Edit:
    edit = edited(job(root, "continued", "aligned-adapter", **more), "nlsr")
    written(edit, out)
    return edit


def test_saved_neurons_give_the_same_bytes_and_need_no_prompts(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "first")
    saved = NeuronSet.load(tmp_path / "first" / "neurons.safetensors")
    work = replace(job(root, "continued", "aligned-adapter", neurons=saved), harmful=(), benign=(), base=None)
    written(edited(work, "nlsr"), tmp_path / "again")
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    with pytest.raises(UserError, match="needs --harmful"):
        edited(replace(work, neurons=None), "nlsr")


def test_neurons_of_another_reference_are_refused(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "first")
    saved = NeuronSet.load(tmp_path / "first" / "neurons.safetensors")
    with pytest.raises(UserError, match="another reference"):
        edited(job(root, "aligned-adapter", "continued", neurons=saved), "nlsr")
    with pytest.raises(UserError, match="no such basis"):
        edited(job(root, "tuned", "aligned", neurons=saved), "nlsr")
    lacking = replace(saved, masks=dict(list(saved.masks.items())[1:]))
    with pytest.raises(UserError, match="lacks"):
        edited(job(root, "continued", "aligned-adapter", neurons=lacking), "nlsr")


def test_factors_need_no_base_once_neurons_are_known(root: Path, tmp_path: Path) -> None:
    """Two adapters alone: their base is not on this machine."""
    run(root, tmp_path / "first")
    saved = NeuronSet.load(tmp_path / "first" / "neurons.safetensors")
    for name in ("continued", "aligned-adapter"):
        shutil.copytree(root / name, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(file.read_text().replace(str(root / "base"), "/not/here"))
    work = job(tmp_path, "continued", "aligned-adapter", None, neurons=saved)
    written(edited(work, "nlsr"), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()


def test_weights_that_are_not_finite(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "aligned-adapter", tmp_path / "bad")
    tensors = load_file(root / "aligned-adapter" / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad" / WEIGHTS)
    shutil.copytree(root / "continued", tmp_path / "continued")
    with pytest.raises(UserError, match="NaN"):
        edited(job(tmp_path, "continued", "bad", None), "nlsr")
