"""LSSF: add the alignment delta in the directions that a safe model's outputs take when it refuses.

Zhou et al., *LSSF: Safety Alignment for Large Language Models through Low-Rank Safety Subspace Fusion*, ACL 2025,
https://arxiv.org/abs/2602.00038. No code was published: this is a reconstruction, its open readings are parameters.
For each matrix W (out, in) of the aligned model, with inputs x̂ over harmful prompts that it refuses::

    Z = W X̂ = U Σ Vᵀ,   p_i = σ_i² / Σ σ²,   H_ρ = -Σ_{i≤ρ} p_i ln p_i,   r = min{ρ : H_ρ ≥ η H_n}
    a_i = 1 + (a_1 - 1)(σ_i - σ_r) / (σ_1 - σ_r),   U' = U_r diag(a)
    W_tuned <- W_tuned + α U' U'ᵀ D,   D = aligned - unaligned

The weights a_i so enter squared. The unaligned model is the base, or the aligned one tuned on harmful data: give either
as ``--base``.

U and σ come from the second moments of the inputs alone: they are eigenvectors and roots of eigenvalues of
``W (Σ x̂ x̂ᵀ) Wᵀ``. Taking U from D itself needs no data, and is then ``lox-post`` with k = r and the same α.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.lowrank import Calibration, Source, accumulate
from resafe.model.load import LoadedModel, load
from resafe.model.stored import InMemory, catalogue
from resafe.neurons import layer_of
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Plan, Repair, Target, Unit
from resafe.repairing.calibrate import sources_of, with_responses

_MEMORY = 1 << 31  # bytes of second moments that one pass over the prompts may gather

Normalise = Literal["token", "feature", "none"]


@dataclass
class _Sums:
    """Of one source: ``Σ x xᵀ`` (in, in), ``Σ x`` (in,), and the number of tokens."""

    gram: Tensor
    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        wide = x.double().cpu()
        self.gram += wide.T @ wide
        self.total += wide.sum(0)
        self.count += len(x)

    def standardised(self) -> Tensor:
        """Return the second moments of ``(x - mean) / std`` by feature; a constant feature is zero."""
        mean = self.total / self.count
        centred = self.gram - self.count * torch.outer(mean, mean)
        std = (centred.diagonal() / self.count).clamp(min=0).sqrt()
        inverse = torch.where(std > 1e-9 * std.max(), 1.0 / std, 0.0)
        return centred * torch.outer(inverse, inverse)


@method(
    "lssf",
    verb="repair",
    title="LSSF: low-rank safety subspace fusion",
    badge=Badge.RECONSTRUCTION,
    paper="https://arxiv.org/abs/2602.00038",
    needs=frozenset({Need.ALIGNED, Need.BASE, Need.HARMFUL}),
    strengths=(0.5, 1.0),
    variants=({"alpha": 2.0},),
)
@dataclass(frozen=True)
class LSSF(Repair):
    """Add the part of the alignment delta that lies in the safe model's low-rank activation space.

    Attributes:
        eta: η, the share of the entropy that the kept directions hold (0.8 to 0.9 in a later implementation).
        alpha: α, multiplied by the strength (about 1 to 3 there).
        a1: a_1, the weight of the first direction, falling to 1 at the last (1: off; the paper's value is unknown).
        normalise: inputs scaled to length 1 by ``token``, standardised by ``feature``, or taken as they are.
        tokens: ``all`` tokens of prompt and refusal, or those of the ``response``.
    """

    eta: float = 0.85
    alpha: float = 1.0
    a1: float = 1.2
    normalise: Normalise = "token"
    tokens: Literal["all", "response"] = "all"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 < self.eta <= 1.0:
            raise UserError(f"lssf: eta must be above 0 and at most 1, not {self.eta:g}")
        if self.a1 < 1.0:
            raise UserError(f"lssf: a1 must be at least 1, not {self.a1:g}")

    def kinds(self, job: Job) -> tuple[Kind, ...]:
        """Return the dense space: D is not made of an adapter's directions."""
        return (Kind.DENSE,)

    def prepare(self, job: Job) -> Mapping[str, Tensor]:
        """Return U' (out, r) of every matrix, from the aligned model's inputs on what it refuses."""
        loaded = load(job.reference().folder, merge=True)
        memory = InMemory(loaded, catalogue(job.reference()))
        sources = sources_of(memory)
        text = with_responses(loaded, job.harmful, job.judge)
        if self.tokens == "all":
            text = Calibration(text.ids, [0] * len(text.ids))
        found: dict[str, Tensor] = {}
        for group in _groups({name: (source, memory.shape(name)[1]) for name, source in sources.items()}):
            moments = self._moments(loaded, text, {sources[name] for name in group})
            for name in group:
                if sources[name] in moments:  # no token may have reached an expert
                    found[name] = self.basis(memory.read(name).double(), moments[sources[name]])
        return found

    def _moments(self, loaded: LoadedModel, text: Calibration, sources: set[Source]) -> dict[Source, Tensor]:
        sums: dict[Source, _Sums] = {}

        def see(source: Source, x: Tensor) -> None:
            if self.normalise == "token":
                x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
            if source not in sums:
                side = x.shape[1]
                zero = torch.zeros(side, side, dtype=torch.float64)
                sums[source] = _Sums(zero, zero.new_zeros(side))
            sums[source].add(x)

        accumulate(loaded, text, sources, see)
        if self.normalise == "feature":
            return {source: found.standardised() for source, found in sums.items()}
        return {source: found.gram for source, found in sums.items()}

    def basis(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Return ``U' = U_r diag(a)`` (out, r), float32; weight (out, in) and gram (in, in) float64."""
        u, sigma = output_directions(weight, gram)
        r = entropy_rank(sigma.square(), self.eta)
        return (u[:, :r] * self.weights(sigma[:r])).float()

    def weights(self, sigma: Tensor) -> Tensor:
        """Return a, (r,), from the kept singular values; all 1 where these are equal."""
        spread = sigma[0] - sigma[-1]
        if spread <= 0:
            return torch.ones_like(sigma)
        return 1.0 + (self.a1 - 1.0) * (sigma - sigma[-1]) / spread

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Choose every matrix whose directions are known: all but those of experts that no token reached."""
        assert isinstance(statistics, Mapping)
        ranks = {name: statistics[name].shape[1] for name in measured if name in statistics}
        return Plan(frozenset(ranks), details={"rank": ranks})

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Fuse one matrix."""
        assert isinstance(statistics, Mapping)
        u = statistics[unit.name]
        value = unit.tuned[unit.key].float() + self.alpha * (u @ (u.T @ unit.alignment()))
        return {unit.key: Target(value, None)}


def _groups(every: Mapping[str, tuple[Source, int]]) -> Iterator[list[str]]:
    """Yield the matrices of as many layers as one pass may gather moments of, given their sources and widths."""
    group: list[str] = []
    held = 0
    for _, layer in groupby(every, layer_of):
        mine = list(layer)
        size = sum(8 * side**2 for _, side in {every[name] for name in mine})
        if group and held + size > _MEMORY:
            yield group
            group, held = [], 0
        group, held = group + mine, held + size
    yield group


def output_directions(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (out, n) and σ (n,), descending, of ``Z = W X`` from ``Σ x xᵀ``, n the smaller side of W."""
    wide = weight.shape[0] <= weight.shape[1]
    q, r = (None, weight) if wide else torch.linalg.qr(weight)
    values, vectors = torch.linalg.eigh(r @ gram @ r.T)
    u = vectors.flip(1) if q is None else q @ vectors.flip(1)
    return u, values.flip(0).clamp(min=0).sqrt()


def entropy_rank(energy: Tensor, eta: float) -> int:
    """Return r, the fewest leading directions that hold a share ``eta`` of the entropy of ``energy`` (n,)."""
    p = energy.double() / energy.double().sum()
    entropy = torch.special.entr(p).cumsum(0)
    enough = entropy >= eta * entropy[-1] * (1 - 1e-12)  # the last ones are rounding
    return 1 + int(enough.to(torch.uint8).argmax())
