"""What is done with files of neurons: show one, compare many, combine sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import and_, or_, sub
from pathlib import Path

from resafe import pictures
from resafe.errors import UserError
from resafe.neurons import NeuronScores, NeuronSet, Site, load_neurons

TOP = 0.01  # of the neurons: what a score file stands for unless told otherwise
Matrix = tuple[tuple[float | None, ...], ...]


_RULES: dict[str, Callable[[NeuronSet, NeuronSet], NeuronSet]] = {
    "union": or_,
    "intersection": and_,
    "difference": sub,
}


@dataclass(frozen=True)
class Given:
    """What a file stands for.

    Attributes:
        file: where it was read.
        neurons: the set in it, or the highest of its scores.
        scores: the scores, in a score file.
        label: a short name that no other file has.
    """

    file: Path
    neurons: NeuronSet
    scores: NeuronScores | None
    label: str = ""

    @property
    def kind(self) -> str:
        """What the file holds."""
        return "neuron set" if self.scores is None else "neuron scores"


@dataclass(frozen=True)
class Shown:
    """One file of neurons; of scores, the highest count as chosen."""

    given: Given

    def to_dict(self) -> dict[str, object]:
        """Return the counts, and ``neurons`` as [layer, expert or null, index], tensor after tensor."""
        found, scores = self.given.neurons, self.given.scores
        told: dict[str, object] = {
            "file": str(self.given.file),
            "kind": self.given.kind,
            "site": found.site.value,
            "method": found.method,
            "model": found.model,
            "prompts": found.prompts,
            "parameters": dict(found.parameters),
            "chosen": len(found),
            "total": found.total,
            "per_layer": found.per_layer(),
            "layer_sizes": found.layer_sizes(),
            "per_expert": [[*key, count] for key, count in found.per_expert().items() if count],
            "per_tensor": found.per_tensor(),
            "neurons": found.neurons(),
        }
        if scores is not None:
            tensors = {name: list(values.shape) for name, values in scores.values.items()}
            told |= {"unreached": scores.unreached, "tensors": tensors, "details": dict(scores.details)}
        return told


@dataclass(frozen=True)
class Comparison:
    """How far sets of neurons overlap.

    Attributes:
        given: the sets, all at one site of one model.
        jaccard: Jaccard index of each pair.
        chance: the index to expect of random neurons, as many per tensor.
        correlation: Spearman's correlation of each pair of scores; None where there are none.
    """

    given: tuple[Given, ...]
    jaccard: Matrix
    chance: Matrix
    correlation: Matrix

    @property
    def labels(self) -> list[str]:
        """The short names of the sets."""
        return [one.label for one in self.given]

    @property
    def layers(self) -> list[int]:
        """The decoder layers in which any set could choose; -1 is what lies outside them."""
        return sorted({layer for one in self.given for layer in one.neurons.layer_sizes()})

    def layer_shares(self) -> list[list[float]]:
        """Return the chosen share of each layer's neurons, one row for each set."""
        rows = []
        for one in self.given:
            chosen, sizes = one.neurons.per_layer(), one.neurons.layer_sizes()
            rows.append([chosen.get(layer, 0) / max(1, sizes.get(layer, 0)) for layer in self.layers])
        return rows

    def to_dict(self) -> dict[str, object]:
        """Return labels, sizes and matrices; rows and columns are in the order of ``sets``."""
        sets = [
            {
                "label": one.label,
                "file": str(one.file),
                "kind": one.kind,
                "method": one.neurons.method,
                "chosen": len(one.neurons),
                "total": one.neurons.total,
            }
            for one in self.given
        ]
        return {
            "site": self.given[0].neurons.site.value,
            "model": self.given[0].neurons.model,
            "sets": sets,
            "jaccard": self.jaccard,
            "jaccard_by_chance": self.chance,
            "rank_correlation": self.correlation,
            "layers": self.layers,
            "layer_shares": self.layer_shares(),
        }


@dataclass(frozen=True)
class Combined:
    """A set made of others, and where it was written."""

    given: tuple[Given, ...]
    how: str
    neurons: NeuronSet
    out: Path

    def to_dict(self) -> dict[str, object]:
        """Return the sizes of what went in and of what came out."""
        return {
            "how": self.how,
            "from": [{"file": str(one.file), "chosen": len(one.neurons)} for one in self.given],
            "site": self.neurons.site.value,
            "method": self.neurons.method,
            "chosen": len(self.neurons),
            "total": self.neurons.total,
            "per_layer": self.neurons.per_layer(),
            "out": str(self.out),
        }


def show(file: Path, top: float = TOP) -> Shown:
    """Read a file of neurons; of a score file the highest share ``top`` counts as chosen.

    Raises:
        UserError: the file is missing or damaged.
    """
    found = load_neurons(file)
    if found.site is Site.RESIDUAL and isinstance(found, NeuronScores):
        none = NeuronSet(found.site, {}, found.method, found.model, found.parameters, found.prompts)
        return Shown(Given(file, none, found))
    return Shown(_given(file, found, top))


def compare(files: Sequence[Path], top: float = TOP, out: Path | None = None) -> Comparison:
    """Compare neuron sets and scores, which are cut at the share ``top``; draw them where ``out`` is given.

    Raises:
        UserError: they belong to different models, or to sites that have no neurons in common.
    """
    if out is not None:
        pictures.check(out)
    given = _all_given(files, top)
    if len(given) < 2:
        raise UserError("one file cannot be compared; give two or more files of neurons")
    found = Comparison(
        given,
        _matrix(given, lambda a, b: a.neurons.jaccard(b.neurons)),
        _matrix(given, lambda a, b: a.neurons.chance_jaccard(b.neurons)),
        _matrix(given, _correlation),
    )
    if out is not None:
        panels = [("Jaccard index", found.jaccard), ("Jaccard index by chance", found.chance)]
        if sum(one.scores is not None for one in given) > 1:
            panels.append(("Rank correlation of scores", found.correlation))
        pictures.overlap(out, found.labels, found.layers, found.layer_shares(), panels)
    return found


def combine(files: Sequence[Path], how: str, out: Path, top: float = TOP) -> Combined:
    """Write the union, the intersection or the difference (the first less the others) of neuron sets.

    Raises:
        UserError: ``how`` is unknown, they belong to different models or sites, nothing is left, or ``out``
            exists.
    """
    if how not in _RULES:
        raise UserError(f"sets cannot be combined by {how}; choose one of {', '.join(_RULES)}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it")
    given = _all_given(files, top)
    found = reduce(_RULES[how], [one.neurons for one in given])
    if len(found) == 0:
        raise UserError(f"the {how} of these sets is empty, so nothing was written; choose other sets")
    found.save(out)
    return Combined(given, how, found, out)


def _given(file: Path, found: NeuronScores | NeuronSet, top: float) -> Given:
    if isinstance(found, NeuronScores):
        return Given(file, found.top(share=top), found)
    return Given(file, found, None)


def _all_given(files: Sequence[Path], top: float) -> tuple[Given, ...]:
    """Read files, name them, and bring them to one site."""
    given = [_given(file, load_neurons(file), top) for file in files]
    for first, other in pairwise(given):
        if first.neurons.model != other.neurons.model:
            raise UserError(
                f"{first.file} belongs to the model {first.neurons.model[:12]} and {other.file} to "
                f"{other.neurons.model[:12]}; locate both in one model"
            )
    mixed = len({one.neurons.site for one in given}) > 1
    return tuple(
        Given(one.file, one.neurons.as_ffn() if mixed else one.neurons, one.scores, label)
        for one, label in zip(given, _labels(given), strict=True)
    )


def _labels(given: Sequence[Given]) -> list[str]:
    """Return the methods, with as much of the file's name as tells them apart."""
    methods = [one.neurons.method for one in given]
    stems = [f"{one.neurons.method} ({one.file.stem})" for one in given]
    return next(
        (names for names in (methods, stems) if len({*names}) == len(names)), [str(o.file) for o in given]
    )


def _matrix(given: Sequence[Given], rule: Callable[[Given, Given], float | None]) -> Matrix:
    """Fill a symmetric matrix."""
    half = [[rule(a, b) for b in given[: i + 1]] for i, a in enumerate(given)]
    return tuple(tuple(half[max(i, j)][min(i, j)] for j in range(len(given))) for i in range(len(given)))


def _correlation(one: Given, other: Given) -> float | None:
    if one.scores is None or other.scores is None:
        return None
    pair = [one.scores, other.scores]
    if one.scores.site is not other.scores.site:
        if Site.ROW in (one.scores.site, other.scores.site):  # two rows make one neuron, their scores do not
            return None
        pair = [scores.as_ffn() for scores in pair]
    found = pair[0].rank_correlation(pair[1])
    return None if math.isnan(found) else found
