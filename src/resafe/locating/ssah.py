"""SSAH's attribute groups: neurons that matter for safety, for utility, for both or for nothing.

Li & Kim, *Superficial Safety Alignment Hypothesis*, https://arxiv.org/abs/2410.10862. A neuron j of a feed-forward
part is important for a kind of prompts by how much it varies over their tokens and by what it writes::

    I[j] = 1/(N-1) Σ_n (x_nj - mean_n x_nj)² · ‖W_down[:, j]‖²

I_S is that on harmful prompts with refusals, I_U on benign ones with answers. With shares of all neurons:

    RU   redundant          smallest I_S + I_U
    SCU  safety-critical    largest  I_S - I_U
    UCU  utility-critical   largest  I_U - I_S
    CU   complex            the rest

Our reading: scores are standardised within each part before anything is ranked over the model; the groups are
filled in the order RU, SCU, UCU, so that none shares a neuron. The paper's attention units are left out: a
unit here is a feed-forward neuron. The ratios were found for one model each, by trying.

The authors publish no code. ``metric=flap`` is the metric that they build on, as its code computes it (FLAP,
https://arxiv.org/abs/2312.11983): text by text, with m_j the running mean of
the texts' means, ``F <- F (j-2)/(j-1) + Σ_tokens (x - m_j)² / j``, which is

    F_n = 1/(n-1) Σ_{j>=2} S_j (j-1)/j,    S_j = Σ_tokens (x - m_j)².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.base import Found, Locate, Values, score
from resafe.locating.observe import Entry, Moments, Observer, TokenSums
from resafe.model.parts import FeedForward
from resafe.neurons import NeuronScores, NeuronSet, Site
from resafe.registry import Badge, Need, method

Group = Literal["RU", "SCU", "UCU", "CU"]
_MOMENTS = Moments("ffn", "all")
_SUMS = TokenSums("ffn", "all")


@method(
    "ssah",
    verb="locate",
    title="SSAH: safety-critical units",
    badge=Badge.RECONSTRUCTION,
    paper="https://arxiv.org/abs/2410.10862",
    needs=frozenset({Need.HARMFUL, Need.BENIGN}),
)
@dataclass(frozen=True)
class SSAH(Locate):
    """Choose the neurons that matter much more on harmful prompts with refusals than on benign ones.

    The score is I_S - I_U, minus infinity for redundant neurons.

    Attributes:
        scu: share of the safety-critical neurons (Llama-2-7B-Chat: 0.013; another model has another).
        ucu: share of the utility-critical neurons (0.133).
        ru: share of the redundant neurons (0.148).
        metric: ``variance`` over all tokens, or ``flap``'s fluctuation over texts.
    """

    weights: ClassVar[bool] = True

    scu: float = 0.013
    ucu: float = 0.133
    ru: float = 0.148
    metric: Literal["variance", "flap"] = "variance"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.scu, self.ucu, self.ru) < 0 or self.scu == 0 or self.scu + self.ucu + self.ru > 1:
            raise UserError(
                "ssah: scu must be above 0, ucu and ru at least 0, and all three at most 1 together"
            )

    def observers(self) -> tuple[Observer, ...]:
        """Look at all tokens."""
        return (_MOMENTS,) if self.metric == "variance" else (_SUMS,)

    def scores(self, found: Found) -> Values:
        """Return I_S - I_U, and the groups' sizes among the details."""
        masks, values = self._groups(found)
        found.details.update({group: sum(int(m.sum()) for m in masks[group].values()) for group in masks})
        return {name: score(v.masked_fill(masks["RU"][name], -torch.inf)) for name, v in values.items()}

    def groups(self, found: Found, scores: NeuronScores) -> dict[Group, NeuronSet]:
        """Return the four groups; ``scores`` gives the names of model, method and prompts."""
        chosen = scores.above(torch.inf)
        return {
            group: replace(chosen, masks=masks, parameters={**scores.parameters, "chosen": {"group": group}})
            for group, masks in self._groups(found)[0].items()
        }

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose the safety-critical neurons."""
        return scores.top(share=self.scu)

    def _groups(self, found: Found) -> tuple[dict[Group, dict[str, Tensor]], Values]:
        """Return the groups' masks, and I_S - I_U."""
        safety = {part.name: self.importance(found, part, "harmful") for part in found.parts}
        utility = {part.name: self.importance(found, part, "benign") for part in found.parts}
        steps = {name: safety[name] - utility[name] for name in safety}
        orders = (
            ("RU", self.ru, {name: -safety[name] - utility[name] for name in safety}),
            ("SCU", self.scu, steps),
            ("UCU", self.ucu, {name: -step for name, step in steps.items()}),
        )
        free = {name: ~step.isnan() for name, step in steps.items()}
        groups: dict[Group, dict[str, Tensor]] = {}
        for group, share, order in orders:
            left = {name: score(values, free[name]) for name, values in order.items()}
            masks = {name: torch.zeros_like(mask) for name, mask in free.items()}
            if share:
                masks = dict(NeuronScores(Site.FFN, left, "ssah", "").top(share=share).masks)
            free = {name: mask & ~masks[name] for name, mask in free.items()}
            groups[group] = masks  # type: ignore[index]
        return {**groups, "CU": free}, steps

    def importance(self, found: Found, part: FeedForward, group: str) -> Tensor:
        """Return a part's importance, standardised over its neurons, float64 of the part's shape."""
        if self.metric == "variance":
            seen = found.entry(_MOMENTS, group, part.name)
            n = seen["n"] if part.experts is None else seen["n"][:, None]
            raw = (seen["m2"] / (n - 1)).masked_fill(n < 2, torch.nan)
        else:
            raw = _fluctuation(found.entry(_SUMS, group, part.name), part)
        raw = raw * part.down_norms().cpu().double().square()
        known = raw[~raw.isnan()]
        return (raw - known.mean()) / known.std().clamp(min=torch.finfo(torch.float64).tiny)


def _fluctuation(entry: Entry, part: FeedForward) -> Tensor:
    """Return FLAP's fluctuation of each neuron; an expert that fewer than two texts reached has none."""
    if part.experts is None:
        return fluctuation(entry)[1]
    rows = torch.full(part.shape, torch.nan, dtype=torch.float64)
    for expert in sorted(set(entry["experts"].tolist())):
        mine = {key: values[entry["experts"] == expert] for key, values in entry.items()}
        if len(mine["n"]) >= 2:
            rows[expert] = fluctuation(mine)[1]
    return rows


def fluctuation(entry: Entry) -> tuple[Tensor, Tensor]:
    """Return FLAP's baseline m_n and fluctuation F_n, float64 (features,), from the sums of each text in order."""
    n, total, square = (
        entry["n"][:, None],
        entry["sum"],
        entry["square"],
    )  # (texts, 1), (texts, features) twice
    j = torch.arange(1, len(n) + 1, dtype=torch.float64)[:, None]
    running = (total / n).cumsum(0) / j
    spread = square - 2 * running * total + n * running.square()
    return running[-1], (spread * (j - 1) / j).sum(0) / max(1, len(n) - 1)


def flap(entry: Entry, weight: Tensor) -> dict[str, Tensor]:
    """Return FLAP's metrics of the input channels of a matrix (out, in), float64 (in,).

    Args:
        entry: what `TokenSums` saw of the matrix's input.
        weight: the matrix.
    """
    baseline, spread = fluctuation(entry)
    weight = weight.double()
    norm = (entry["square"].sum(0) / len(entry["n"])).sqrt()
    return {
        "IFV": spread,
        "WIFV": spread * weight.square().sum(0),
        "WIFN": (weight.abs() * norm).mean(0),
        "baseline_inp": baseline,
    }
