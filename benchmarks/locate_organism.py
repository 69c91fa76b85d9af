"""Which located neurons matter in the organism: silence each method's highest scores and ask the model again.

    python benchmarks/locate_organism.py --out docs/locating.json [--models aligned ...] [--draws 5]

Neurons are located on the locating split and silenced on the reporting split (256 harmful and as many ability
prompts; nothing is chosen on it). Every method runs once, at its published defaults, with ``unit=neuron``
where its own unit is finer. Shares are of all feed-forward neurons, whole model; the control silences as many
random neurons per layer (mean over the draws). Sets that the methods' own rules choose are silenced too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from resafe.evaluate.judge import Judge
from resafe.evaluate.measure import PromptSets, measure
from resafe.locating.observe import Bench
from resafe.locating.run import Located, Request, Setting, locate_all
from resafe.model.hooks import silence
from resafe.model.load import LoadedModel, load
from resafe.neurons import NeuronScores, NeuronSet, Site
from resafe.organism import path
from resafe.protocol import protocol
from resafe.registry import methods
from resafe.weights.adapter import open_model
from resafe.weights.checkpoint import fingerprint

MODELS = {"aligned": "base", "aligned-planted": "base", "late-aligned": "late-base"}
SHARES = (0.005, 0.01, 0.03, 0.05)
RATES = ("harmful_rate", "incoherent_rate", "ability")
PARTS = (Site.FFN, Site.GATE, Site.UP)


def rates(loaded: LoadedModel, prompts: PromptSets, judge: Judge, neurons: NeuronSet) -> dict[str, float]:
    with silence(loaded.model, neurons.masks):
        found = measure(loaded, prompts, judge).to_dict()
    return {name: found[name]["value"] for name in RATES}  # type: ignore[index,misc]


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]}


def settings() -> list[Setting]:
    made = []
    for method in methods("locate").values():
        unit = {"unit": "neuron"} if "unit" in method.parameters() else {}
        made.append(Setting(method, method.make(unit)))  # type: ignore[arg-type]
    return made


def silenced(
    loaded: LoadedModel, prompts: PromptSets, judge: Judge, neurons: NeuronSet, draws: int
) -> dict[str, object]:
    controls = [rates(loaded, prompts, judge, neurons.random_like(seed)) for seed in range(draws)]
    return {
        "neurons": len(neurons),
        "silenced": rates(loaded, prompts, judge, neurons),
        "random": mean(controls),
        "random_max_harmful": max(row["harmful_rate"] for row in controls),
    }


def one(
    found: Located, loaded: LoadedModel, prompts: PromptSets, judge: Judge, draws: int
) -> dict[str, object]:
    scores: NeuronScores = found.scores.as_ffn()
    row: dict[str, object] = {
        "badge": found.method.badge.value,
        "stability": None if found.stability is None else found.stability.to_dict(),
        "shares": {
            f"{share:g}": silenced(loaded, prompts, judge, scores.top(share=share), draws) for share in SHARES
        },
    }
    if found.neurons is not None and len(found.neurons):
        row["own"] = silenced(loaded, prompts, judge, found.neurons.as_ffn(), draws)
    return row


def model(name: str, reference: str, draws: int) -> dict[str, object]:
    opened = open_model(path(name))
    plan = protocol(opened.config)
    loaded, other = load(path(name), merge=True), load(path(reference), merge=True)
    judge = plan.judge
    report = PromptSets(plan.report.harmful, (), (), plan.report.ability)
    request = Request(
        Bench.of(loaded, other),
        settings(),
        plan.locate.harmful,
        plan.locate.benign,
        judge,
        fingerprint(opened.files),
        note=lambda sentence: print(sentence, file=sys.stderr),
    )
    found = [f for f in locate_all(request) if f.scores.site in PARTS]
    nothing = NeuronSet(Site.FFN, {}, "nothing", request.model)
    cut = {f.method.name: f.scores.as_ffn().top(share=0.03) for f in found}
    return {
        "intact": rates(loaded, report, judge, nothing),
        "methods": {f.method.name: one(f, loaded, report, judge, draws) for f in found},
        "overlap_at_3_percent": {a: {b: round(cut[a].jaccard(cut[b]), 3) for b in cut} for a in cut},
    }


def cell(row: dict[str, object]) -> str:
    """Return ``harmful / ability (random: harmful)``."""
    hit, chance = row["silenced"], row["random"]
    return f"{hit['harmful_rate']:.2f} / {hit['ability']:.2f} ({chance['harmful_rate']:.2f})"  # type: ignore[index]


def markdown(found: dict[str, dict[str, object]]) -> str:
    """Return the tables of all models."""
    lines = []
    for name, one in found.items():
        methods = one["methods"]
        assert isinstance(methods, dict)
        lines += ["", f"### {name}", "", "| method | " + " | ".join(f"{100 * s:g} %" for s in SHARES)]
        lines[-1] += " | its own set | halves agree (chance) |"
        lines.append("| --- |" + " --- |" * (len(SHARES) + 2))
        for method, row in methods.items():
            own, stable = row.get("own"), row["stability"]
            cells = [cell(row["shares"][f"{share:g}"]) for share in SHARES]
            cells.append(f"{own['neurons']}: {cell(own)}" if own else "none")
            known = stable is not None and stable["jaccard"] is not None
            cells.append(f"{stable['jaccard']:.2f} ({stable['chance']:.2f})" if known else "–")
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        overlap = one["overlap_at_3_percent"]
        assert isinstance(overlap, dict)
        lines += ["", "Overlap (Jaccard index) of the top 3 %; by chance 0.02:", ""]
        lines.append("| | " + " | ".join(overlap) + " |")
        lines.append("| --- |" + " --- |" * len(overlap))
        lines += [
            f"| `{a}` | " + " | ".join(f"{v:.2f}" for v in row.values()) + " |" for a, row in overlap.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--draws", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for name in given.models:
        if name not in found:  # what is there is not done again
            found[name] = model(name, MODELS[name], given.draws)
            given.out.write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
