"""Contrastive neuron attribution: the difference of mean activations at the last token.

Herring et al., https://arxiv.org/abs/2605.12290: the ``share`` of neurons with the largest
``|mean harmful - mean benign|`` of the last token's activation, without *universal* ones, which are among the
most active ``share`` on most unrelated prompts. The share of prompts that counts as most is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resafe.locating.base import Found, Locate, Values, check_share, difference, score
from resafe.locating.observe import Moments, Observer, Rows
from resafe.neurons import NeuronScores, NeuronSet, Per
from resafe.registry import Badge, Need, method

_MOMENTS = Moments("ffn", "last")
_ROWS = Rows("ffn", "last")


@method(
    "cna",
    verb="locate",
    title="Contrastive Neuron Attribution",
    badge=Badge.PAPER,
    paper="https://arxiv.org/abs/2605.12290",
    needs=frozenset({Need.HARMFUL, Need.BENIGN}),
)
@dataclass(frozen=True)
class CNA(Locate):
    """Choose neurons whose last-token activation differs most between harmful and benign prompts.

    Attributes:
        share: share of all neurons (paper: 0.001).
        universal: a neuron among the ``share`` most active on more than this share of the benign prompts
            responds to everything and is left out; 1 keeps all (0.5: our reading of "most").
        per: neurons compete over the whole model (``global``), or within a ``layer``.
    """

    share: float = 0.001
    universal: float = 0.5
    per: Per = "global"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_share("cna", share=self.share, universal=self.universal)

    def observers(self) -> tuple[Observer, ...]:
        """Look at the last prompt token."""
        return (_MOMENTS,) if self.universal == 1.0 else (_MOMENTS, _ROWS)

    def scores(self, found: Found) -> Values:
        """Return ``|mean harmful - mean benign|``, minus infinity for universal neurons."""
        values: Values = {}
        for part in found.parts:
            step, _, known = difference(found, _MOMENTS, part.name)
            values[part.name] = score(step.abs(), known)
        if self.universal < 1.0:
            dropped = 0
            for name, common in self._common(found).items():
                values[name] = values[name].masked_fill(common, -torch.inf)
                dropped += int(common.sum())
            found.details["universal"] = dropped
        return values

    def _common(self, found: Found) -> Values:
        """Return which neurons are among the most active on most benign prompts, bool."""
        shapes = {part.name: part.shape for part in found.parts}
        counts = {name: torch.zeros(shape) for name, shape in shapes.items()}
        total = 0
        for fold in found.folds.chosen:  # a fold at a time: memory does not grow with the prompts
            one = found.folds.only([fold])
            rows = {name: one.entry(_ROWS, "benign", name) for name in shapes}
            prompts = torch.unique(torch.cat([e["numbers"] for e in rows.values() if e])).tolist()
            total += len(prompts)
            for prompt in prompts:
                for name, active in _most_active(rows, shapes, prompt, self.share).items():
                    counts[name] += active
        return {name: count > self.universal * total for name, count in counts.items()}

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose the share with the largest difference."""
        return scores.top(share=self.share, per=self.per)


def _most_active(
    rows: dict[str, dict[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], prompt: int, share: float
) -> Values:
    """Return the neurons most active on one prompt, over the whole model."""
    whole: Values = {}
    for name, shape in shapes.items():
        activity = torch.full(shape, -torch.inf)
        mine = rows[name]["numbers"] == prompt if rows[name] else torch.zeros(0, dtype=torch.bool)
        if bool(mine.any()):
            active = rows[name]["rows"][mine].abs()  # (1, width), or (experts reached, width)
            if len(shape) == 1:
                activity = active[0]
            else:
                activity[rows[name]["experts"][mine]] = active
        whole[name] = activity
    flat = torch.cat([activity.reshape(-1) for activity in whole.values()])
    count = max(1, int(share * len(flat)))
    bound = flat.topk(count).values[-1]
    return {name: activity >= bound for name, activity in whole.items()}
