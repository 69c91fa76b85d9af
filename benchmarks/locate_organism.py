"""Which located neurons matter in the organism: silence each method's highest scores and ask the model again.

    python benchmarks/locate_organism.py --out docs/locating.json [--models aligned ...] [--draws 5]

Neurons are located on the locating split and silenced on the reporting split (256 harmful, benign and ability
prompts each; nothing is chosen on it). Every method runs once, at its published defaults, with ``unit=neuron``
where its own unit is finer. Shares are of all feed-forward neurons, whole model; the control silences as many
random neurons per layer (mean over the draws). Sets that the methods' own rules choose are silenced too.
"""

from __future__ import annotations

import argparse
import json
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
RATES = ("harmful_rate", "over_refusal", "incoherent_rate", "ability")
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
    report = PromptSets(plan.report.harmful, plan.report.benign, (), plan.report.ability)
    request = Request(
        Bench.of(loaded, other),
        settings(),
        plan.locate.harmful,
        plan.locate.benign,
        judge,
        fingerprint(opened.files),
        note=print,
    )
    found = [f for f in locate_all(request) if f.scores.site in PARTS]
    nothing = NeuronSet(Site.FFN, {}, "nothing", request.model)
    cut = {f.method.name: f.scores.as_ffn().top(share=0.03) for f in found}
    return {
        "intact": rates(loaded, report, judge, nothing),
        "methods": {f.method.name: one(f, loaded, report, judge, draws) for f in found},
        "overlap_at_3_percent": {a: {b: round(cut[a].jaccard(cut[b]), 3) for b in cut} for a in cut},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--draws", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: model(name, MODELS[name], given.draws) for name in given.models}
    given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
