"""Antidote: zero the weights that matter most while the fine-tuned model answers harmful prompts.

Huang et al., *Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful
Fine-tuning*, ICML 2025, https://arxiv.org/abs/2408.09600. Over all tokens of n harmful prompts with harmful
answers in the tuned model, each entry of a linear map with inputs x gets Wanda's score, and in each row the
highest-scoring share ``dense_ratio`` is zeroed::

    S_ij = |W_ij| sqrt( Σ_tokens x_j² / n )        W <- (1 - M) ⊙ W

A row keeps its lowest ``int(in · (1 - dense_ratio))`` entries, so of a LoRA factor B of rank 8 at least one of
eight goes. An adapter is pruned in its own two factors (the inputs of B are A x). Of a full fine-tune only the
query, key and value matrices are, of which nothing but the position of a zero tells what was taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.lowrank import Calibration, Source, accumulate
from resafe.model.load import LoadedModel, load
from resafe.neurons import NeuronSet, Site
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Plan, Repair, Target, Unit
from resafe.repairing.calibrate import harmful_answers, input_norms
from resafe.repairing.space import AnySpace, DenseSpace, FactorSpace, same_modules
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import fingerprint

_QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@dataclass(frozen=True)
class Loudness:
    """What harmful prompts and answers did in the tuned model.

    Attributes:
        norms: tensor key -> root mean square of its inputs, (in,); None where bare weights decide.
        model: fingerprint of the tuned model.
    """

    norms: Mapping[str, Tensor] | None
    model: str


@method(
    "antidote",
    verb="repair",
    title="Antidote",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2408.09600",
    needs=frozenset({Need.HARMFUL}),
    variants=({}, {"dense_ratio": 0.02}),
)
@dataclass(frozen=True)
class Antidote(Repair):
    """Zero the entries that the fine-tuned model's harmful answers need most.

    Attributes:
        dense_ratio: share of each row that is zeroed (published: 0.1, for some tasks 0.05).
        score: ``wanda``, or ``magnitude`` for the weights alone, without a run.
        matrices: of a full fine-tune ``qkv``, as published, or ``all`` matrices of the blocks.
        answers: the harmful answers: the tuned model's ``own``, those of them that are no refusals, or the
            responses ``given`` with the harmful prompts.
    """

    dense_ratio: float = 0.1
    score: Literal["wanda", "magnitude"] = "wanda"
    matrices: Literal["qkv", "all"] = "qkv"
    answers: Literal["own", "given"] = "own"

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0.0 < self.dense_ratio <= 1.0:
            raise UserError(f"antidote: dense_ratio must be above 0 and at most 1, not {self.dense_ratio:g}")

    def names(self, matrices: Sequence[str], everything: Sequence[str]) -> Sequence[str]:
        """Return every matrix of an adapter, and of a full fine-tune those asked for."""
        if not everything or self.matrices == "all":
            return matrices
        return [name for name in matrices if name.endswith(_QKV)]

    def space(self, job: Job, statistics: object) -> AnySpace:
        """Return the factors of an adapter, else the dense space."""
        tuned, aligned = job.tuned, job.aligned
        if not isinstance(tuned, Adapter) or tuned.replaced or tuned.settings.get("fan_in_fan_out"):
            return DenseSpace(tuned, aligned, job.base)
        paired = isinstance(aligned, Adapter) and same_modules(tuned, aligned)
        if isinstance(aligned, Adapter) and paired and _ranks(tuned) == _ranks(aligned):
            return FactorSpace(tuned, aligned)
        return FactorSpace(tuned, tuned)  # no other factors to stand beside these

    def prepare(self, job: Job) -> Loudness:
        """Run the tuned model over harmful prompts and answers."""
        model = fingerprint(job.tuned.files)
        if self.score == "magnitude":
            return Loudness(None, model)
        key = ("antidote", job.tuned.folder, self.answers)
        if key not in job.passes:
            loaded = load(job.tuned.folder, merge=True)
            text = harmful_answers(loaded, job.harmful, job.judge, self.answers)
            job.passes[key] = loudness(loaded, text, self.space(job, None))
        norms = job.passes[key]
        assert isinstance(norms, dict)
        return Loudness(norms, model)

    def measure(self, unit: Unit, statistics: object) -> dict[str, Tensor]:
        """Return the entries to zero in each tensor of one matrix."""
        assert isinstance(statistics, Loudness)
        scores = {key: tensor.float().abs() for key, tensor in unit.tuned.items()}
        if statistics.norms is not None:
            scores = {key: score * statistics.norms[key] for key, score in scores.items()}
        return {key: self.loudest(score) for key, score in scores.items()}

    def loudest(self, scores: Tensor) -> Tensor:
        """Mark what is zeroed in each row, bool (out, in)."""
        kept = int(scores.shape[1] * (1 - self.dense_ratio))
        order = scores.argsort(dim=1, stable=True)
        return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order[:, kept:], True)

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Edit every matrix."""
        assert isinstance(statistics, Loudness)
        masks: dict[str, Tensor] = {}
        for found in measured.values():
            assert isinstance(found, dict)
            masks |= found
        neurons = NeuronSet(Site.ENTRY, masks, "antidote", statistics.model, asdict(self))
        return Plan(frozenset(measured), masks, neurons=neurons)

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Aim at zero."""
        return {key: Target(torch.zeros_like(tensor), plan.masks[key]) for key, tensor in unit.tuned.items()}


def loudness(loaded: LoadedModel, text: Calibration, space: AnySpace) -> dict[str, Tensor]:
    """Return ``sqrt(Σ_tokens x_j² / n)`` of the inputs of each tensor of a space, over all tokens of the texts."""
    whole = Calibration(text.ids, [0] * len(text.ids))
    if isinstance(space, DenseSpace):
        return input_norms(loaded, whole, space.catalogue)
    factors = {name: space.tuned.factors(name).a.float() for name in space.matrices()}
    sums: dict[str, Tensor] = {}

    def see(source: Source, x: Tensor) -> None:
        h = x @ factors[source.name].to(x.device).T
        for which, inputs in (("A", x), ("B", h)):
            key = space.tuned.key(source.name, which)
            square = inputs.double().square().sum(0).cpu()
            sums[key] = sums[key] + square if key in sums else square

    accumulate(loaded, whole, map(Source, factors), see)
    return {key: (total / len(text.ids)).sqrt().float() for key, total in sums.items()}


def _ranks(adapter: Adapter) -> dict[str, int]:
    return {name: adapter.rank(name) for name in adapter.modules}
