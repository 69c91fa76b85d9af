"""EMA: the exponential moving average of a fine-tune's saved checkpoints, from the aligned model on.

Kim et al., *Rethinking Safety in LLM Fine-tuning: An Optimization Perspective*, COLM 2025,
https://arxiv.org/abs/2508.12531, keep it during training. No code was published and the coefficient is not known:
this is a reconstruction, after training, of their *shadow* average from what was saved::

    θ̄_0 = θ_aligned        θ̄_t = η θ̄_{t-1} + (1 - η) θ_t        t = 1 … T

A checkpoint saved at step t_k stands for all steps since the one before it, so its weight is
``η^(T - t_k) - η^(T - t_{k-1})``, and the aligned model's is ``w0 = η^T``. It is w0 that is given: the same η
keeps 74 % of the aligned model after 300 steps and 5 % after 3,000. The average is close to an interpolation of
aligned and tuned weights (control ``interpolate``) and, as the paper says, no defence against harmful data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from resafe.errors import UserError
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Model, Plan, Repair, Target, Unit
from resafe.weights.adapter import open_model
from resafe.weights.checkpoint import fingerprint

_SAVED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Trajectory:
    """The saved checkpoints before the tuned model, and the weights of the average.

    Attributes:
        models: the checkpoints in order.
        weights: of the aligned model, of each checkpoint and of the tuned model; they add up to 1.
    """

    models: tuple[Model, ...]
    weights: tuple[float, ...]


@method(
    "ema",
    verb="repair",
    title="EMA over saved checkpoints",
    badge=Badge.RECONSTRUCTION,
    paper="https://arxiv.org/abs/2508.12531",
    needs=frozenset({Need.ALIGNED}),
    variants=({}, {"w0": 0.5}),
)
@dataclass(frozen=True)
class EMA(Repair):
    """Replace the tuned weights by their moving average over the fine-tune's saved checkpoints.

    Attributes:
        w0: the aligned model's share of the average, ``η^T`` (ours: 0.2; the paper's η is not known).
        checkpoints: a Trainer's output folder with its ``checkpoint-N`` folders, or folders in order, separated
            by commas, taken as equally far apart; by default those inside the tuned model's folder. The tuned
            model is the last of the trajectory, whether it is among them or not.
    """

    w0: float = 0.2
    checkpoints: str | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0.0 < self.w0 < 1.0:
            raise UserError(f"ema: w0 must lie between 0 and 1, not {self.w0:g}")

    def kinds(self, job: Job) -> tuple[Kind, ...]:
        """Return the dense space: the average of products is none of the factors'."""
        return (Kind.DENSE,)

    def names(self, matrices: Sequence[str], everything: Sequence[str]) -> Sequence[str]:
        """Return every tensor."""
        return everything

    def prepare(self, job: Job) -> Trajectory:
        """Open the checkpoints and weigh them."""
        saved = self._saved(job.tuned.folder)
        models = [open_model(folder) for folder in saved.values()]
        steps = list(saved)
        for folder, model in zip(saved.values(), models, strict=True):
            _check_shapes(job.tuned, model, folder)
        if fingerprint(models[-1].files) == fingerprint(job.tuned.files):
            models.pop()  # the tuned model itself
        else:
            steps.append(steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else steps[-1]))
        return Trajectory(tuple(models), average(steps, self.w0))

    def _saved(self, tuned: Path) -> dict[int, Path]:
        """Return the checkpoints' folders by step, in order."""
        given = [Path(part.strip()) for part in (self.checkpoints or str(tuned)).split(",")]
        if len(given) > 1:
            return dict(enumerate(given, start=1))
        inside = given[0].iterdir() if given[0].is_dir() else ()
        found = {int(match[1]): f for f in inside if (match := _SAVED.fullmatch(f.name))}
        if not found:
            raise UserError(
                f"ema: {given[0]} holds no checkpoint-N folder; give the fine-tune's saved checkpoints with "
                "-p checkpoints=FOLDER or -p checkpoints=FOLDER,FOLDER"
            )
        return dict(sorted(found.items()))

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Average everything."""
        assert isinstance(statistics, Trajectory)
        return Plan(frozenset(measured), details={"weights": list(statistics.weights)})

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Aim at the average of one tensor."""
        assert isinstance(statistics, Trajectory)
        first, *between, last = statistics.weights
        value: Tensor = first * unit.aligned[unit.key].float() + last * unit.tuned[unit.key].float()
        for weight, model in zip(between, statistics.models, strict=True):
            value += weight * model.tensor(unit.name).float()
        return {unit.key: Target(value, None)}


def average(steps: Sequence[int], w0: float) -> tuple[float, ...]:
    """Return the weights of the aligned model and of what was saved at ``steps``, the last of which is T."""
    left = [w0 ** (1 - step / steps[-1]) for step in (0, *steps)]  # η^(T - t)
    return (left[0], *(now - before for before, now in zip(left, left[1:], strict=False)))


def _check_shapes(tuned: Model, model: Model, folder: Path) -> None:
    """Refuse a checkpoint of another model."""
    for name in tuned.names:
        if name not in model.names or model.info(name).shape != tuned.info(name).shape:
            raise UserError(
                f"ema: {folder} does not hold {name} as the tuned model does; give that fine-tune's own checkpoints"
            )
