"""SN-Tune's and SS-Neurons' importance: how far a layer's output moves when a neuron is taken away.

Zhao et al., *SN-Tune* (ICLR 2025), and Zhang et al., *Who Transfers Safety?*, https://arxiv.org/abs/2602.01283.
Without feed-forward neuron k its layer writes ``h_k W_down[:, k]`` less, so that::

    Δ(x, k) = mean over the tokens of x of  |h_k| ‖W_down[:, k]‖₂

SN-Tune: in the top of its layer on every harmful prompt. SS-Neurons, with I(k, D) the mean of Δ over prompts::

    MS_lang = top p of I(., harmful_lang)  minus  top p of I(., harmless_lang)      in each layer
    SS_lang = MS_lang ∩ MS_en

Ours is: a token is one of prompt or response; a routed expert's mean is over the tokens that reach it, without
the router's weight, and it counts as unmoved by texts that do not reach it. The rows of W_V have a closed form
as well, those of W_Q and W_K have none under rotary embeddings; attention is left out. SN-Tune's released code
scores otherwise and its threshold was never published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.locating.base import Found, Locate, Values, by_layer, check_share
from resafe.locating.gradients import Answers
from resafe.locating.observe import Entry, Moments, Observer, Rows
from resafe.model.parts import FeedForward
from resafe.neurons import NeuronScores, NeuronSet
from resafe.registry import Badge, Need, method

_ROWS = Rows("ffn", "magnitude")
_MOMENTS = Moments("ffn", "magnitude")
_ROUNDING = 1e-6


@method(
    "sn-tune",
    verb="locate",
    title="SN-Tune: important on every harmful prompt",
    badge=Badge.RECONSTRUCTION,
    paper="https://openreview.net/forum?id=yR47RmND1m",
    needs=frozenset({Need.HARMFUL}),
)
@dataclass(frozen=True)
class SNTune(Locate):
    """Choose neurons that are among their layer's most important on (nearly) all harmful prompts.

    The score is the share of harmful prompts in whose top a neuron is.

    Attributes:
        share: share of a layer's neurons that is a prompt's top (0.03 as in SS-Neurons; never published).
        agree: in the top of at least this share of the prompts (paper: 1, their intersection).
        foundation: leave out neurons found in the same way on harmless prompts.
    """

    weights: ClassVar[bool] = True

    share: float = 0.03
    agree: float = 1.0
    foundation: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_share("sn-tune", share=self.share, agree=self.agree)

    def observers(self) -> tuple[Observer, ...]:
        """Look at each text's mean magnitudes."""
        return (_ROWS,)

    def scores(self, found: Found) -> Values:
        """Return the share of harmful prompts, minus infinity for a foundation neuron."""
        values = self._shares(found, "harmful")
        if not self.foundation:
            return values
        common = {
            name: share >= self.agree - _ROUNDING for name, share in self._shares(found, "benign").items()
        }
        found.details["foundation"] = sum(int(mask.sum()) for mask in common.values())
        return {name: share.masked_fill(common[name], -torch.inf) for name, share in values.items()}

    def _shares(self, found: Found, group: str) -> Values:
        """Return the share of a group's prompts in whose top each neuron is; NaN where none reaches an expert."""
        parts = {part.name: part for part in found.parts}
        norms = {name: part.down_norms().cpu() for name, part in parts.items()}
        counts = {name: torch.zeros(part.shape) for name, part in parts.items()}
        reached = {name: torch.zeros(part.experts or 1, dtype=torch.bool) for name, part in parts.items()}
        total = 0
        for fold in found.folds.chosen:  # a fold at a time: memory does not grow with the prompts
            one = found.folds.only([fold])
            prompts = 0
            for names in by_layer(norms, found.parts).values():
                rows = {name: entry for name in names if (entry := one.entry(_ROWS, group, name))}
                if rows:
                    prompts = self._count(rows, norms, counts)
                for name, entry in rows.items():
                    reached[name][entry["experts"].clamp(min=0)] = True
            total += prompts
        if total == 0:
            raise UserError(f"sn-tune found no {group} prompts; give some")
        return {name: _known(count / total, reached[name]) for name, count in counts.items()}

    def _count(self, rows: Mapping[str, Entry], norms: Values, counts: Values) -> int:
        """Add to each neuron's count the prompts in whose top of one layer it is; returns their number."""
        prompts = torch.unique(torch.cat([entry["numbers"] for entry in rows.values()]))
        moved = torch.cat([_moved(rows[name], norms[name], prompts) for name in rows], dim=1)
        top = moved.topk(max(1, int(self.share * moved.shape[1])), dim=1)
        tally = torch.zeros(moved.shape[1])
        tally.index_add_(0, top.indices.flatten(), (top.values > 0).float().flatten())
        pieces = torch.split(tally, [norms[name].numel() for name in rows])
        for name, piece in zip(rows, pieces, strict=True):
            counts[name] += piece.view_as(counts[name])
        return len(prompts)

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose what enough prompts agree on."""
        return scores.above(self.agree - _ROUNDING)


def _moved(entry: Entry, norms: Tensor, prompts: Tensor) -> Tensor:
    """Return Δ for each prompt and neuron of a part, (prompts, neurons); 0 where an expert was not reached."""
    moved = torch.zeros(len(prompts), *norms.shape)
    at = torch.searchsorted(prompts, entry["numbers"])
    if norms.ndim == 1:
        moved[at] = entry["rows"] * norms
    else:
        moved[at, entry["experts"]] = entry["rows"] * norms[entry["experts"]]
    return moved.flatten(1)


def _known(values: Tensor, reached: Tensor) -> Tensor:
    return values.masked_fill(~(reached if values.ndim == 1 else reached[:, None]), torch.nan)


@method(
    "ss-neurons",
    verb="locate",
    title="SS-Neurons: safety neurons that languages share",
    badge=Badge.RECONSTRUCTION,
    paper="https://arxiv.org/abs/2602.01283",
    needs=frozenset({Need.HARMFUL, Need.BENIGN}),
)
@dataclass(frozen=True)
class SSNeurons(Locate):
    """Choose neurons important for harmful and not for harmless prompts, in English and another language alike.

    With prompts of one language, or of none that is named, these are its monolingual safety neurons (MS).
    The score of a neuron is ``I / (the least I in its layer's top)``, negative where it is in the top on harmless
    prompts; over two languages it is the smaller one. The set is where it is at least 1.

    Attributes:
        share: share of a layer's neurons that is its top (paper: 0.03).
        language: a language of the prompts, whose neurons shared with English are wanted; ``en`` gives MS of
            English; empty for the union over all languages beside English.
    """

    weights: ClassVar[bool] = True

    share: float = 0.03
    language: str = ""

    def __post_init__(self) -> None:
        """Check the range."""
        check_share("ss-neurons", share=self.share)

    def observers(self) -> tuple[Observer, ...]:
        """Look at the mean magnitudes over texts."""
        return (_MOMENTS, Answers())

    def scores(self, found: Found) -> Values:
        """Return the ratio to the bound of the top."""
        languages = self._languages(found)
        alone = {name: self._ratios(found, f"/{name}" if name else "") for name in languages}
        found.details["ms"] = {name or "unnamed": _size(ratios) for name, ratios in alone.items()}
        if len(languages) == 1 or self.language == "en":
            return alone[self.language or languages[0]]
        shared = {
            name: {part: torch.minimum(ratios[part], alone["en"][part]) for part in ratios}
            for name, ratios in alone.items()
            if name != "en"
        }
        found.details["ss"] = {name: _size(ratios) for name, ratios in shared.items()}
        if self.language:
            return shared[self.language]
        return {
            part: torch.stack([ratios[part] for ratios in shared.values()]).amax(0) for part in alone["en"]
        }

    def _languages(self, found: Found) -> list[str]:
        """Return the languages to find neurons of, the unnamed one alone where none is named."""
        languages = found.languages("harmful")
        if languages and "harmful" in found.folds.groups:
            raise UserError("some harmful prompts name a language and others do not; give all one, or none")
        if len(languages) > 1 and "en" not in languages:
            raise UserError(
                "ss-neurons compares languages with English; give prompts whose language is en too"
            )
        if self.language and self.language not in languages:
            raise UserError(
                f"ss-neurons: no harmful prompt is in {self.language!r}; "
                f"their languages: {', '.join(languages) or 'none is named'}"
            )
        return languages or [""]

    def _ratios(self, found: Found, language: str) -> Values:
        """Return the score within one language."""
        values: Values = {}
        for _, layer in groupby(found.parts, lambda part: part.layer):
            parts = list(layer)
            harmful, benign = (
                torch.cat([_importance(found, kind + language, part).flatten() for part in parts])
                for kind in ("harmful", "benign")
            )
            count = max(1, int(self.share * len(harmful)))
            least = harmful.nan_to_num(0.0).topk(count).values[-1].clamp(min=torch.finfo(torch.float32).tiny)
            ratio = (harmful / least).float()
            ordinary = benign.nan_to_num(0.0).topk(count).indices
            ratio[ordinary] = -ratio[ordinary]
            pieces = torch.split(ratio, [math.prod(part.shape) for part in parts])
            values |= {part.name: piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)}
        return values

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose what is in the top on harmful prompts alone."""
        return scores.above(1.0 - _ROUNDING)


def _importance(found: Found, group: str, part: FeedForward) -> Tensor:
    """Return I, the mean of Δ over all texts of a group, float64; NaN for an expert that none reached."""
    texts = found.entry(Answers(), group, "answers")["texts"]
    seen = found.entry(_MOMENTS, group, part.name)
    reached = seen["n"] / texts  # (1,) or (experts,)
    mean = seen["mean"] * part.down_norms().cpu()
    return mean if part.experts is None else mean * reached.masked_fill(reached == 0, torch.nan)[:, None]


def _size(ratios: Values) -> int:
    return sum(int((ratio >= 1.0 - _ROUNDING).sum()) for ratio in ratios.values())
