"""SafeMERGE: merge with a safety adapter, only in the matrices that left the alignment direction.

Djuhera et al., *SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via Selective Layer-Wise
Model Merging*, https://arxiv.org/abs/2503.17239. With SafeLoRA's ρ (see :mod:`resafe.repairing.safelora`) and an
adapter trained on public safety samples over the same aligned model::

    T <- (1 - a) T + a T_safety   where ρ < τ

The published code hands this to PEFT's ``linear`` combination, which adds up factors and not products::

    A <- Σ √(w_i s_i) A_i,   B <- Σ √(w_i s_i) B_i,   w = (1 - a, a)

so that the merged product holds cross terms of the two adapters. Here that is ``merge=linear``; the default is the
equation. Without a safety adapter the aligned model takes its place, T_safety = 0, as others have done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Model, Plan, Repair, Target, Unit
from resafe.repairing.projection import Likeness, left_of, likeness
from resafe.repairing.space import (
    AnySpace,
    DenseSpace,
    FactorSpace,
    RowSpace,
    alignment,
    choose_space,
    same_modules,
)
from resafe.weights.adapter import Adapter, open_model
from resafe.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Partners:
    """The models beside the tuned one, and the space to edit in."""

    space: AnySpace
    aligned: Model
    base: Checkpoint | None
    safety: Model | None


@method(
    "safemerge",
    verb="repair",
    title="SafeMERGE",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2503.17239",
    needs=frozenset({Need.ALIGNED, Need.BASE}),
    strengths=(0.5, 1.0),
    variants=({"weight": 0.8},),
)
@dataclass(frozen=True)
class SafeMERGE(Repair):
    """Merge the matrices with a low ρ with those of a safety adapter, or with the aligned model's.

    Attributes:
        safety: folder or Hub id of the safety adapter; a dense model tuned for safety will do, too.
        tau: τ; matrices below it are merged (published code: 0.35).
        weight: a, the safety adapter's weight (published code: 0.2).
        merge: ``delta`` merges products, and two adapters become one of both their ranks; ``linear`` merges factors,
            as PEFT does and so the published code.
    """

    safety: str | None = None
    tau: float = 0.35
    weight: float = 0.2
    merge: Literal["delta", "linear"] = "delta"

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0.0 < self.weight <= 1.0:
            raise UserError(f"safemerge: weight must be above 0 and at most 1, not {self.weight:g}")
        if self.merge == "linear" and self.safety is None:
            raise UserError(
                "safemerge: merge=linear merges two adapters; give the other with -p safety=FOLDER"
            )

    def strengths(self, offered: Sequence[float]) -> Sequence[float]:
        """Return strength 1 alone where a safety adapter is merged: there the weight says how much."""
        return offered if self.safety is None else (1.0,)

    def prepare(self, job: Job) -> Partners:
        """Open the safety adapter."""
        aligned = job.reference()
        safety = None if self.safety is None else open_model(self.safety)
        return Partners(self._space(job, safety), aligned, job.base, safety)

    def _space(self, job: Job, safety: Model | None) -> AnySpace:
        plain = choose_space(self.kinds(job), job)
        if safety is None:
            return plain
        if isinstance(plain, RowSpace) and isinstance(safety, Adapter) and _fit(plain, safety):
            self._check_ranks(plain.tuned, safety)
            return FactorSpace(plain.tuned, safety)
        if self.merge == "linear":
            raise UserError(
                "safemerge: merge=linear needs two adapters on the aligned model that change the same matrices, and "
                "an adapter as result; use merge=delta"
            )
        job.note("safemerge: the two models are no adapters of one kind; merging whole matrices")
        return DenseSpace(job.tuned, job.aligned, job.base)

    def _check_ranks(self, tuned: Adapter, safety: Adapter) -> None:
        unequal = [name for name in tuned.modules if tuned.rank(name) != safety.rank(name)]
        if self.merge == "linear" and unequal:
            raise UserError(f"safemerge: the two adapters differ in rank at {unequal[0]}; use merge=delta")

    def space(self, job: Job, statistics: object) -> AnySpace:
        """Return the space that was found to fit both models."""
        assert isinstance(statistics, Partners)
        return statistics.space

    def measure(self, unit: Unit, statistics: object) -> Likeness:
        """Return ρ of one matrix."""
        assert isinstance(statistics, Partners)
        dense = unit.kind is Kind.DENSE
        d = unit.alignment() if dense else alignment(statistics.aligned, statistics.base, unit.name)
        return likeness(d, *left_of(unit, statistics.space))

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Choose the matrices below τ."""
        rho = {name: found.rho for name, found in measured.items() if isinstance(found, Likeness)}
        chosen = frozenset(name for name, value in rho.items() if value < self.tau)
        if not chosen:
            raise UserError(f"safemerge chose no matrix: the lowest ρ is {min(rho.values()):g}; raise tau")
        details = {name: {"rho": value, "merged": name in chosen} for name, value in rho.items()}
        return Plan(chosen, details={"matrices": details})

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Merge one matrix."""
        assert isinstance(statistics, Partners)
        safety = statistics.safety
        if safety is None:
            value = unit.aligned[unit.key].float() + (1.0 - self.weight) * unit.delta()
            return {unit.key: Target(value, None)}
        if isinstance(statistics.space, FactorSpace):
            assert isinstance(safety, Adapter)
            own = statistics.space.tuned.scale(unit.name)
            pair = self._factors(unit, safety.scale(unit.name) / own)
            return {key: Target(value, None) for key, value in zip(unit.tuned, pair, strict=True)}
        if unit.name not in safety.names or safety.info(unit.name).shape != unit.tuned[unit.key].shape:
            raise UserError(
                f"{safety.folder} is of another shape at {unit.name}; give one tuned from the aligned"
            )
        tuned, other = unit.tuned[unit.key].float(), safety.tensor(unit.name).float()
        return {unit.key: Target((1.0 - self.weight) * tuned + self.weight * other, None)}

    def _factors(self, unit: Unit, scale: float) -> tuple[Tensor, Tensor]:
        """Return the merged A and B at the tuned scale; ``scale`` is the safety adapter's over the tuned one's.

        In the space of factors the reference is the safety adapter, its B at the tuned scale already.
        """
        (a, b), (a_safe, b_safe) = (
            [tensor.float() for tensor in pair.values()] for pair in (unit.tuned, unit.aligned)
        )
        if self.merge == "delta":
            left = torch.cat([(1.0 - self.weight) * b, self.weight * b_safe], dim=1)
            return torch.cat([a, a_safe]), left
        mine, other = math.sqrt(1.0 - self.weight), math.sqrt(self.weight)
        root = math.sqrt(scale)
        return mine * a + other * root * a_safe, mine * b + other / root * b_safe


def _fit(space: RowSpace, safety: Adapter) -> bool:
    """Whether tuned and safety adapter are two over the aligned model that change the same matrices."""
    if space.reference is not None or not same_modules(space.tuned, safety):
        return False
    if space.tuned.base.folder.resolve() != safety.base.folder.resolve():
        raise UserError(
            f"the safety adapter {safety.folder} is one over {safety.base.folder}, not over "
            f"{space.tuned.base.folder}; give one trained on the same aligned model"
        )
    return True
