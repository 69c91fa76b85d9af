"""SafeMERGE: the equation in factors and in whole matrices, PEFT's own linear merge, and who fits."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from resafe.errors import UserError
from resafe.repairing.base import Job
from resafe.repairing.safemerge import SafeMERGE
from resafe.repairing.space import DenseSpace, FactorSpace, RowSpace
from resafe.weights.adapter import Adapter

from .world import adapter, close, edited, effective, job, noise, written

ALL = {"tau": 1.0, "weight": 0.3}  # a matrix without a delta has a rho of 1


@pytest.fixture(scope="module")
def safety(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter of another scale over the aligned model."""
    return adapter(
        tmp_path_factory.mktemp("safety") / "safety", root / "aligned", noise(21, 0.3), lora_alpha=5
    )


@pytest.mark.parametrize("wanted", ["same", "merged"])
def test_two_adapters_become_one_of_both_ranks(root: Path, safety: Path, tmp_path: Path, wanted: str) -> None:
    edit = edited(job(root, "fresh", "aligned"), "safemerge", safety=str(safety), **ALL)
    assert isinstance(edit.space, FactorSpace)
    written(edit, tmp_path / "out", 1.0, wanted)
    aligned, tuned, safe = (effective(f) for f in (root / "aligned", root / "fresh", safety))
    expected = {n: aligned[n] + 0.7 * (tuned[n] - aligned[n]) + 0.3 * (safe[n] - aligned[n]) for n in tuned}
    close(effective(tmp_path / "out"), expected)
    if wanted == "same":
        assert {Adapter.open(tmp_path / "out").rank(name) for name in edit.units} == {8}


@pytest.mark.parametrize(
    "pair", [("tuned", "aligned"), ("fresh-part", "aligned"), ("continued", "aligned-adapter")]
)
def test_whole_matrices_where_adapters_do_not_fit(
    root: Path, safety: Path, tmp_path: Path, pair: tuple[str, str]
) -> None:
    notes: list[str] = []
    edit = edited(job(root, *pair, note=notes.append), "safemerge", safety=str(safety), **ALL)
    assert isinstance(edit.space, DenseSpace)
    assert "whole matrices" in notes[0]
    written(edit, tmp_path / "out", 1.0, "merged")
    tuned, safe, after = (effective(f) for f in (root / pair[0], safety, tmp_path / "out"))
    mixed = {n: 0.7 * tuned[n] + 0.3 * safe[n] if n in edit.plan.units else tuned[n] for n in tuned}
    close(after, mixed)
    assert len(edit.plan.units) == (6 if pair[0] == "fresh-part" else 21)


def test_linear_is_pefts_own(root: Path, safety: Path, tmp_path: Path) -> None:
    edit = edited(job(root, "fresh", "aligned"), "safemerge", safety=str(safety), merge="linear", **ALL)
    written(edit, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(root / "aligned", dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(root / "fresh"), adapter_name="tuned")
    peft.load_adapter(str(safety), "safety")
    peft.add_weighted_adapter(["tuned", "safety"], [0.7, 0.3], "both", "linear")
    peft.set_adapter("both")
    close(effective(tmp_path / "out"), dict(peft.merge_and_unload().state_dict()))


@pytest.mark.parametrize(
    "pair", [("tuned", "aligned"), ("fresh", "aligned"), ("continued", "aligned-adapter")]
)
def test_without_a_safety_adapter_it_goes_towards_the_aligned(
    root: Path, tmp_path: Path, pair: tuple[str, str]
) -> None:
    edit = edited(job(root, *pair), "safemerge", weight=0.25, tau=0.6)
    assert isinstance(edit.space, DenseSpace if pair[0] == "tuned" else RowSpace)
    written(edit, tmp_path / "out", 2.0)
    tuned, aligned, after = (effective(f) for f in (root / pair[0], root / pair[1], tmp_path / "out"))
    close(after, {n: 0.5 * (tuned[n] + aligned[n]) if n in edit.plan.units else tuned[n] for n in tuned})
    assert 0 < len(edit.plan.units) < len(edit.units)
    rho = {name: m["rho"] for name, m in edit.plan.details["matrices"].items()}
    assert edit.plan.units == {name for name, value in rho.items() if value < 0.6}
    edge = sorted(rho.values())[3]
    assert len(edited(job(root, *pair), "safemerge", tau=edge).plan.units) == 3  # strictly below


def test_strengths_are_for_the_aligned_model_alone(root: Path, safety: Path) -> None:
    assert tuple(SafeMERGE().strengths((1.0, 2.5))) == (1.0, 2.5)
    assert tuple(SafeMERGE(safety=str(safety)).strengths((1.0, 2.5))) == (1.0,)


def refused(work: Job, words: str, **parameters: object) -> None:
    with pytest.raises(UserError, match=words):
        edited(work, "safemerge", **parameters)


def test_what_does_not_fit_is_refused(root: Path, safety: Path, tmp_path: Path) -> None:
    work = job(root, "fresh", "aligned")
    refused(work, "raise tau", tau=-1.0)
    refused(work, "weight must be", weight=0.0)
    refused(work, "safety=FOLDER", merge="linear")
    refused(work, "not over", safety=str(root / "unrelated"), **ALL)
    refused(job(root, "tuned", "aligned"), "merge=delta", safety=str(safety), merge="linear", **ALL)
    other = adapter(tmp_path / "wide", root / "aligned", noise(5, 0.1), r=2)
    refused(work, "differ in rank", safety=str(other), merge="linear", **ALL)
    edited(work, "safemerge", safety=str(other), **ALL)
