from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.locating.base import Found, Locate
from resafe.locating.observe import observe
from resafe.locating.pruning import SetDifference, Snip, Wanda
from resafe.neurons import NeuronScores
from tests.locate.planting import (
    FAMILIES,
    MIXTURES,
    bench,
    in_last_part,
    locate,
    look,
    plant_detectors,
    recall,
    texts,
)

SCORES = (Wanda, Snip)


@pytest.mark.parametrize("kind", SCORES)
def test_a_neuron_is_the_sum_of_its_entries(tmp_path: Path, kind: type[Wanda] | type[Snip]) -> None:
    model, read = bench("qwen3"), texts()
    entries = kind().scores(look(model, read, kind(), tmp_path / "entry"))
    neurons = kind(unit="neuron").scores(look(model, read, kind(unit="neuron"), tmp_path / "neuron"))
    for name, values in neurons.items():
        whole = (
            entries[f"{name}.gate_proj.weight"].sum(1)
            + entries[f"{name}.up_proj.weight"].sum(1)
            + entries[f"{name}.down_proj.weight"].sum(0)
        )
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-7)


def test_snip_of_fused_experts_is_autograd(tmp_path: Path) -> None:
    model, read = bench("mixtral"), texts(3)
    experts = model.layout.parts[0].module
    weights = [experts.gate_up_proj, experts.down_proj]
    sums = [torch.zeros_like(weight) for weight in weights]
    for text in read[:3]:
        for weight in weights:
            weight.requires_grad_(True)
        labels = torch.tensor([[-100] * text.start + list(text.ids[text.start :])])
        loss = model.loaded.model(input_ids=torch.tensor([text.ids]), labels=labels).loss
        for total, gradient, weight in zip(sums, torch.autograd.grad(loss, weights), weights, strict=True):
            total += (gradient * weight.detach()).abs()
    up, down = sums  # (experts, 2 width, hidden), (experts, hidden, width)
    wanted = torch.stack(up.sum(2).chunk(2, dim=1)).sum(0) + down.sum(1)
    found = Snip(unit="neuron").scores(look(model, read, Snip(unit="neuron"), tmp_path))
    torch.testing.assert_close(found[model.layout.parts[0].name], wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "dbrx", "jetmoe", "gpt2"])
def test_neurons_share_out_all_weights(tmp_path: Path, family: str) -> None:
    """Halves, alternating rows, experts one below the other, (in, out): no weight is left out or counted twice."""
    model, read = bench(family), texts(1)
    (text,) = [text for text in read if text.group == "harmful"]
    neurons = Snip(unit="neuron").scores(look(model, read, Snip(unit="neuron"), tmp_path))
    for part in model.layout.parts:
        weights = list({matrix.weight: matrix.tensor for matrix in part.matrices}.values())
        for weight in weights:
            weight.requires_grad_(True)
        labels = torch.tensor([[-100] * text.start + list(text.ids[text.start :])])
        loss = model.loaded.model(input_ids=torch.tensor([text.ids]), labels=labels, use_cache=False).loss
        gradients = torch.autograd.grad(loss, weights)
        whole = sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))
        assert float(neurons[part.name].nansum()) == pytest.approx(whole, rel=1e-4)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = bench("llama")
    look(model, texts(3), Snip(), tmp_path)
    assert not any(p.requires_grad or p.grad is not None for p in model.loaded.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        Wanda(unit="neuron", share=0.15),
        Snip(unit="neuron", share=0.15),
        SetDifference(q=0.15, p=0.05, unit="neuron"),
        SetDifference(q=0.15, p=0.05, unit="neuron", score="wanda"),
    ],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'score', '')}",
)
def test_planted_neurons_are_found(tmp_path: Path, family: str, method: Locate) -> None:
    model, read = bench(family), texts()
    masks = in_last_part(model, read)
    # What is written loudly matters for harmless texts too, however weak the neuron is there.
    loud = 8.0 if not isinstance(method, SetDifference) else 0.15 if model.layout.parts[-1].gated else 0.6
    plant_detectors(model, masks, read, down=loud)
    _, chosen = locate(model, read, method, tmp_path)
    assert recall(chosen, masks) == 1.0


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("family", MIXTURES)
def test_folds_and_batches_change_nothing(
    tmp_path: Path, family: str, kind: type[Wanda] | type[Snip]
) -> None:
    model, read, method = bench(family), texts(), kind(unit="neuron")
    one = method.scores(look(model, read, method, tmp_path / "one", folds=1, batch_size=24))
    many = method.scores(look(model, read, method, tmp_path / "many", folds=5, batch_size=2))
    for name, values in one.items():
        torch.testing.assert_close(values, many[name], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("kind", SCORES)
def test_a_half_of_the_folds_is_as_if_only_its_texts_were_read(
    tmp_path: Path, kind: type[Wanda] | type[Snip]
) -> None:
    model, read, method = bench("llama"), texts(), kind(unit="neuron")
    found = look(model, read, method, tmp_path / "all", folds=4)
    half = Found(model, found.folds.only([0, 2]), read)
    mine = [text for text in read if text.number % 4 in (0, 2)]
    alone = method.scores(look(model, mine, method, tmp_path / "alone", folds=1))
    for name, values in method.scores(half).items():
        torch.testing.assert_close(values, alone[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", SCORES)
def test_experts_that_nothing_reached_have_no_score(tmp_path: Path, kind: type[Wanda] | type[Snip]) -> None:
    model, method = bench("mixtral"), kind(unit="neuron")
    reached = look(model, texts(1, response=1), method, tmp_path).folds
    values = method.scores(Found(model, reached, texts(1, response=1)))
    last = values[model.layout.parts[-1].name].isnan()  # one token of the last layer reaches two experts
    assert last.all(1).tolist() == last.any(1).tolist()
    assert int(last.all(1).sum()) == 2


def test_wanda_chooses_in_every_row(tmp_path: Path) -> None:
    scores, chosen = locate(bench("llama"), texts(), Wanda(share=0.1), tmp_path)
    for name, mask in chosen.masks.items():
        assert mask.sum(1).tolist() == [int(0.1 * mask.shape[1])] * len(mask)
        assert (scores.values[name] * mask).sum() > (scores.values[name] * mask.roll(1, 1)).sum()
    with pytest.raises(UserError, match="larger share"):
        Wanda(share=0.01).choose(scores)


def test_set_difference_is_one() -> None:
    utility = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0, 0.0])
    safety = torch.tensor([9.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0, 0.0])
    signed = torch.where(utility >= 8, -safety, safety)
    method = SetDifference(q=0.4, p=0.2, unit="neuron")
    chosen = method.choose(NeuronScores(method.place(), {"layers.0": signed}, "difference", "model"))
    assert chosen.masks["layers.0"].nonzero().flatten().tolist() == [1, 3, 5]


def test_without_utility_the_difference_is_the_top(tmp_path: Path) -> None:
    model, read = bench("llama"), texts()
    _, whole = locate(model, read, SetDifference(q=0.1, p=0.0), tmp_path / "a")
    _, top = locate(model, read, Snip(share=0.1), tmp_path / "b")
    _, none = locate(model, read, SetDifference(q=0.1, p=1.0), tmp_path / "c")
    assert all(torch.equal(mask, top.masks[name]) for name, mask in whole.masks.items())
    assert len(none) == 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no harmful prompt has a response"):
        locate(bench("llama"), texts(response=0), Wanda(), tmp_path / "a")
    with pytest.raises(UserError, match="choose such a model"):
        observe(bench("mixtral"), texts(), Wanda().observers(), tmp_path / "b")
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="at most 1"):
            SetDifference(q=share)
