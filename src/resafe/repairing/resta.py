"""RESTA: add the safety vector to a tuned model.

Bhardwaj et al., *Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task
Arithmetic*, ACL 2024, https://arxiv.org/abs/2402.11746. With the safety vector v = aligned - unaligned::

    θ <- θ_tuned + γ v

The unaligned model is the base, or better the aligned model tuned on harmful data: give either as ``--base``. With a
base v also carries what else alignment taught, such as following instructions.

*DARE* drops each entry of a delta with probability p and divides the rest by 1 - p. Accounts of the paper differ in
which delta that is, the safety vector or the fine-tuning delta T; both are here.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Plan, Repair, Target, Unit


@method(
    "resta",
    verb="repair",
    title="RESTA: safety vector arithmetic",
    badge=Badge.PAPER,
    paper="https://arxiv.org/abs/2402.11746",
    needs=frozenset({Need.ALIGNED, Need.BASE}),
    strengths=(0.5, 1.0),
    variants=({"gamma": 1.0},),
)
@dataclass(frozen=True)
class RESTA(Repair):
    """Add γ times the safety vector to every tensor.

    Attributes:
        gamma: γ, multiplied by the strength (0.5 in a later paper's baseline of it; others take 1).
        dare: sparsify the ``safety`` vector, the fine-tuning delta of the ``task``, or ``none``.
        p: share of entries that DARE drops (0.3; its inventors go up to 0.9).
        seed: seed of the draw, together with each tensor's name.
    """

    gamma: float = 0.5
    dare: Literal["none", "safety", "task"] = "none"
    p: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.p < 1.0:
            raise UserError(f"resta: p must be at least 0 and below 1, not {self.p:g}")

    def kinds(self, job: Job) -> tuple[Kind, ...]:
        """Return the dense space: v is not made of an adapter's directions."""
        return (Kind.DENSE,)

    def names(self, matrices: Sequence[str], everything: Sequence[str]) -> Sequence[str]:
        """Return every tensor: the vector is one of whole models."""
        return everything

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Choose everything."""
        return Plan(frozenset(measured))

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Add the vector to one tensor."""
        v, tuned = unit.alignment(), unit.tuned[unit.key].float()
        if self.dare == "safety":
            v = dare(v, self.p, self.seed, unit.key)
        elif self.dare == "task":
            tuned = unit.aligned[unit.key].float() + dare(unit.delta(), self.p, self.seed, unit.key)
        return {unit.key: Target(tuned + self.gamma * v, None)}


def dare(delta: Tensor, p: float, seed: int, name: str) -> Tensor:
    """Return a delta without a share ``p`` of its entries, drawn by seed and name, the rest divided by 1 - p."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    kept = torch.rand(delta.shape, generator=generator) >= p
    return delta * kept / (1.0 - p)
