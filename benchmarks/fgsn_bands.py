"""FGSN in every band of three layers of the late organism: what the choice of the band is worth.

    python benchmarks/fgsn_bands.py

Measured on the choosing split (200 prompts a set), seed 0, q=1 p=0.05: the curve behind the band, not a result.
"""

from __future__ import annotations

import torch

from resafe.candidates import TrialModel
from resafe.organism import path
from resafe.protocol import protocol
from resafe.registry import get
from resafe.repairing.base import Job
from resafe.repairing.engine import plan_edit
from resafe.roles import assign

WIDTH = 3


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    roles = assign(path("late-tuned"))
    prompts = protocol(roles.tuned.config)
    job = Job(
        roles.tuned, roles.aligned, roles.base, prompts.locate.harmful, prompts.locate.benign, prompts.judge
    )
    trial = TrialModel.of(roles.tuned, prompts.judge)
    layers = int(str(roles.tuned.config["num_hidden_layers"]))
    print("| layers | harmful | task |\n|---|---|---|")
    for first in range(layers - WIDTH + 1):
        band = f"{first}-{first + WIDTH - 1}"
        edit = plan_edit(get("fgsn", "repair"), {"q": 1.0, "p": 0.05, "band": band}, job)
        with trial.edited(edit, 1.0):
            found = trial.measure(prompts.choose)
        print(f"| {band} | {found.harmful_rate.value:.3f} | {found.task_score.value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
