from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resafe.errors import UserError
from resafe.locating.probe import NeST, NeuroStrike, cluster, standardised, zscores
from tests.locate.planting import (
    FAMILIES,
    MIXTURES,
    alike,
    bench,
    locate,
    look,
    planted_in_maps,
    recall,
    some,
    texts,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [NeuroStrike, NeST])
def test_planted_neurons_are_found(tmp_path: Path, family: str, kind: type[NeuroStrike]) -> None:
    model, read = bench(family), alike(300)
    name = model.layout.parts[-1].name
    masks, method = {name: some(model, each=1)[name]}, kind(threshold=2.5, min_prompts=20)
    with planted_in_maps(model, masks, read, 0.3):
        _, chosen = locate(model, read, method, tmp_path, batch_size=100)
    assert recall(chosen, masks) == 1.0
    assert chosen.masks[name].sum() == masks[name].sum()


def test_a_probe_is_the_code_it_is_said_to_be(tmp_path: Path) -> None:
    model, read, method = bench("qwen3_moe"), texts(), NeuroStrike(steps=50)
    found = look(model, read, method, tmp_path)
    part = model.layout.parts[0]
    trained = method.probes(found)[part.name, "gate"]
    for task in method.tasks(found, part, "gate"):
        torch.manual_seed(1234)
        order = torch.randperm(len(task.labels))
        probe = nn.Linear(part.width, 1)
        adam = torch.optim.Adam(probe.parameters(), lr=1e-3, weight_decay=1e-3)
        for _ in range(50):
            adam.zero_grad()
            nn.BCEWithLogitsLoss()(probe(task.inputs[order])[:, 0], task.labels[order]).backward()
            adam.step()
        assert task.expert is not None
        torch.testing.assert_close(trained[task.expert], probe.weight.detach()[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", *MIXTURES])
def test_folds_and_batches_change_nothing(tmp_path: Path, family: str) -> None:
    model, read, method = bench(family), texts(), NeST(steps=20)
    one = method.scores(look(model, read, method, tmp_path / "one", folds=1, batch_size=24))
    many = method.scores(look(model, read, method, tmp_path / "many", folds=5, batch_size=2))
    for name, values in one.items():
        torch.testing.assert_close(values, many[name], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_experts_with_few_prompts_have_no_score(tmp_path: Path) -> None:
    model, read = bench("mixtral"), texts(4, response=0)
    some = NeuroStrike(steps=1, min_prompts=4)
    found = look(model, read, some, tmp_path)
    for part in model.layout.parts:
        trained = {task.expert for task in some.tasks(found, part, "up")}
        for expert in range(part.experts or 0):
            here = [found.entry(some.observers()[1], g, part.name)["experts"] for g in ("harmful", "benign")]
            enough = all(int((experts == expert).sum()) >= 4 for experts in here)
            assert (expert in trained) == enough
            assert bool(some.scores(found)[part.name][expert].isnan().all()) != enough
    assert any(bool(values.isnan().any()) for values in some.scores(found).values())


def test_clusters_are_of_the_chosen(tmp_path: Path) -> None:
    model, read, method = bench("mixtral"), texts(), NeST(steps=50, threshold=0.5)
    found = look(model, read, method, tmp_path)
    values = method.scores(found)
    clusters = found.details["clusters"]
    assert isinstance(clusters, dict)
    for name, numbers in values.items():
        flat = sorted(position for members in clusters[name] for position in members)
        assert flat == (numbers > 0.5).flatten().nonzero()[:, 0].tolist()
        width = numbers.shape[1]
        assert all(len({position // width for position in members}) == 1 for members in clusters[name])


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(3, 20, generator=generator)
    which = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2])
    points = centres[which] + 0.1 * torch.randn(10, 20, generator=generator)
    labels = cluster(points, most=8, seed=0)
    assert labels.max() == 2
    assert torch.equal(labels[:, None] == labels, which[:, None] == which)
    assert torch.equal(labels, cluster(points, most=8, seed=0))
    assert cluster(points[:3], most=8, seed=0).tolist() == [0, 0, 0]
    assert cluster(points, most=1, seed=0).tolist() == [0] * 10
    assert cluster(points[:1].expand(6, -1), most=8, seed=0).tolist() == [0] * 6


def test_without_scikit_learn_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match="clusters=1"):
        cluster(torch.randn(6, 3), most=8, seed=0)


def test_scores_are_of_one_side(tmp_path: Path) -> None:
    weights = torch.tensor([[0.0, -1.0, 1.0, 8.0, -8.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    z = zscores(weights)
    torch.testing.assert_close(z.mean(1), torch.zeros(2))
    torch.testing.assert_close(z.square().mean(1), torch.ones(2))
    constant = standardised(torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
    assert constant.tolist() == [[0.0, -1.0], [0.0, 1.0]]
    with pytest.raises(UserError, match="give site=up"):
        locate(bench("gpt2"), texts(), NeuroStrike(site="gate"), tmp_path)
