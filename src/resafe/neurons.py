"""Neuron scores and neuron sets: one number a neuron, and the chosen ones; value types with an algebra."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from resafe import neuron_files
from resafe.errors import UserError

SET_FORMAT = "resafe neuron set 1"
SCORES_FORMAT = "resafe neuron scores 1"
Per = Literal["global", "layer", "tensor"]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROWS = (".gate_proj.weight", ".up_proj.weight")  # whose row j belongs to neuron j


class Site(StrEnum):
    """Where a neuron is looked at."""

    FFN = "ffn"
    GATE = "gate"
    UP = "up"
    ROW = "row"
    ENTRY = "entry"
    RESIDUAL = "residual"


_OF_PARTS = (Site.FFN, Site.GATE, Site.UP)  # keyed by part; neuron j is the same at all three


class _Located:
    """What scores and sets have in common: the site, the method that found them, and the model's hash."""

    site: Site
    method: str
    model: str

    def check(self, model: str, name: str) -> None:
        """Refuse to be used for another model than that in which the neurons were found.

        Args:
            model: hash of the model at hand.
            name: what the user calls it.

        Raises:
            UserError: the hashes differ; the sentence names both.
        """
        if self.model != model:
            raise UserError(
                f"the neurons of {self.method} were found in the model {self.model[:12]}, but {name} is the "
                f"model {model[:12]}; locate the neurons of {name}"
            )

    def _check_same(self, other: _Located) -> None:
        if self.model != other.model:
            raise UserError(
                f"{self.method} and {other.method} looked at different models ({self.model[:12]} and "
                f"{other.model[:12]}); locate both on one model"
            )
        if self.site != other.site:
            raise UserError(
                f"{self.method} and {other.method} looked at different sites ({self.site} and {other.site}); "
                "locate both at one site"
            )

    def _no_neurons(self) -> UserError:
        return UserError(
            f"{self.method} at site {self.site} cannot be mapped to feed-forward neurons, which are those of "
            "the sites ffn, gate and up and the rows of gate_proj and up_proj; choose such neurons"
        )


@dataclass(frozen=True)
class NeuronScores(_Located):
    """One number per neuron: the higher, the more the neuron is responsible for safety.

    Attributes:
        site: what one entry of a tensor stands for.
        values: name -> float32 scores, NaN where there is no evidence (an expert that no token reached).
            At the sites ffn, gate and up a name is that of a feed-forward part, shape (width,) or
            (experts, width); at row and entry that of a weight, (out,) or (out, in); at ``residual``
            it is ``layer.N``, and the values are a direction of the residual stream, (hidden,).
        method: name of the method that scored.
        model: hash of the model.
        parameters: the method's parameters.
        prompts: hash of the prompts that were used.
        details: what else the method found out, as JSON knows it.
    """

    site: Site
    values: Mapping[str, Tensor]
    method: str
    model: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    prompts: str = ""
    details: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if values.dtype is not torch.float32:
                raise ValueError(f"the scores of {name} are {values.dtype}, not float32")

    @property
    def total(self) -> int:
        """Number of neurons, with or without evidence."""
        return sum(values.numel() for values in self.values.values())

    @property
    def unreached(self) -> int:
        """Number of neurons without evidence."""
        return sum(int(values.isnan().sum()) for values in self.values.values())

    def top(
        self,
        *,
        share: float | None = None,
        count: int | None = None,
        per: Per = "global",
        exclude: NeuronSet | None = None,
    ) -> NeuronSet:
        """Choose the highest scores; of equal ones those of the first layer, name and position.

        Args:
            share: of all neurons of a group, rounded down; where fewer can be chosen, those.
            count: how many of each group, instead of a share.
            per: what a group is: all neurons, those of one layer, or those of one tensor.
            exclude: neurons not to choose; they count as part of the group a share is taken of.

        Raises:
            UserError: the share is not in (0, 1], the count is more than can be chosen, or nothing was chosen.
        """
        wanted = _wanted(share, count)
        if exclude is not None:
            self._check_same(exclude)
        masks: dict[str, Tensor] = {}
        for names in _groups(self.values, per):
            masks |= self._best(names, wanted, exclude)
        how: dict[str, object] = {"count": count} if share is None else {"share": share}
        excluded = {} if exclude is None else {"exclude": exclude.method}
        found = self._chosen({name: masks[name] for name in self.values}, {**how, "per": per, **excluded})
        if len(found) == 0:
            raise UserError(
                f"a share of {share} per {per} chooses none of {self.total} neurons, of which {self.unreached} "
                "have no score; give a larger share"
            )
        return found

    def above(self, threshold: float) -> NeuronSet:
        """Choose the scores above a threshold, which may be none."""
        masks = {name: values > threshold for name, values in self.values.items()}
        return self._chosen(masks, {"above": threshold})

    def _best(
        self, names: Sequence[str], wanted: Callable[[int, int], int], exclude: NeuronSet | None
    ) -> dict[str, Tensor]:
        """Return the masks of one group."""
        values = torch.cat([self.values[name].reshape(-1) for name in names])
        free = ~values.isnan()
        if exclude is not None:
            masks = [exclude.masks.get(n, torch.zeros_like(self.values[n], dtype=torch.bool)) for n in names]
            free &= ~torch.cat([mask.reshape(-1) for mask in masks])
        chosen = _largest(values, free, wanted(len(values), int(free.sum())))
        parts = torch.split(chosen, [self.values[name].numel() for name in names])
        return {n: part.reshape(self.values[n].shape) for n, part in zip(names, parts, strict=True)}

    def _chosen(self, masks: Mapping[str, Tensor], how: Mapping[str, object]) -> NeuronSet:
        if self.site is Site.RESIDUAL:
            raise UserError(f"{self.method} found directions of the residual stream, which hold no neurons")
        parameters = {**self.parameters, "chosen": dict(how)}
        return NeuronSet(self.site, masks, self.method, self.model, parameters, self.prompts)

    def rank_correlation(self, other: NeuronScores) -> float:
        """Return Spearman's correlation over the neurons that both have evidence of; NaN if it is undefined."""
        self._check_same(other)
        names = [name for name in self.values if name in other.values]
        pair = [[s.values[name].reshape(-1) for name in names] for s in (self, other)]
        mine, theirs = (torch.cat(values or [torch.empty(0)]) for values in pair)
        both = ~(mine.isnan() | theirs.isnan())
        ranks = torch.stack([_ranks(mine[both]), _ranks(theirs[both])])
        return float(torch.corrcoef(ranks)[0, 1]) if ranks.shape[1] > 1 else float("nan")

    def as_ffn(self) -> NeuronScores:
        """Return the same scores as those of the feed-forward neurons: gate j, up j and ffn j are neuron j.

        Raises:
            UserError: the site is no site of a feed-forward neuron.
        """
        if self.site not in _OF_PARTS:
            raise self._no_neurons()
        return replace(self, site=Site.FFN)

    def save(self, file: Path) -> None:
        """Write the scores as safetensors, provenance in the metadata."""
        metadata = _metadata(self, SCORES_FORMAT, "neuron scores", self.parameters, self.prompts)
        metadata["details"] = json.dumps(dict(self.details), sort_keys=True)
        values = {name: values.detach().cpu().contiguous() for name, values in self.values.items()}
        neuron_files.write(file, values, metadata)

    @staticmethod
    def load(file: Path) -> NeuronScores:
        """Read scores.

        Raises:
            UserError: the file is missing, or holds no neuron scores.
        """
        scores = load_neurons(file)
        if not isinstance(scores, NeuronScores):
            raise UserError(f"{file} holds a neuron set, not the scores it was chosen by; give those")
        return scores


@dataclass(frozen=True)
class NeuronSet(_Located):
    """Chosen neurons, as one boolean mask per tensor.

    Attributes:
        site: what one entry of a mask stands for (a row of a matrix, an entry of a LoRA factor, ...).
        masks: name -> bool mask; names and shapes as those of ``NeuronScores.values``.
        method: name of the method that chose them.
        model: hash of the model they were found in.
        parameters: the method's parameters.
        prompts: hash of the prompts that were used.
    """

    site: Site
    masks: Mapping[str, Tensor]
    method: str
    model: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    prompts: str = ""

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """Number of neurons that could have been chosen."""
        return sum(mask.numel() for mask in self.masks.values())

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, "|", torch.logical_or)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, "&", torch.logical_and)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, "-", lambda mine, theirs: mine & ~theirs)

    def _combine(self, other: NeuronSet, sign: str, rule: Callable[[Tensor, Tensor], Tensor]) -> NeuronSet:
        self._check_same(other)
        masks = {}
        for name in dict.fromkeys([*self.masks, *other.masks]):
            mine, theirs = self.masks.get(name), other.masks.get(name)
            zero = torch.zeros_like(next(m for m in (mine, theirs) if m is not None))
            pair = zero if mine is None else mine, zero if theirs is None else theirs
            if pair[0].shape != pair[1].shape:
                raise UserError(f"{self.method} and {other.method} see {name} in different shapes")
            masks[name] = rule(*pair)
        method = f"{_bracketed(self.method)} {sign} {_bracketed(other.method)}"
        parameters = {"of": [dict(self.parameters), dict(other.parameters)]}
        prompts = ",".join(dict.fromkeys(filter(None, (self.prompts, other.prompts))))
        return NeuronSet(self.site, masks, method, self.model, parameters, prompts)

    def jaccard(self, other: NeuronSet) -> float:
        """Return ``|A ∩ B| / |A ∪ B|``, and 1.0 for two empty sets."""
        both = len(self & other)
        union = len(self) + len(other) - both
        return both / union if union else 1.0

    def chance_jaccard(self, other: NeuronSet) -> float:
        """Return the Jaccard index to expect of random neurons, as many per tensor: ``c / (|A| + |B| - c)``.

        ``c = Σ_t a_t b_t / N_t`` is the expected overlap, over tensors t with N_t neurons. It is what
        ``random_like`` gives on average, but for the variance of c within the fraction.
        """
        self._check_same(other)
        shared = self.masks.keys() & other.masks.keys()
        common = sum(
            int(self.masks[n].sum()) * int(other.masks[n].sum()) / max(1, self.masks[n].numel())
            for n in sorted(shared)
        )
        union = len(self) + len(other) - common
        return common / union if union else 1.0

    def per_layer(self) -> dict[int, int]:
        """Number of chosen neurons per decoder layer."""
        return _sums(self.per_tensor())

    def layer_sizes(self) -> dict[int, int]:
        """Number of neurons per decoder layer that could have been chosen."""
        return _sums({name: mask.numel() for name, mask in self.masks.items()})

    def per_tensor(self) -> dict[str, int]:
        """Number of chosen neurons per tensor, by layer and name."""
        return {name: int(self.masks[name].sum()) for name in _sorted(self.masks)}

    def per_expert(self) -> dict[tuple[int, int], int]:
        """Number of chosen neurons per (layer, routed expert)."""
        counts: Counter[tuple[int, int]] = Counter()
        for name, mask in self.masks.items():
            layer, expert = layer_of(name), expert_of(name)
            if self._routed(mask):
                counts.update({(layer, e): n for e, n in enumerate(mask.sum(1).tolist())})
            elif expert is not None:
                counts[layer, expert] += int(mask.sum())
        return dict(sorted(counts.items()))

    def neurons(self) -> list[tuple[int, int | None, int]]:
        """List the chosen neurons as (layer, expert or None, index), in the order of ``per_tensor``.

        The index of an entry is its position in the flattened tensor.
        """
        found: list[tuple[int, int | None, int]] = []
        for name in _sorted(self.masks):
            mask, layer, expert = self.masks[name], layer_of(name), expert_of(name)
            if self._routed(mask):
                found += [(layer, e, i) for e, i in mask.nonzero().tolist()]
            else:
                found += [(layer, expert, i) for i in mask.reshape(-1).nonzero().reshape(-1).tolist()]
        return found

    def _routed(self, mask: Tensor) -> bool:
        return self.site in _OF_PARTS and mask.ndim == 2

    def random_like(self, seed: int) -> NeuronSet:
        """Return as many neurons per tensor, drawn at random."""
        masks = {name: shuffled(mask, seed, name) for name, mask in self.masks.items()}
        return NeuronSet(self.site, masks, f"random like {self.method}", self.model, {"seed": seed})

    def as_ffn(self) -> NeuronSet:
        """Return the feed-forward neurons that these are: gate j, up j, ffn j and their rows are neuron j.

        Raises:
            UserError: other than rows of gate_proj and up_proj were chosen, or entries.
        """
        if self.site in _OF_PARTS:
            return replace(self, site=Site.FFN)
        if self.site is not Site.ROW:
            raise self._no_neurons()
        masks: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            part = next((name.removesuffix(end) for end in _ROWS if name.endswith(end)), None)
            if part is None or expert_of(name) is not None:
                raise self._no_neurons()
            masks[part] = masks[part] | mask if part in masks else mask
        return replace(self, site=Site.FFN, masks=masks)

    def save(self, file: Path) -> None:
        """Write the set as safetensors: eight neurons a byte, shapes and provenance in the metadata."""
        metadata = _metadata(self, SET_FORMAT, "neuron set", self.parameters, self.prompts)
        metadata["shapes"] = json.dumps({name: list(mask.shape) for name, mask in self.masks.items()})
        packed = {name: neuron_files.packed(mask) for name, mask in self.masks.items()}
        neuron_files.write(file, packed, metadata)

    @staticmethod
    def load(file: Path) -> NeuronSet:
        """Read a set.

        Raises:
            UserError: the file is missing, or is no neuron set.
        """
        neurons = load_neurons(file)
        if not isinstance(neurons, NeuronSet):
            raise UserError(
                f"{file} holds neuron scores, of which none are chosen yet; choose some with "
                f"`resafe neurons combine {file} --top 0.01 --out SET`"
            )
        return neurons


def load_neurons(file: Path) -> NeuronScores | NeuronSet:
    """Read neuron scores or a neuron set, whichever the file says it holds.

    Raises:
        UserError: the file is missing, or holds neither.
    """
    tensors, metadata = neuron_files.read(file)
    kind = metadata.get("resafe")
    if kind not in (SET_FORMAT, SCORES_FORMAT):
        raise UserError(f"{file} is not a resafe neuron set or score file; give one that `resafe` saved")
    try:
        return _set(tensors, metadata) if kind == SET_FORMAT else _scores(tensors, metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is a damaged neuron file ({error}); find the neurons again") from error


def _set(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> NeuronSet:
    shapes = json.loads(metadata["shapes"])
    return NeuronSet(
        Site(metadata["site"]),
        {name: neuron_files.unpacked(tensors.pop(name), shape) for name, shape in shapes.items()},
        metadata["method"],
        metadata["model"],
        dict(json.loads(metadata["parameters"])),
        metadata.get("prompts", ""),  # sets were saved without it before scores were
    )


def _scores(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> NeuronScores:
    return NeuronScores(
        Site(metadata["site"]),
        {name: tensors[name] for name in _sorted(tensors)},
        metadata["method"],
        metadata["model"],
        dict(json.loads(metadata["parameters"])),
        metadata["prompts"],
        dict(json.loads(metadata["details"])),
    )


def _metadata(
    found: _Located, form: str, kind: str, parameters: Mapping[str, object], prompts: str
) -> dict[str, str]:
    return {
        "resafe": form,
        "kind": kind,
        "site": found.site.value,
        "method": found.method,
        "model": found.model,
        "parameters": json.dumps(dict(parameters), sort_keys=True),
        "prompts": prompts,
    }


def _wanted(share: float | None, count: int | None) -> Callable[[int, int], int]:
    """Return how many neurons to choose from a group, by its size and by how many of it can be chosen."""
    if share is not None and count is None:
        if not 0 < share <= 1:
            raise UserError(f"a share of {share} is not above 0 and at most 1; give one like 0.01")
        return lambda size, free: min(int(share * size + 1e-9), free)  # 0.29 * 100 is 28.999999999999996
    if count is None or share is not None:
        raise UserError("give either a share or a count of neurons to choose")
    if count < 1:
        raise UserError(f"a count of {count} chooses no neuron; give 1 or more")

    def counted(size: int, free: int) -> int:
        if count > free:
            raise UserError(
                f"{count} neurons were asked for, but {free} of {size} can be chosen; ask for fewer"
            )
        return count

    return counted


def _sorted(names: Mapping[str, Tensor]) -> list[str]:
    return sorted(names, key=lambda name: (layer_of(name), name))


def _groups(names: Mapping[str, Tensor], per: Per) -> list[list[str]]:
    keys: dict[str, Callable[[str], object]] = {"global": lambda _: 0, "layer": layer_of, "tensor": str}
    if per not in keys:
        raise UserError(f"neurons are chosen per {', '.join(keys)}, not per {per}")
    return [list(group) for _, group in groupby(_sorted(names), keys[per])]


def _largest(values: Tensor, free: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest of the free values; of equal ones, the first."""
    chosen = torch.zeros_like(free)
    if count:
        known = values[free]
        least = known.kthvalue(len(known) - count + 1).values
        more, equal = known > least, known == least
        chosen[free] = more | (equal & (equal.cumsum(0) <= count - more.sum()))
    return chosen


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values, (n,) float64; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values.cpu().numpy(), return_inverse=True, return_counts=True)
    return torch.from_numpy((counts.cumsum() - (counts - 1) / 2)[place])


def _sums(counts: Mapping[str, int]) -> dict[int, int]:
    """Add up the counts of names by layer."""
    sums: Counter[int] = Counter()
    for name, count in counts.items():
        sums[layer_of(name)] += count
    return dict(sorted(sums.items()))


def _bracketed(method: str) -> str:
    return f"({method})" if " " in method else method


def layer_of(name: str) -> int:
    """Return the decoder layer in a name, its first numeric component, or -1 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def expert_of(name: str) -> int | None:
    """Return the expert in a tensor's name, or None."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def shuffled(mask: Tensor, seed: int, name: str) -> Tensor:
    """Return a mask of the same shape and count whose entries are drawn at random, seeded by name."""
    # The CPU generator takes 32 bits of seed, so seed and name are mixed into as many.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    order = torch.randperm(mask.numel(), generator=generator)
    return mask.reshape(-1)[order].reshape(mask.shape)
