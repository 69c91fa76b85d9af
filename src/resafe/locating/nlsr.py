"""NLSR's low-rank safety regions: the entries that write most along safety's leading directions.

Yi et al., *NLSR: Neuron-Level Safety Realignment of Large Language Models Against Harmful Fine-Tuning*,
https://arxiv.org/abs/2412.12497, step 2: with V (out, k) the top k right singular vectors of ``X Wᵀ`` over the
tokens of refusals, ``Ŵ = V Vᵀ W``, and the neurons are the largest ``1 - P_SR`` of ``|Ŵ|``. W is a factor of a
LoRA adapter, as published, or a whole matrix. The repair uses the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.base import Found, Locate, Values
from resafe.locating.gradients import Answers
from resafe.locating.lowrank import (
    Calibration,
    SecondMoments,
    Source,
    Unit,
    collect,
    get_weight,
    grams,
    set_weight,
    sweep,
    top_eigenvectors,
)
from resafe.locating.observe import Bench, Observer
from resafe.model.load import LoadedModel
from resafe.neurons import NeuronScores, NeuronSet, Site, layer_of
from resafe.registry import Badge, Need, method
from resafe.weights.adapter import Adapter, Factors
from resafe.weights.checkpoint import ADAPTER_CONFIG


class LowRank:
    """NLSR's identification, with its parameters as `resafe.repairing.nlsr.NLSR` describes them."""

    sparsity: float
    keep_rank: Literal["paper", "reference"] | int
    scope: Literal["matrix", "row"]
    propagate: bool

    def project_all(
        self, loaded: LoadedModel, text: Calibration, factors: Mapping[str, Factors]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return Â and B̂ of each module, given the reference model in memory."""
        projected: dict[str, tuple[Tensor, Tensor]] = {}
        for group in self._groups(factors):
            found = grams(loaded, text, {Source(name): factors[name].a for name in group})
            for name in group:
                projected[name] = self.project(factors[name], found[Source(name)])
                if self.propagate:
                    change = Factors(*projected[name], factors[name].scale).delta() - factors[name].delta()
                    set_weight(loaded, name, get_weight(loaded, name) + change)
        return projected

    def _groups(self, factors: Mapping[str, Factors]) -> list[list[str]]:
        if not self.propagate:
            return [list(factors)]
        layers = sorted({layer_of(name) for name in factors})
        return [[name for name in factors if layer_of(name) == layer] for layer in layers]

    def project(self, factors: Factors, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Â = E Eᵀ A`` and ``B̂ = Q F Fᵀ R`` from the Gram matrix (r, r) of the bottleneck."""
        a, b = factors.a.double(), factors.b.double()
        e = top_eigenvectors(gram, self.kept_rank(*a.shape))
        q, r = torch.linalg.qr(b)
        f = top_eigenvectors(r @ gram @ r.T, self.kept_rank(*b.shape))
        return (e @ (e.T @ a)).float(), (q @ (f @ (f.T @ r))).float()

    def kept_rank(self, out: int, width: int) -> int:
        """Return k, the number of kept directions of a matrix."""
        if isinstance(self.keep_rank, int):
            return max(1, min(self.keep_rank, out, width))
        share = self.sparsity if self.keep_rank == "reference" else 1.0 - self.sparsity
        return max(1, int(min(out, width) * share + 1e-9))

    def largest(self, projected: Tensor) -> Tensor:
        """Return the entries strictly above the P_SR quantile of ``|Ŵ|``, per matrix or per row."""
        score = projected.abs()
        flat = score.reshape(1, -1) if self.scope == "matrix" else score
        index = int(flat.shape[1] * self.sparsity)
        threshold = flat.kthvalue(index + 1, dim=1, keepdim=True).values
        return (flat > threshold).reshape(score.shape)


@method(
    "nlsr",
    verb="locate",
    title="NLSR: low-rank safety regions",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2412.12497",
    needs=frozenset({Need.HARMFUL}),
)
@dataclass(frozen=True)
class LocateNLSR(LowRank, Locate):
    """Choose the largest ``1 - P_SR`` of |Ŵ|: entries of a LoRA adapter's factors, or of a model's matrices.

    With an adapter its factors are looked at, as published; the amplification before it is a step of the repair.

    Attributes:
        sparsity: P_SR, the share of entries that are not chosen (paper: 0.8).
        keep_rank: k, the kept directions: ``paper`` r·(1 - P_SR), ``reference`` r·P_SR as the published code, or a
            number; r is the matrix's smaller side.
        scope: the largest entries of each ``matrix`` (published code) or of each ``row`` (paper's text).
        propagate: whether later blocks see the projected weights of earlier ones (published code).
        unit: ``entry``, or ``neuron``: |Ŵ| of the whole weights added up over a neuron's rows of gate and up and
            its column of down, on every architecture; the largest of each part are chosen.
    """

    weights: ClassVar[bool] = True
    resampled: ClassVar[bool] = False

    sparsity: float = 0.8
    keep_rank: Literal["paper", "reference"] | int = "paper"
    scope: Literal["matrix", "row"] = "matrix"
    propagate: bool = False
    unit: Unit = "entry"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 <= self.sparsity < 1.0:
            raise UserError(f"nlsr: sparsity must be at least 0 and below 1, not {self.sparsity:g}")

    def place(self) -> Site:
        """Return the site of the unit."""
        return Site.ENTRY if self.unit == "entry" else Site.FFN

    def observers(self) -> tuple[Observer, ...]:
        """Ask for responses; the passes over them are this method's own."""
        return (Answers(),)

    @torch.no_grad()
    def scores(self, found: Found) -> Values:
        """Return |Ŵ|."""
        text = Calibration.of(found.texts, "harmful")
        factors = adapter_factors(found.bench) if self.unit == "entry" else {}
        if factors:
            return self._factors(found.bench.loaded, text, factors)
        swept = sweep(found.bench, {"harmful": text}, self.unit, self._edit, self.propagate)
        return collect(swept, found.bench, self.unit)

    def _factors(self, loaded: LoadedModel, text: Calibration, factors: Mapping[str, Factors]) -> Values:
        old = {name: get_weight(loaded, name) for name in factors} if self.propagate else {}
        try:
            projected = self.project_all(loaded, text, factors)
        finally:
            for name, weight in old.items():
                set_weight(loaded, name, weight)
        return {
            f"base_model.model.{name.removesuffix('weight')}lora_{which}.weight": factor.abs()
            for name, pair in projected.items()
            for which, factor in zip("AB", pair, strict=True)
        }

    def _edit(self, weight: Tensor, seen: Mapping[str, SecondMoments]) -> tuple[Tensor, Tensor]:
        v = seen["harmful"].directions(weight, self.kept_rank(*weight.shape))
        projected = v @ (v.T @ weight)
        return projected, projected

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose the largest entries of each matrix or row, or neurons of each part."""
        if self.unit == "neuron":
            return scores.top(share=1.0 - self.sparsity, per="tensor")
        masks = {name: self.largest(values) for name, values in scores.values.items()}
        how = {**scores.parameters, "chosen": {"share": 1.0 - self.sparsity, "per": self.scope}}
        return NeuronSet(scores.site, masks, scores.method, scores.model, how, scores.prompts)


def adapter_factors(bench: Bench) -> dict[str, Factors]:
    """Return a LoRA adapter's factors by weight name, whether it computes beside the model or is merged into it.

    A model without an adapter has none.
    """
    folder = Path(bench.loaded.source)
    if not isinstance(bench.loaded.model, PeftModel):
        if not (folder / ADAPTER_CONFIG).is_file():
            return {}
        adapter = Adapter.open(folder)
        return {name: adapter.factors(name) for name in adapter.modules}
    found = {}
    for name, linear in bench.layout.linears.items():
        if isinstance(linear.module, LoraLayer):
            (active,) = linear.module.active_adapters
            a, b = (getattr(linear.module, f"lora_{x}")[active].weight.float().cpu() for x in "AB")
            found[name] = Factors(a, b, linear.module.scaling[active])
    return found
