from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.locating.observe import TokenSums
from resafe.locating.ssah import SSAH, fluctuation
from resafe.model.hooks import Seen, capture_neurons
from resafe.neurons import NeuronScores
from tests.locate.planting import (
    FAMILIES,
    MIXTURES,
    bench,
    in_last_part,
    locate,
    look,
    planted,
    recall,
    texts,
)

METRICS = ("variance", "flap")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_neurons_are_found(tmp_path: Path, family: str, metric: str) -> None:
    """A constant has no variance: it is added to every other harmful text, as a signal that comes and goes."""
    model, read = bench(family), texts(16)
    rare = [replace(t, ids=(7, *t.ids[1:])) if t.number % 2 else t for t in read]
    masks = in_last_part(model, rare)
    with planted(model, masks, 30.0):
        _, chosen = locate(model, rare, SSAH(scu=0.2, metric=metric), tmp_path)
    assert recall(chosen, masks) == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["llama", *MIXTURES])
def test_folds_and_batches_change_nothing(tmp_path: Path, family: str, metric: str) -> None:
    model, read, method = bench(family), texts(), SSAH(scu=0.1, metric=metric)
    one = method.scores(look(model, read, method, tmp_path / "one", folds=1, batch_size=24))
    many = method.scores(look(model, read, method, tmp_path / "many", folds=5, batch_size=2))
    for name, values in one.items():
        torch.testing.assert_close(values, many[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_importance_is_the_equation(tmp_path: Path) -> None:
    model, read, method = bench("llama"), texts(), SSAH(scu=0.1)
    found = look(model, read, method, tmp_path)
    part = model.layout.parts[1]
    kept: list[torch.Tensor] = []
    for text in read:
        if text.group == "harmful":
            with capture_neurons(
                model.loaded.model, [(part.name, "ffn")], lambda s: kept.append(s.values[0])
            ):
                model.loaded.model(torch.tensor([text.ids]))
    raw = torch.cat(kept).double().var(0) * part.down.tensor.double().square().sum(0)
    expected = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(method.importance(found, part, "harmful"), expected, rtol=1e-5, atol=1e-6)


def test_the_fluctuation_is_the_recursion() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 5, 1, 4)]
    mean = spread = torch.zeros(4, dtype=torch.float64)
    for j, x in enumerate(rows, start=1):
        mean = mean * (j - 1) / j + x.mean(0) / j
        if j > 1:
            spread = spread * (j - 2) / (j - 1) + (x - mean).square().sum(0) / j
    entry = {
        "n": torch.tensor([float(len(x)) for x in rows]).double(),
        "sum": torch.stack([x.sum(0) for x in rows]),
        "square": torch.stack([x.square().sum(0) for x in rows]),
    }
    ours = fluctuation(entry)
    torch.testing.assert_close(ours[0], mean)
    torch.testing.assert_close(ours[1], spread)


@pytest.mark.parametrize("family", ["gpt2", *MIXTURES])
def test_groups_divide_the_neurons(tmp_path: Path, family: str) -> None:
    model, read = bench(family), texts()
    method = SSAH(scu=0.1, ucu=0.2, ru=0.3)
    found = look(model, read, method, tmp_path)
    scores = NeuronScores(method.place(), method.scores(found), "ssah", "model")
    groups = method.groups(found, scores)
    known = scores.total - scores.unreached
    assert sum(len(group) for group in groups.values()) == known
    assert len(groups["RU"] | groups["SCU"] | groups["UCU"] | groups["CU"]) == known
    sizes = {"RU": 0.3, "SCU": 0.1, "UCU": 0.2}
    assert {g: len(groups[g]) for g in sizes} == {g: int(scores.total * share) for g, share in sizes.items()}
    assert found.details == {group: len(neurons) for group, neurons in groups.items()}
    chosen = method.choose(scores)
    assert all(torch.equal(mask, groups["SCU"].masks[name]) for name, mask in chosen.masks.items())


def test_shares_that_make_no_sense() -> None:
    for wrong in ({"scu": 0.0}, {"ru": -0.1}, {"ru": 0.5, "ucu": 0.5}):
        with pytest.raises(UserError, match="at most 1 together"):
            SSAH(**wrong)


def test_texts_sums_of_an_expert_are_those_of_its_tokens(tmp_path: Path) -> None:
    model, read = bench("mixtral"), texts(4)
    observer = TokenSums("ffn", "all")
    method = SSAH(metric="flap")
    entry = look(model, read, method, tmp_path, folds=3, batch_size=2).entry(
        observer, "harmful", model.layout.parts[0].name
    )
    for text in (t for t in read if t.group == "harmful"):

        def check(seen: Seen, number: int = text.number) -> None:
            mine = (entry["numbers"] == number) & (entry["experts"] == seen.expert)
            assert int(mine.sum()) == int(len(seen.values) > 0)
            if len(seen.values):
                assert float(entry["n"][mine]) == len(seen.values)
                torch.testing.assert_close(
                    entry["sum"][mine][0], seen.values.double().sum(0), rtol=1e-5, atol=1e-5
                )

        with capture_neurons(model.loaded.model, [(model.layout.parts[0].name, "ffn")], check):
            model.loaded.model(torch.tensor([text.ids]))
