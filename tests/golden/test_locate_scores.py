"""Importance, change and probe scores equal the authors' own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from resafe.locating.base import Found, Locate
from resafe.locating.observe import Bench, Text, observe
from resafe.locating.pruning import SetDifference, Snip, Wanda
from resafe.model.load import LoadedModel
from resafe.neurons import NeuronScores, NeuronSet
from tests.model.tiny import tokenizer

Calibration = dict[str, list[dict[str, list[int]]]]
SPREADS = (
    (1, 24),
    (3, 5),
)  # (folds, batch size): one pass over all texts, and many pieces of several lengths


def loaded(folder: Path) -> LoadedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return LoadedModel(model.eval().requires_grad_(False), tokenizer(), str(folder))


def texts_of(calibration: Calibration, *groups: str) -> list[Text]:
    return [
        Text((*record["prompt_ids"], *record["response_ids"]), len(record["prompt_ids"]), group, number)
        for group in groups
        for number, record in enumerate(calibration[group])
    ]


def look(
    bench: Bench, texts: Sequence[Text], method: Locate, folder: Path, spread: tuple[int, int] = SPREADS[1]
) -> Found:
    folds = observe(bench, texts, method.observers(), folder, folds=spread[0], batch_size=spread[1])
    return Found(bench, folds, texts)


def located(method: Locate, found: Found) -> tuple[NeuronScores, NeuronSet]:
    scores = NeuronScores(method.place(), method.scores(found), "golden", "model")
    return scores, method.choose(scores)


def description(golden: Path, name: str) -> dict[str, object]:
    return json.loads((golden / name / "description.json").read_text())


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(
            found[name], values, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def wei(golden: Path) -> Path:
    folder = golden / "wei"
    if not folder.is_dir():
        pytest.skip(f"no outputs of Wei et al.'s code at {folder}")
    return folder


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("group", ["harmful", "benign"])
@pytest.mark.parametrize(("kind", "score"), [(Wanda, "wanda"), (Snip, "snip")])
def test_scores_of_wei(
    golden: Path,
    calibration: Calibration,
    tmp_path: Path,
    wei: Path,
    kind: type[Wanda] | type[Snip],
    score: str,
    group: str,
    spread: tuple[int, int],
) -> None:
    method = kind(group=group)  # type: ignore[arg-type]
    files = sorted(wei.glob(f"*.{score}_score.{group}.safetensors"))
    assert files
    for file in files:
        bench = Bench.of(loaded(golden / "inputs" / file.name.partition(".")[0] / "aligned"))
        found = look(bench, texts_of(calibration, group), method, tmp_path / file.stem, spread)
        close(method.scores(found), load_file(file), rtol=2e-4)


def test_sums_of_snip(golden: Path, calibration: Calibration, tmp_path: Path, wei: Path) -> None:
    recorded = {
        k: v for k, v in description(golden, "wei")["runs"].items() if k.endswith("snip_score_sum_per_matrix")
    }  # type: ignore[attr-defined]
    assert recorded
    for name, sums in recorded.items():
        family = name.partition(".")[0]
        bench = Bench.of(loaded(golden / "inputs" / family / "aligned"))
        found = look(bench, texts_of(calibration, "harmful", "benign"), Snip(), tmp_path / family)
        for group in ("harmful", "benign"):
            for weight, values in Snip(group=group).scores(found).items():
                assert float(values.double().sum()) == pytest.approx(sums[f"{group}.{weight}"], rel=2e-4)


def test_set_difference(golden: Path, calibration: Calibration, tmp_path: Path, wei: Path) -> None:
    files = sorted(wei.glob("*.set_difference_mask.*.safetensors"))
    assert files
    for file in files:
        family, p, q = re.match(r"(\w+)\..*\.p([\d.]+)_q([\d.]+)\.safetensors", file.name).groups()  # type: ignore[union-attr]
        method = SetDifference(q=float(q), p=float(p))
        bench = Bench.of(loaded(golden / "inputs" / family / "aligned"))
        found = look(bench, texts_of(calibration, "harmful", "benign"), method, tmp_path / family)
        _, chosen = located(method, found)
        wanted = {name: mask.bool() for name, mask in load_file(file).items()}
        assert chosen.masks.keys() == wanted.keys()
        for name, mask in wanted.items():
            assert int((chosen.masks[name] ^ mask).sum()) <= 1e-3 * mask.numel(), (file.name, name)
