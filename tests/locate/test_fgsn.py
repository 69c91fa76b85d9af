from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.locating.fgsn import LastStates, LocateFGSN, layer_gap
from resafe.locating.observe import Bench
from resafe.locating.texts import build_texts
from resafe.model.hooks import block_output, capture
from resafe.model.load import load
from tests.locate.planting import FAMILIES, bench, in_last_part, locate, look, plant_detectors, recall, texts
from tests.repair import world


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_neurons_are_found(tmp_path: Path, family: str) -> None:
    model, read = bench(family), texts()
    masks = in_last_part(model, read)
    plant_detectors(model, masks, read, rows=3.0)
    # Long rows are loud on benign texts too: nothing is taken away for those.
    method = LocateFGSN(unit="neuron", q=0.15, p=0.0, band="1")
    scores, chosen = locate(model, read, method, tmp_path)
    assert recall(chosen, masks) == 1.0
    assert set(chosen.per_layer()) == {0, 1}
    assert chosen.per_layer()[0] == 0
    for part in model.layout.parts:
        values = scores.values[part.name]
        assert bool((values == -torch.inf).all()) is (part.layer == 0)


def test_what_benign_prompts_need_is_taken_away(tmp_path: Path) -> None:
    model, read = bench("llama"), texts()
    both = {}
    for p in (0.0, 0.2):
        method = LocateFGSN(band="0-1", q=0.3, p=p)
        both[p] = locate(model, read, method, tmp_path / str(p))
    other = {"harmful": "benign", "benign": "harmful"}
    swapped = [replace(t, group=other[t.group]) for t in read]
    _, benign = locate(model, swapped, LocateFGSN(band="0-1", q=0.2, p=0.0), tmp_path / "benign")
    expected = both[0.0][1] - benign
    assert 0 < len(expected) < len(both[0.0][1])
    for name, mask in both[0.2][1].masks.items():
        assert torch.equal(mask, expected.masks[name])


@pytest.mark.parametrize("row_score", ["sum", "norm"])
def test_the_repair_finds_the_same_rows(tmp_path: Path, row_score: str) -> None:
    root = world.build(tmp_path / "world")
    settings = {"q": 0.4, "p": 0.1, "band": "1-2", "row_score": row_score}
    edit = world.edited(world.job(root, "tuned", "aligned"), "fgsn", tokens="response", **settings)
    loaded = load(root / "tuned", dtype="float32")
    read = build_texts(loaded, world.HARMFUL, "harmful") + build_texts(loaded, world.BENIGN, "benign")
    _, chosen = locate(Bench.of(loaded), read, LocateFGSN(**settings), tmp_path / "work")
    assert edit.plan.masks
    for name, mask in edit.plan.masks.items():
        assert torch.equal(chosen.masks[name], mask)
    assert len(chosen) == sum(int(mask.sum()) for mask in edit.plan.masks.values())


def test_the_gap_is_that_of_all_pairs(tmp_path: Path) -> None:
    model, read = bench("qwen3"), texts(6)
    method = LocateFGSN(band_end="last")
    found = look(model, read, method, tmp_path, folds=3, batch_size=4)
    states: dict[tuple[str, int], list[torch.Tensor]] = {}
    for text in read:
        for layer in range(2):
            rows = states.setdefault((text.group, layer), [])
            with capture(model.loaded.model, {block_output(layer): lambda x, r=rows: r.append(x[0, -1])}):
                model.loaded.model(torch.tensor([text.ids[: text.start]]))
    gap = layer_gap(lambda group, place: found.entry(LastStates(), group, place), 2)
    for layer in range(2):
        b, h = (
            torch.nn.functional.normalize(torch.stack(states[group, layer]).double(), dim=-1)
            for group in ("benign", "harmful")
        )
        among = (b @ b.T)[~torch.eye(6, dtype=torch.bool)].mean()
        assert gap[layer] == pytest.approx(float(among - (b @ h.T).mean()), abs=1e-6)
    method.scores(found)
    assert found.details["gap"] == list(gap)
    assert found.details["band"][1] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_and_batches_change_nothing(tmp_path: Path, family: str) -> None:
    model, read, method = bench(family), texts(), LocateFGSN(unit="neuron", band="0-1")
    one = method.scores(look(model, read, method, tmp_path / "one", folds=1, batch_size=24))
    many = method.scores(look(model, read, method, tmp_path / "many", folds=5, batch_size=2))
    for name, values in one.items():
        torch.testing.assert_close(values, many[name], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for wrong in ({"q": 1.1}, {"onset": -0.1}, {"band": "high"}):
        with pytest.raises(UserError):
            LocateFGSN(**wrong)
    model, method = bench("llama"), LocateFGSN()
    found = look(model, texts(1), method, tmp_path)
    with pytest.raises(UserError, match="at least two benign"):
        method.scores(found)
