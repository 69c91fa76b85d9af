"""The refusal direction against the outputs of its authors' code."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resafe.locating.direction import Candidates, RefusalDirection, last_logits, refusal
from resafe.model.directions import ablate_direction, add_direction, orthogonalize

from .conftest import GOLDEN
from .reading import SPREADS, bench, look, texts_of

FOLDER = GOLDEN / "arditi"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"runs": {}}
RUNS = sorted(DESCRIPTION["runs"])
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no Arditi golden outputs at {FOLDER}")


def layers() -> float:
    """Return the share of the blocks that give candidates, which the description tells as what is left out."""
    found = re.search(r"prune_layer_percentage ([\d.]+)", " ".join(DESCRIPTION["patches"]))
    assert found
    return 1 - float(found[1])


def tokens(calibration: dict) -> list[int]:
    return calibration["refusal_token_ids"]


def method(calibration: dict, share: float = 1.0) -> RefusalDirection:
    listed = ",".join(map(str, tokens(calibration)))
    return RefusalDirection(kl=None, induce=None, held_out=0.0, refusal_tokens=listed, layers=share)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("arch", RUNS)
def test_candidates(arch: str, spread: tuple[int, int], calibration: dict, tmp_path: Path) -> None:
    expected = load_file(FOLDER / f"{arch}.directions.safetensors")
    on = bench(GOLDEN / "inputs" / arch / "aligned")
    found = look(on, texts_of(calibration), method(calibration).observers(), tmp_path, spread)
    directions, known = method(calibration).directions(found)
    torch.testing.assert_close(directions, expected["mean_diffs"], rtol=0, atol=1e-5)
    assert len(directions) == len(calibration["eoi_suffix"])
    assert torch.equal(known, expected["mean_diffs"].norm(dim=-1) > 1e-6)


@pytest.mark.parametrize("arch", RUNS)
def test_scores_and_selection(arch: str, calibration: dict, tmp_path: Path) -> None:
    expected = load_file(FOLDER / f"{arch}.directions.safetensors")
    texts = texts_of(calibration)
    on = bench(GOLDEN / "inputs" / arch / "aligned")
    for group in ("harmful", "benign"):
        mine = [text for text in texts if text.group == group]
        baseline = refusal(last_logits(on.loaded, mine), tokens(calibration))
        torch.testing.assert_close(baseline, expected[f"baseline_refusal_scores_{group}"], rtol=0, atol=1e-4)
    locate = method(calibration)
    found = look(on, texts, locate.observers(), tmp_path, SPREADS[0])
    tried = locate.candidates(found, *locate.directions(found))
    steering = next(key for key in expected if key.startswith("steering"))
    for ours, theirs in (
        (tried.ablated, "ablation_refusal_score"),
        (tried.induced, steering),
        (tried.kl, "ablation_kl"),
    ):
        torch.testing.assert_close(
            ours[tried.known], expected[theirs].double()[tried.known], rtol=0, atol=1e-4
        )
    run = DESCRIPTION["runs"][arch]
    chosen = method(calibration, layers())
    values = chosen.scores(found)
    place = (found.details["position"], found.details["layer"])
    if run["selected_direction_norm"] > 0:
        assert place == (run["selected_position"], run["selected_layer"])
        torch.testing.assert_close(
            values[f"layer.{place[1]}"], expected["selected_direction"].float(), rtol=0, atol=1e-5
        )
    else:  # the authors' code took a direction of no length; ours takes the best of the others
        table = expected["ablation_refusal_score"].double()
        theirs = Candidates(
            expected["mean_diffs"], tried.known, table[:, : tried.known.shape[1]], table, table
        )
        cut = int(tried.known.shape[1] * layers() + 1e-9)
        limited = Candidates(theirs.directions, theirs.known, table[:, :cut], table[:, :cut], table[:, :cut])
        assert (*place, True) == limited.best(None, None)


@pytest.mark.parametrize("arch", RUNS)
def test_interventions(arch: str, calibration: dict) -> None:
    direction = load_file(FOLDER / f"{arch}.directions.safetensors")["mean_diffs"][-1]
    run = DESCRIPTION["runs"][arch]
    addition = run["act_add"]
    r = direction[addition["layer_argument"]]
    expected = load_file(FOLDER / f"{arch}.logits.safetensors")
    model = bench(GOLDEN / "inputs" / arch / "aligned").loaded.model
    ids = torch.tensor([calibration["harmful"][0]["prompt_ids"]])
    with ablate_direction(model, r):
        torch.testing.assert_close(model(ids).logits[0], expected["ablation_hooks"], rtol=0, atol=2e-4)
    with add_direction(model, r, addition["layer_argument"], addition["coeff"]):
        added = load_file(FOLDER / f"{arch}.act_add_logits.safetensors")["logits"]
        torch.testing.assert_close(model(ids).logits[0], added, rtol=0, atol=2e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = orthogonalize(model, r)
    torch.testing.assert_close(model(ids).logits[0], expected["orthogonalized_weights"], rtol=0, atol=2e-4)
    changed = load_file(FOLDER / f"{arch}.orthogonalized.safetensors")
    for name, tensor in model.state_dict().items():
        if name in changed:
            torch.testing.assert_close(tensor, changed[name], rtol=0, atol=1e-6)
        elif name != "lm_head.weight" or not run["lm_head_changed"]:
            assert torch.equal(tensor, before[name])
    undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_folder_is_the_one_described(golden: Path) -> None:
    assert RUNS
