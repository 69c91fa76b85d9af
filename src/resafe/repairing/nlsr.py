"""NLSR: transplant the damaged safety neurons of a LoRA adapter from an amplified reference.

Yi et al., *NLSR: Neuron-Level Safety Realignment of Large Language Models Against Harmful Fine-Tuning*,
AAAI 2025, https://arxiv.org/abs/2412.12497. A neuron is one entry of a LoRA factor.

1. *Amplify* the aligned adapter: ``ΔW_e = (1 + β)·ΔW_a`` (the weak model's delta is zero where preference
   training starts from the merged weak model).
2. *Identify*: for a factor W with stacked inputs X over response tokens, project W on the top-k right
   singular vectors V of ``X Wᵀ``, ``Ŵ = V Vᵀ W``; the neurons are the largest ``1 - P_SR`` of ``|Ŵ|``.
3. *Restore*: the less the masked products ``(M_B⊙B)(M_A⊙A)`` of reference and tuned agree (cosine), the
   more a module is damaged. In the chosen modules ``A <- M_A ? A_e : A_t`` and ``B <- M_B ? B_e : B_t``.

The identification needs only ``G = Σ h hᵀ`` with ``h = A x``, an r×r matrix per module: V of A are the top
eigenvectors of G, and with the thin QR ``B = Q R`` those of B are ``Q E``, E the top eigenvectors of
``R G Rᵀ``. That is exact, needs no randomised SVD, and adds up over batches and machines.

Entries of factors are comparable only where both adapters share a basis: ``(B R⁻¹)(R A)`` is the same delta.
Adapters that do not are brought together by an orthogonal R where that is possible; otherwise, and for
full fine-tunes, the same three steps run on the dense deltas, whose entries need no common basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.lowrank import get_weight, set_weight
from resafe.locating.nlsr import LowRank
from resafe.model.load import LoadedModel, load
from resafe.model.stored import InMemory, catalogue
from resafe.neurons import NeuronSet, Site, layer_of
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Plan, Repair, Target, Unit
from resafe.repairing.calibrate import input_samples, with_responses
from resafe.repairing.space import (
    PARTS,
    AnySpace,
    DenseSpace,
    FactorSpace,
    alignment,
    same_modules,
)
from resafe.weights.adapter import Adapter, Factors
from resafe.weights.checkpoint import Checkpoint, fingerprint
from resafe.weights.lowrank import cosine

SAME_BASIS = 0.5  # cosine of A_t and A_a above which they are taken to share a basis
DENSE_TOKENS = 1024  # response tokens kept per matrix in the dense mode
_ORDER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", *PARTS[:3])


@dataclass(frozen=True)
class Regions:
    """What the identification found.

    Attributes:
        masks: factor key -> neurons, in the factor mode.
        rotations: module -> R that brings the tuned adapter to the reference's basis.
        inputs: matrix -> sampled inputs (tokens, in), in the dense mode.
        basis: ``shared``, ``mended`` (by the orthogonal fix) or ``dense``.
        model: fingerprint of the reference.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    basis: Literal["shared", "mended", "dense"] = "shared"
    model: str = ""


@method(
    "nlsr",
    verb="repair",
    title="Neuron-Level Safety Realignment",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2412.12497",
    needs=frozenset({Need.ALIGNED, Need.HARMFUL}),
    strengths=(0.8, 1.0),
    variants=(
        {},
        {"share": 1.0},
        {"share": 1.0, "amplify": "per-factor"},
        {"share": 1.0, "sparsity": 0.7},
    ),
)
@dataclass(frozen=True)
class NLSR(LowRank, Repair):
    """Transplant damaged safety neurons of the adapter from the amplified aligned adapter.

    Attributes:
        beta: amplification; the reference's delta is (1 + beta) times the aligned one (paper: 0.9;
            0 when the reference that is given is already amplified).
        amplify: ``product`` scales B by 1 + beta. ``per-factor`` scales both factors by 2·beta, as the
            published code does, which multiplies the delta by (2·beta)².
        sparsity: P_SR; the share of entries that are *not* neurons (paper: 0.8).
        keep_rank: k, the kept directions: ``paper`` r·(1 - P_SR), ``reference`` r·P_SR as the published
            code, or a number. In the dense mode r is the matrix's smaller side.
        scope: the largest entries of each ``matrix`` (published code) or of each ``row`` (paper's text).
        propagate: whether later blocks see the projected factors of earlier ones while being measured
            (published code), at one pass over the prompts per block instead of one in all.
        selection: which modules are restored. ``lowest``: the ``share`` with the lowest similarity,
            deterministic. ``bernoulli``: drawn with the paper's probabilities, least similar most likely.
            ``bernoulli-reference``: the published code's inverted polarity. ``threshold``: all whose
            similarity is below ``tau``.
        share: expected share of restored modules (paper: P_L = 0.5).
        spread: half the range of the probabilities over the ranks (published code: 0.2).
        tau: the threshold.
        seed: seed of the draw.
        transplant: ``factor`` overwrites entries and keeps the rank; ``exact`` is the paper's equation
            without cross terms, a product of rank 2r.

    Raises:
        UserError: P_SR, share or the kept rank leave nothing to choose; or the neuron set given was
            made for another reference.
    """

    beta: float = 0.9
    amplify: Literal["product", "per-factor"] = "product"
    sparsity: float = 0.8
    keep_rank: Literal["paper", "reference"] | int = "paper"
    scope: Literal["matrix", "row"] = "matrix"
    propagate: bool = False
    selection: Literal["lowest", "bernoulli", "bernoulli-reference", "threshold"] = "lowest"
    share: float = 0.5
    spread: float = 0.2
    tau: float = 0.5
    seed: int = 42
    transplant: Literal["factor", "exact"] = "factor"

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"scope": "row", "selection": "bernoulli", "transplant": "exact"},
        "reference": {
            "amplify": "per-factor",
            "keep_rank": "reference",
            "propagate": True,
            "selection": "bernoulli-reference",
        },
    }

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 <= self.sparsity < 1.0:
            raise UserError(f"nlsr: sparsity must be at least 0 and below 1, not {self.sparsity:g}")
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"nlsr: share must be above 0 and at most 1, not {self.share:g}")

    def strengths(self, offered: Sequence[float]) -> Sequence[float]:
        """Return strength 1 alone where the rank grows: there is nothing between."""
        return (1.0,) if self.transplant == "exact" else offered

    # Step 1 ------------------------------------------------------------------------------------------

    def amplified(self, factors: Factors) -> Factors:
        """Return the reference's factors: the aligned delta times 1 + beta, or (2·beta)²."""
        if self.amplify == "per-factor":
            return Factors(
                factors.a.float() * (2 * self.beta), factors.b.float() * (2 * self.beta), factors.scale
            )
        return Factors(factors.a.float(), factors.b.float() * (1 + self.beta), factors.scale)

    # Step 2 ------------------------------------------------------------------------------------------

    def prepare(self, job: Job) -> Regions:
        """Check the basis, then find the neurons of the reference, or take those that are given."""
        rotations = common_basis(job)
        if rotations is None:
            job.note("nlsr: the two models share no adapter basis; working on dense deltas")
            return Regions(inputs=self._dense_inputs(job), basis="dense")
        basis: Literal["shared", "mended"] = "mended" if rotations else "shared"
        if rotations:
            job.note(f"nlsr: {len(rotations)} modules brought to the reference's basis by a rotation")
        reference = job.reference()
        assert isinstance(reference, Adapter)
        model = fingerprint(reference.files)
        if job.neurons is not None:
            return Regions(_given_masks(job.neurons, model, reference), rotations, basis=basis, model=model)
        factors = {name: self.amplified(reference.factors(name)) for name in reference.modules}
        loaded = _load_reference(reference, factors)
        text = with_responses(loaded, job.harmful, job.judge)
        masks = {
            reference.key(name, which): self.largest(projected)
            for name, pair in self.project_all(loaded, text, factors).items()
            for which, projected in zip("AB", pair, strict=True)
        }
        return Regions(masks, rotations, basis=basis, model=model)

    # Step 3 ------------------------------------------------------------------------------------------

    def space(self, job: Job, statistics: object) -> AnySpace:
        """Return the factor space where the adapters share a basis, else the dense one."""
        assert isinstance(statistics, Regions)
        if statistics.basis == "dense":
            return DenseSpace(job.tuned, job.aligned, _dense_base(job))
        assert isinstance(job.tuned, Adapter)
        assert isinstance(job.aligned, Adapter)
        return FactorSpace(job.tuned, job.aligned, statistics.rotations)

    def measure(self, unit: Unit, statistics: object) -> float:
        """Return the cosine of the masked deltas of reference and tuned (1 where either is zero)."""
        assert isinstance(statistics, Regions)
        if unit.kind is Kind.DENSE:
            reference, tuned, mask = self._dense(unit, statistics)
            return _flat_cosine(reference * mask, tuned * mask)
        key_a, key_b = unit.tuned
        mask_a, mask_b = statistics.masks[key_a], statistics.masks[key_b]
        a_e, b_e = unit.aligned[key_a].float() * mask_a, unit.aligned[key_b].float() * mask_b
        return cosine(b_e, a_e, unit.tuned[key_b].float() * mask_b, unit.tuned[key_a].float() * mask_a)

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Choose the damaged modules by their similarity."""
        assert isinstance(statistics, Regions)
        similarity = {n: float(str(measured[n])) for n in sorted(measured, key=_module_order)}
        probability, chosen = self.choose(list(similarity.values()))
        details = {
            name: {"similarity": value, "probability": p, "restored": picked}
            for (name, value), p, picked in zip(similarity.items(), probability, chosen, strict=True)
        }
        restored = frozenset(name for name, picked in zip(similarity, chosen, strict=True) if picked)
        if not restored:
            raise UserError("nlsr chose no module to restore; raise share or tau")
        neurons = None
        if statistics.masks:
            neurons = NeuronSet(Site.ENTRY, statistics.masks, "nlsr", statistics.model, asdict(self))
        return Plan(restored, details={"basis": statistics.basis, "modules": details}, neurons=neurons)

    def choose(self, similarity: Sequence[float]) -> tuple[list[float], list[bool]]:
        """Return each module's probability of being restored, and whether it is.

        The probabilities run linearly over the ranks of the similarity from ``share - spread`` to
        ``share + spread``, the least similar module having the highest (the published code: the lowest).
        """
        n = len(similarity)
        order = sorted(range(n), key=lambda i: similarity[i])
        rank = [0] * n
        for place, index in enumerate(order):
            rank[index] = place
        if self.selection == "threshold":
            return [float(s < self.tau) for s in similarity], [s < self.tau for s in similarity]
        if self.selection == "lowest":
            count = max(1, round(self.share * n))
            return [float(r < count) for r in rank], [r < count for r in rank]
        likeness = torch.tensor([r / max(1, n - 1) for r in rank])  # 1 for the most similar
        drawn_center = self.share if self.selection == "bernoulli-reference" else 1.0 - self.share
        chance = (drawn_center - self.spread + 2 * self.spread * likeness).clamp(0.0, 1.0)
        draw = torch.bernoulli(chance, generator=torch.Generator().manual_seed(self.seed)).bool()
        if self.selection == "bernoulli-reference":
            return chance.tolist(), draw.tolist()
        return (1 - chance).tolist(), (~draw).tolist()

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Overwrite the neurons of one module with the reference's."""
        assert isinstance(statistics, Regions)
        if unit.kind is Kind.DENSE:
            reference, tuned, mask = self._dense(unit, statistics)
            value = unit.tuned[unit.key].float() - tuned + reference
            return {unit.key: Target(value, mask)}
        key_a, key_b = unit.tuned
        reference_factors = self.amplified(Factors(unit.aligned[key_a], unit.aligned[key_b], 1.0))
        values = {key_a: reference_factors.a, key_b: reference_factors.b}
        if self.transplant == "factor":
            return {key: Target(value, statistics.masks[key]) for key, value in values.items()}
        parts = {}
        for key, dim in ((key_a, 0), (key_b, 1)):
            mask = statistics.masks[key]
            parts[key] = Target(
                torch.cat([values[key] * mask, unit.tuned[key].float() * ~mask], dim=dim), None
            )
        return parts

    # Dense mode --------------------------------------------------------------------------------------

    def _dense(self, unit: Unit, regions: Regions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the amplified delta, the tuned delta (both from base) and the neurons of one matrix."""
        aligned_delta = unit.alignment()
        reference = aligned_delta * ((2 * self.beta) ** 2 if self.amplify == "per-factor" else 1 + self.beta)
        tuned = unit.delta() + aligned_delta
        s = regions.inputs[unit.name] @ reference.T  # (tokens, out)
        v = torch.linalg.svd(s, full_matrices=False).Vh[: self.kept_rank(*reference.shape)].T  # (out, k)
        projected = v @ (v.T @ reference)
        return (
            reference,
            tuned,
            self.largest(projected) & (projected != 0),
        )  # none of an expert without a token

    def _dense_inputs(self, job: Job) -> dict[str, Tensor]:
        """Sample the inputs of every matrix in the amplified reference, over response tokens."""
        if job.neurons is not None:
            raise UserError(
                "nlsr: saved neurons are entries of adapter factors; these models share no such basis"
            )
        base, aligned = _dense_base(job), job.reference()
        loaded = load(aligned.folder, merge=True)
        known = catalogue(aligned)
        memory = InMemory(loaded, known)
        factor = (2 * self.beta) ** 2 if self.amplify == "per-factor" else 1 + self.beta
        for name, matrix in known.matrices.items():
            memory.write(name, memory.read(name) + (factor - 1) * alignment(aligned, base, matrix))
        text = with_responses(loaded, job.harmful, job.judge)
        return input_samples(loaded, text, known, DENSE_TOKENS)


def common_basis(job: Job) -> dict[str, Tensor] | None:
    """Return the rotations that bring the tuned adapter to the reference's basis; None if nothing does.

    Modules whose factor A already points the reference's way (cosine above 0.5) need none. For the rest
    the orthogonal R that minimises ``‖R A_t - A_a‖`` is tried.
    """
    tuned, aligned = job.tuned, job.aligned
    if not (isinstance(tuned, Adapter) and isinstance(aligned, Adapter) and same_modules(tuned, aligned)):
        return None
    if tuned.replaced or any(tuned.rank(n) != aligned.rank(n) for n in tuned.modules):
        return None
    rotations = {}
    for name in tuned.modules:
        mine, theirs = tuned.factors(name).a.float(), aligned.factors(name).a.float()
        if _flat_cosine(mine, theirs) > SAME_BASIS:
            continue
        u, _, vh = torch.linalg.svd(theirs @ mine.T)
        rotation = u @ vh
        if _flat_cosine(rotation @ mine, theirs) <= SAME_BASIS:
            return None
        rotations[name] = rotation
    return rotations


def _load_reference(reference: Adapter, factors: Mapping[str, Factors]) -> LoadedModel:
    """Load the base with the amplified reference added into its weights."""
    loaded = load(reference.base.folder)
    for name, pair in factors.items():
        set_weight(loaded, name, get_weight(loaded, name) + pair.delta())
    return loaded


def _dense_base(job: Job) -> Checkpoint:
    if job.base is not None:
        return job.base
    if isinstance(job.aligned, Adapter):
        return job.aligned.base
    raise UserError(
        "nlsr on models without a common adapter needs the base model (before alignment); give --base"
    )


def _given_masks(neurons: NeuronSet, model: str, reference: Adapter) -> dict[str, Tensor]:
    if neurons.site is not Site.ENTRY:
        raise UserError(
            f"nlsr works on entries of LoRA factors; the neuron set given is one of {neurons.site}s"
        )
    if neurons.model != model:
        raise UserError("the neuron set was made for another reference adapter; find the neurons of this one")
    missing = {reference.key(n, w) for n in reference.modules for w in "AB"} - set(neurons.masks)
    if missing:
        raise UserError(
            f"the neuron set lacks {sorted(missing)[0]}; find the neurons of this reference again"
        )
    return dict(neurons.masks)


def _flat_cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    square = float(one @ one) * float(other @ other)
    return float(one @ other) / square**0.5 if square > 0 else 1.0


def _module_order(name: str) -> tuple[int, int]:
    """Return a module's place in the order of computation: q, k, v, o, gate, up, down of each layer, others last."""
    part = name.split(f"layers.{layer_of(name)}.")[-1].removesuffix(".weight")
    return layer_of(name), _ORDER.index(part) if part in _ORDER else len(_ORDER)
