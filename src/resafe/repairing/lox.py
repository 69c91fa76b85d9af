"""LoX: more of what alignment did, in its leading directions.

Perin et al., *LoX: Low-Rank Extrapolation Robustifies LLM Safety Against Fine-tuning*, COLM 2025,
https://arxiv.org/abs/2506.15606. With D = aligned - base and U_k its k leading left singular vectors::

    W <- W + α U_k U_kᵀ D        for every tensor of more than one dimension, embeddings and head included

``lox`` is the published use: W is the aligned model itself, hardened before it is released and tuned by others.
``lox-post`` adds the same to a model that has been tuned, which the paper does not evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from resafe.errors import UserError
from resafe.model.stored import catalogue
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Plan, Repair, Target, Unit
from resafe.repairing.projection import top_part
from resafe.repairing.space import DenseSpace
from resafe.weights.lowrank import left_singular


class _Extrapolation(Repair):
    """Add α times the part of rank k of the alignment delta."""

    k: int
    alpha: float

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.k < 0:
            raise UserError(f"lox: k must be at least 0, not {self.k}; 0 is the whole delta")

    def kinds(self, job: Job) -> tuple[Kind, ...]:
        """Return the dense space: D is not made of an adapter's directions."""
        return (Kind.DENSE,)

    def names(self, matrices: Sequence[str], everything: Sequence[str]) -> Sequence[str]:
        """Return every tensor."""
        return everything

    def prepare(self, job: Job) -> frozenset[str]:
        """Return the tensors of more than one dimension, by their headers."""
        inside = catalogue(job.tuned).of_tensor
        wide = (name for name in job.tuned.names if len(job.tuned.info(name).shape) > 1)
        return frozenset(matrix for name in wide for matrix in inside(name))

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Choose all that is no vector."""
        assert isinstance(statistics, frozenset)
        return Plan(statistics & measured.keys())

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Extrapolate one tensor."""
        tuned = unit.tuned[unit.key]
        return {unit.key: Target(self.extrapolated(tuned, self.delta(unit)), None)}

    def delta(self, unit: Unit) -> Tensor:
        """Return D."""
        return unit.alignment()

    def extrapolated(self, weight: Tensor, d: Tensor) -> Tensor:
        """Return ``W + α U_k U_kᵀ D`` in float32."""
        return weight.float() + self.alpha * top_part(d, self.k)


@method(
    "lox",
    verb="repair",
    title="LoX: low-rank extrapolation before release",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2506.15606",
    needs=frozenset({Need.BASE}),
    variants=(),  # no repair of a tuned model
)
@dataclass(frozen=True)
class LoX(_Extrapolation):
    """Harden an aligned model, so that later fine-tuning undoes less of it.

    Give the aligned model as the one to repair, and its base.

    Attributes:
        k: number of directions (paper: 6 for Llama-2-7B aligned with 65.6k examples, 3 for most others; 0: the
            whole delta).
        alpha: α (paper: 1.25).
        subtract: D taken in ``float32``, or in the type that the weights are ``stored`` in, as the published code
            does in bfloat16.
    """

    k: int = 6
    alpha: float = 1.25
    subtract: Literal["float32", "stored"] = "float32"

    def space(self, job: Job, statistics: object) -> DenseSpace:
        """Return the space in which the base is the reference: T is D.

        Raises:
            UserError: a tuned model is given, whose T is not only alignment.
        """
        known = [model.folder.resolve() for model in (job.tuned, job.base) if model is not None]
        if job.aligned is not None and job.aligned.folder.resolve() not in known:
            raise UserError(
                "lox hardens an aligned model before it is tuned; give that as the model to repair and its base "
                "with --base, or use --method lox-post for a tuned one"
            )
        return DenseSpace(job.tuned, job.base, job.base)

    def delta(self, unit: Unit) -> Tensor:
        """Return D = aligned - base."""
        d = unit.delta()
        return d if self.subtract == "float32" else d.to(unit.tuned[unit.key].dtype).float()


@method(
    "lox-post",
    verb="repair",
    title="LoX on a tuned model",
    badge=Badge.VARIANT,
    paper="https://arxiv.org/abs/2506.15606",
    needs=frozenset({Need.ALIGNED, Need.BASE}),
    strengths=(0.25, 1.0),
    variants=({"alpha": 1.2},),
)
@dataclass(frozen=True)
class LoXPost(_Extrapolation):
    """Add the leading directions of alignment to a tuned model.

    LSSF without data is this, with its rank.

    Attributes:
        k: number of directions (0: the whole delta).
        alpha: α, multiplied by the strength.
    """

    k: int = 8
    alpha: float = 0.3


def retention(d: Tensor, t: Tensor, k: int) -> tuple[float, float]:
    """Return LoX's diagnostics of one matrix, how much of a delta lies in alignment's k leading directions.

    ``R(M) = ‖U_k U_kᵀ M‖ / ‖M‖``, of D + T, which is the tuned model's delta from base, and of D itself: safety is
    lost as ``R_ft / R_align`` falls below 1.

    Args:
        d: D = aligned - base, (out, in).
        t: T = tuned - aligned, (out, in).
        k: number of directions.
    """
    u, _ = left_singular(d, k)
    r_ft, r_align = (float((u.T @ m).norm() / m.norm()) for m in (d + t, d))
    return r_ft, r_align
