"""`resafe neurons`: files in, tables, JSON, pictures and sets out; each run is a process of its own."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from resafe.neurons import NeuronScores, NeuronSet, Site
from tests.conftest import Ended

Command = Callable[..., Ended]
LAYERS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two score files of one mixture, of which the second says the same but in layer 0, and sets."""
    folder = tmp_path_factory.mktemp("neurons")
    generator = torch.Generator().manual_seed(0)
    parts = {f"model.layers.{i}.mlp.experts": (4, 50) for i in range(LAYERS)}
    parts |= {f"model.layers.{i}.mlp.shared_expert": (30,) for i in range(LAYERS)}
    values = {name: torch.rand(shape, generator=generator) for name, shape in parts.items()}
    values["model.layers.5.mlp.experts"][3] = torch.nan
    other = {n: -v if ".0." in n else v for n, v in values.items()}
    made = {
        "contrast": NeuronScores(Site.FFN, values, "contrast", "abc", {"k": 2}, "p", {"note": "seen"}),
        "probe": NeuronScores(Site.GATE, other, "probe", "abc"),
        "elsewhere": NeuronScores(Site.FFN, values, "contrast", "def"),
        "direction": NeuronScores(Site.RESIDUAL, {"layer.2": torch.ones(8)}, "refusal", "abc"),
    }
    sets = {"set": made["contrast"].top(share=0.1), "few": made["probe"].top(count=10)}
    sets["entries"] = NeuronSet(Site.ENTRY, {"layers.0.x": torch.ones(2, 2).bool()}, "nlsr", "abc")
    for name, found in {**made, **sets}.items():
        found.save(folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in (*made, *sets)}


def test_show_json(files: dict[str, Path], command: Command) -> None:
    done = command("neurons", "show", files["set"], "--json")
    assert (done.code, done.err) == (0, "")
    found, neurons = json.loads(done.out), NeuronSet.load(files["set"])
    assert (found["kind"], found["site"], found["method"]) == ("neuron set", "ffn", "contrast")
    assert (found["chosen"], found["total"]) == (138, LAYERS * 230)
    assert found["per_layer"] == {str(layer): n for layer, n in neurons.per_layer().items()}
    assert [tuple(neuron) for neuron in found["neurons"]] == neurons.neurons()
    assert len(found["neurons"]) == 138
    assert sum(found["per_tensor"].values()) == 138
    routed = sum(expert is not None for _, expert, _ in found["neurons"])
    assert sum(count for _, _, count in found["per_expert"]) == routed > 0


def test_show_scores(files: dict[str, Path], command: Command) -> None:
    found = json.loads(command("neurons", "show", files["contrast"], "--top", "0.1", "--json").out)
    assert (found["kind"], found["unreached"], found["details"]) == ("neuron scores", 50, {"note": "seen"})
    assert found["chosen"] == len(found["neurons"]) == 138
    assert found["prompts"] == "p"
    done = command("neurons", "show", files["contrast"])
    assert done.code == 0
    assert re.search(r"chosen +13 of 1,380 neurons \(0.94 %\)", done.out)
    assert len(re.findall(r"layer +\d+: .* in \d of 4 experts", done.out)) == LAYERS
    assert re.search(r"unreached +50 without evidence", done.out)


def test_show_a_direction(files: dict[str, Path], command: Command) -> None:
    found = json.loads(command("neurons", "show", files["direction"], "--json").out)
    assert (found["chosen"], found["neurons"], found["tensors"]) == (0, [], {"layer.2": [8]})
    assert command("neurons", "show", files["direction"]).code == 0


def test_compare(files: dict[str, Path], command: Command) -> None:
    names = ("contrast", "probe", "set")
    given = [files[name] for name in names]
    found = json.loads(command("neurons", "compare", *given, "--top", "0.1", "--json").out)
    assert [one["label"] for one in found["sets"]] == [
        "contrast (contrast)",
        "probe (probe)",
        "contrast (set)",
    ]
    jaccard, chance = np.array(found["jaccard"]), np.array(found["jaccard_by_chance"])
    assert jaccard.shape == chance.shape == (3, 3)
    assert np.array_equal(jaccard, jaccard.T)
    assert np.array_equal(np.diag(jaccard), np.ones(3))
    assert jaccard[0, 2] == 1.0  # the set is the top of these scores
    assert 0.5 < jaccard[0, 1] < 1.0  # the same but in one layer of six
    assert (chance < 0.1).all()
    assert found["rank_correlation"][0][2] is None
    assert 0.5 < found["rank_correlation"][0][1] < 0.9
    shares = np.array(found["layer_shares"])
    assert shares.shape == (3, LAYERS)
    assert found["layers"] == list(range(LAYERS))
    assert shares.sum(1) * 230 == pytest.approx([138, 138, 138])
    told = command("neurons", "compare", *given, "--top", "0.1")
    assert told.code == 0
    assert f"{jaccard[0, 1]:.3f}" in told.out
    assert f"{chance[0, 1]:.3f}" in told.out


def test_pictures(files: dict[str, Path], command: Command, tmp_path: Path) -> None:
    from matplotlib.image import imread

    given = [files["contrast"], files["probe"]]
    done = command("neurons", "compare", *given, "--out", tmp_path / "new" / "a.svg")
    assert (done.code, done.err) == (0, "")
    root = ET.parse(tmp_path / "new" / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {"".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"contrast", "probe", "Jaccard index", "Jaccard index by chance", "layer", "0", "5"} <= words
    assert command("neurons", "compare", *given, "--out", tmp_path / "a.png").code == 0
    picture = imread(tmp_path / "a.png")
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # cells of many shades
    command("neurons", "compare", *given, "--out", tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "new" / "a.svg").read_bytes()


def test_twenty_methods_are_readable_in_the_picture(tmp_path: Path) -> None:
    """Labels are a line apart, cells wide enough for their numbers of 7 points, and nothing lies outside."""
    from resafe import pictures

    labels = [f"method_with_a_long_name_{i}" for i in range(20)]
    eye = [[float(i == j) for j in range(20)] for i in range(20)]
    shares = [[0.01 * (i + j) for j in range(32)] for i in range(20)]
    panels = [(title, eye) for title in ("one", "two", "three")]
    pictures.overlap(tmp_path / "a.svg", labels, list(range(32)), shares, panels)
    root = ET.parse(tmp_path / "a.svg").getroot()
    left, top, right, bottom = map(float, root.attrib["viewBox"].split())
    turned = [e for e in root.iter() if "rotate(-90)" in e.attrib.get("transform", "")]
    assert len(turned) == 60  # labels beneath columns stand upright, or they would lie over each other
    places: dict[str, list[tuple[float, float]]] = {}
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        found = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", text.attrib.get("transform", ""))
        spot = found.groups() if found else (text.attrib["x"], text.attrib["y"])
        places.setdefault("".join(text.itertext()).strip(), []).append((float(spot[0]), float(spot[1])))
    assert all(left <= x <= right and top <= y <= bottom for spots in places.values() for x, y in spots)
    heights = sorted(y for x, y in places["1"])  # the diagonals' numbers, and the heat map's layer 1
    assert len(places["1"]) == 61
    for one, following in zip(heights[1::3], heights[4::3], strict=False):
        assert following - one >= 15
    for label, following in zip(labels, labels[1:], strict=False):
        for (x, y), (other_x, other_y) in zip(sorted(places[label]), sorted(places[following]), strict=True):
            assert max(abs(x - other_x), abs(y - other_y)) >= 10


def test_combine(files: dict[str, Path], command: Command, tmp_path: Path) -> None:
    one, other = NeuronSet.load(files["set"]), NeuronSet.load(files["few"]).as_ffn()
    for how, expected in (("union", one | other), ("intersection", one & other), ("difference", one - other)):
        out = tmp_path / f"{how}.safetensors"
        arguments = (files["set"], files["few"], "--how", how, "--out", out, "--json")
        told = json.loads(command("neurons", "combine", *arguments).out)
        found = NeuronSet.load(out)
        assert found.neurons() == expected.neurons()
        assert told["chosen"] == len(found) == len(expected) > 0
        assert [one["chosen"] for one in told["from"]] == [138, 10]
    done = command("neurons", "combine", files["contrast"], "--top", "0.1", "--out", tmp_path / "top")
    assert done.code == 0
    assert NeuronSet.load(tmp_path / "top").neurons() == one.neurons()


def test_mistakes_are_one_sentence(files: dict[str, Path], command: Command, tmp_path: Path) -> None:
    both = (files["contrast"], files["elsewhere"])
    (tmp_path / "there").touch()
    cases = {
        "belongs to the model abc": ("compare", *both),
        "locate both in one model": ("combine", *both, "--out", tmp_path / "a"),
        "cannot be mapped": ("compare", files["entries"], files["set"]),
        "hold no neurons": ("compare", files["direction"], files["set"]),
        "two or more": ("compare", files["set"]),
        "end in .svg or .png": ("compare", files["set"], files["few"], "--out", tmp_path / "a.pdf"),
        "does not exist": ("show", tmp_path / "none"),
        "at most 1": ("show", files["contrast"], "--top", "2"),
        "is empty": ("combine", files["set"], files["set"], "--how", "difference", "--out", tmp_path / "a"),
        "exists already": ("combine", files["set"], files["few"], "--out", tmp_path / "there"),
    }
    for sentence, arguments in cases.items():
        done = command("neurons", *arguments)
        assert (done.code, done.out) == (2, ""), sentence
        assert done.err.startswith("resafe: ")
        assert sentence in done.err
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_without_matplotlib(files: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"  # as if it were not installed
        f"sys.argv = ['resafe', 'neurons', 'compare', {str(files['set'])!r}, {str(files['few'])!r}, *sys.argv[1:]]\n"
        "from resafe.cli import main; main()"
    )
    run = [sys.executable, "-c", script]
    assert subprocess.run(run, capture_output=True).returncode == 0
    drawn = subprocess.run([*run, "--out", str(tmp_path / "a.png")], capture_output=True, text=True)
    assert drawn.returncode == 2
    assert "pip install 'resafe[plot]'" in drawn.stderr
