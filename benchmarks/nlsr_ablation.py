"""Why NLSR does or does not repair the organism's continued adapter: one choice at a time, beside random neurons.

    python benchmarks/nlsr_ablation.py [--tuned tuned-lora]

Measured on the choosing split (200 prompts a set) at strength 1: an ablation, not a result. The last table gives, by
layer, how large the fine-tuning delta T is beside the alignment delta D, and the cosine between them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch

from resafe.candidates import TrialModel
from resafe.neurons import layer_of
from resafe.organism import path
from resafe.protocol import protocol
from resafe.registry import get, methods
from resafe.repairing.base import Job
from resafe.repairing.engine import plan_edit
from resafe.roles import assign
from resafe.weights.adapter import Adapter
from resafe.weights.lowrank import inner, norm

SETTINGS: tuple[dict[str, object], ...] = (
    {},
    {"selection": "bernoulli"},
    {"selection": "bernoulli-reference"},
    {"share": 1.0},
    {"share": 1.0, "beta": 0.0},
    {"share": 1.0, "beta": 2.0},
    {"share": 1.0, "keep_rank": "reference"},
    {"share": 1.0, "scope": "row"},
    {"share": 1.0, "propagate": True},
    {"share": 1.0, "amplify": "per-factor"},
    {"preset": "reference"},
    {"share": 1.0, "sparsity": 0.7},
    {"share": 1.0, "sparsity": 0.6},
    {"share": 1.0, "sparsity": 0.5},
)
DRAWS = 3


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tuned", default="tuned-lora")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods()
    roles = assign(path(options.tuned))
    prompts = protocol(roles.tuned.config)
    job = Job(
        roles.tuned, roles.aligned, roles.base, prompts.locate.harmful, prompts.locate.benign, prompts.judge
    )
    trial = TrialModel.of(roles.tuned, prompts.judge)
    print(
        "| setting | harmful | task | ability | random, harmful (3 draws) | task |\n|---|---|---|---|---|---|"
    )
    for setting in SETTINGS:
        print_line(trial, job, prompts.choose, setting)
    for factor in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        with trial.edited(plan_edit(get("interpolate", "repair"), {}, job), factor):
            found = trial.measure(prompts.choose)
        print(f"| interpolate {factor} | {rates(found)} | | |")
    if isinstance(roles.tuned, Adapter) and isinstance(roles.aligned, Adapter):
        print_geometry(roles.tuned, roles.aligned)


def rates(found: object) -> str:
    """Return harmful rate, task and ability as table cells."""
    return f"{found.harmful_rate.value:.3f} | {found.task_score.value:.3f} | {found.ability.value:.3f}"


def print_line(trial: TrialModel, job: Job, prompts: object, setting: dict[str, object]) -> None:
    """Print one setting beside its random control."""
    edit = plan_edit(get("nlsr", "repair"), setting, job)
    with trial.edited(edit, 1.0):
        found = trial.measure(prompts)
    text = ";".join(f"{key}={value}" for key, value in setting.items())
    harm, task = [], []
    for seed in range(DRAWS):
        control = {"like": "nlsr", "settings": text, "seed": seed}
        with trial.edited(plan_edit(get("random", "repair"), control, job, statistics=edit.statistics), 1.0):
            drawn = trial.measure(prompts)
        harm.append(drawn.harmful_rate.value)
        task.append(drawn.task_score.value)
    spans = [f"{sum(v) / len(v):.3f} ({min(v):.3f}–{max(v):.3f})" for v in (harm, task)]
    print(f"| nlsr {text or 'defaults'} | {rates(found)} | {spans[0]} | {spans[1]} |", flush=True)


def print_geometry(tuned: Adapter, aligned: Adapter) -> None:
    """Print, by layer, the size of T against D and their cosine, pooled over the layer's modules."""
    sums: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for name in tuned.modules:
        t, a = tuned.factors(name), aligned.factors(name)
        b = torch.cat([t.scale * t.b.double(), -a.scale * a.b.double()], dim=1)
        both = torch.cat([t.a.double(), a.a.double()])
        d = a.scale * a.b.double()
        sums[layer_of(name)] += torch.tensor([norm(b, both) ** 2, norm(d, a.a) ** 2, inner(b, both, d, a.a)])
    print("\n| layer | ‖T‖ / ‖D‖ | cos(T, D) |\n|---|---|---|")
    for layer, (tt, dd, td) in sorted(sums.items()):
        print(f"| {layer} | {float((tt / dd).sqrt()):.2f} | {float(td / (tt * dd).sqrt()):.2f} |")


if __name__ == "__main__":
    main()
