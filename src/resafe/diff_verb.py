"""What differs between two models on disk: entries, norms, ranks and neurons, per module and per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from resafe.errors import UserError
from resafe.model.names import Places, Share, places
from resafe.neurons import layer_of
from resafe.weights import lowrank
from resafe.weights.adapter import Adapter, Factors, open_model
from resafe.weights.checkpoint import Checkpoint

LIMIT = 64  # ranks are told apart up to here
_EXTRA = 8  # directions that the sketch has beyond the limit
_GRAIN = 1e-6  # of the largest singular value: where the arithmetic of float32 ends
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Change:
    """How far one thing has moved.

    Attributes:
        entries: stored entries (of an adapter: those of its factors).
        changed: those whose bits differ; whose value differs, where the two are of different types.
        norm: Frobenius norm of the change of the matrix (of an adapter: of ``s·B·A``).
        size: Frobenius norm of the first model's own; of adapters, of its ``s·B·A``.
        rank: singular values of the change above what rounding to the stored type makes; the largest of all
            matrices. None where it was not estimated, or there is no matrix.
        neurons: feed-forward neurons of which an entry changed. None where there are none or they are not known.
        neurons_of: neurons there are.
    """

    entries: int
    changed: int
    norm: float
    size: float
    rank: int | None
    neurons: int | None
    neurons_of: int | None

    @property
    def relative(self) -> float | None:
        """Norm of the change over the first model's own; None where that is zero."""
        return self.norm / self.size if self.size else None

    @property
    def rank_text(self) -> str:
        """The rank as it is shown."""
        return "" if self.rank is None else f"> {LIMIT}" if self.rank > LIMIT else str(self.rank)

    def to_dict(self) -> dict[str, object]:
        """Return the numbers; a rank above ``LIMIT`` is a lower bound."""
        return {
            "entries": self.entries,
            "changed": self.changed,
            "norm": self.norm,
            "relative": self.relative,
            "rank": self.rank,
            "rank_is_lower_bound": self.rank is not None and self.rank > LIMIT,
            "neurons": self.neurons,
            "neurons_of": self.neurons_of,
        }


@dataclass(frozen=True)
class ModuleChange(Change):
    """The change of one weight."""

    name: str
    layer: int  # -1 outside the decoder blocks
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, object]:
        """Return name, layer, shape and numbers."""
        return {"name": self.name, "layer": self.layer, "shape": list(self.shape), **super().to_dict()}


@dataclass(frozen=True)
class LayerChange(Change):
    """The change of all weights of one layer; its neurons are those that any of its weights changed."""

    layer: int

    def to_dict(self) -> dict[str, object]:
        """Return layer and numbers."""
        return {"layer": self.layer, **super().to_dict()}


@dataclass(frozen=True)
class DiffResult:
    """What differs between two models.

    Attributes:
        one: the first model's folder.
        other: the second's.
        compared: what was compared, in words.
        modules: every weight that both have, in file order.
        layers: the layers.
        only_one: weights that only the first has.
        only_other: weights that only the second has.
        notes: what could not be counted, and why.
    """

    one: Path
    other: Path
    compared: str
    modules: tuple[ModuleChange, ...]
    layers: tuple[LayerChange, ...]
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def changed(self) -> int:
        """Number of entries that differ."""
        return sum(module.changed for module in self.modules)

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON."""
        return {
            "one": str(self.one),
            "other": str(self.other),
            "compared": self.compared,
            "changed": self.changed,
            "modules": [module.to_dict() for module in self.modules],
            "layers": [layer.to_dict() for layer in self.layers],
            "only_one": list(self.only_one),
            "only_other": list(self.only_other),
            "notes": list(self.notes),
        }


def diff(
    one: str | Path, other: str | Path, *, ranks: bool = True, progress: Progress | None = None
) -> DiffResult:
    """Compare two models of one shape, a tensor at a time.

    Two adapters are compared by their factors, without their base; an adapter and a dense model by the merged
    weights.

    Args:
        one: a folder or Hub id, dense or a LoRA adapter.
        other: the model to compare it with.
        ranks: whether to estimate ranks, which takes most of the time.
        progress: called with (step, done, total).

    Raises:
        UserError: a model cannot be read, or the two have no weight in common or one in two shapes.
    """
    models = open_model(one), open_model(other)
    factors = all(isinstance(model, Adapter) for model in models)
    names = [_names(model, factors) for model in models]
    common = [name for name in names[0] if name in set(names[1])]
    if not common:
        raise UserError(f"{one} and {other} have no weight in common; give two models of one family")
    notes: list[str] = []
    where = _places(models[0], notes)
    rows, layers = [], _Layers(where)
    for done, name in enumerate(common):
        if progress:
            progress("compare", done, len(common))
        both = all(isinstance(model, Adapter) and name in model.modules for model in models)
        found = (_of_factors if both else _of_tensors)(models, name, ranks)
        rows.append(layers.add(name, found))
    only = [tuple(n for n in mine if n not in set(theirs)) for mine, theirs in (names, names[::-1])]
    what = "the factors of two adapters" if factors else "weights, adapters merged"
    return DiffResult(
        models[0].folder,
        models[1].folder,
        what,
        tuple(rows),
        layers.finish(rows),
        only[0],
        only[1],
        tuple(notes),
    )


Models = tuple[Checkpoint | Adapter, Checkpoint | Adapter]


def _names(model: Checkpoint | Adapter, factors: bool) -> tuple[str, ...]:
    if factors and isinstance(model, Adapter):
        return (*model.modules, *model.replaced)
    return model.names


def _places(model: Checkpoint | Adapter, notes: list[str]) -> Places | None:
    """Find the neurons of a model from its config alone, on no memory; note why where they cannot be found."""
    try:
        base = model.base if isinstance(model, Adapter) else model
        if not base.config:
            raise UserError(f"{base.folder} has no config.json")
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return places(skeleton, base)
    except (UserError, ValueError) as error:  # transformers knows no such model
        notes.append(f"neurons are not counted: {str(error).splitlines()[0]}")
        return None


@dataclass(frozen=True)
class _Found:
    """What one weight tells: the numbers, and where it changed."""

    shape: tuple[int, ...]
    entries: int
    changed: int
    norm: float
    size: float
    rank: int | None
    where: Callable[[Sequence[int]], Tensor]  # the axes to keep -> bool, whether anything changed there


# One weight ----------------------------------------------------------------------------------------------


def _of_tensors(models: Models, name: str, ranks: bool) -> _Found:
    one, other = (model.tensor(name) for model in models)
    if one.shape != other.shape:
        raise UserError(
            f"{name} is {tuple(one.shape)} in {models[0].folder} and {tuple(other.shape)} in {models[1].folder}; "
            "give two models of one shape"
        )
    mask = _unequal(one, other)
    delta = other.float().sub_(one)
    changed, matrix = int(mask.sum()), ranks and one.dim() in (2, 3) and one.is_floating_point()
    rank = _rank(delta, _rounding(one, other, mask)) if matrix and changed else 0
    return _Found(
        tuple(one.shape),
        one.numel(),
        changed,
        _norm(delta),
        _norm(one),
        rank if matrix else None,
        lambda kept: _touched(mask, kept),
    )


def _norm(tensor: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(
            tensor if tensor.is_floating_point() else tensor.float(), dtype=torch.float64
        )
    )


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    if one.dtype != other.dtype:
        return one.float() != other.float()
    kind = _BITS[one.dtype.itemsize]
    return one.view(kind) != other.view(kind)


def _touched(mask: Tensor, kept: Sequence[int]) -> Tensor:
    gone = [axis for axis in range(mask.dim()) if axis not in kept]
    return mask.any(dim=gone) if gone else mask


def _rounding(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Return the root mean square, over all entries, of what rounding both to their types can have added."""
    return math.sqrt((lowrank.rounding(one, mask) + lowrank.rounding(other, mask)) / one.numel())


def _rank(delta: Tensor, rounding: float) -> int:
    """Count singular values above twice those of noise of that size; of stacked experts, the most of any.

    The singular values of a random matrix reach ``rms · (√out + √in)``.
    """
    stack = delta if delta.dim() == 3 else delta[None]
    floor = 2 * rounding * (math.sqrt(stack.shape[1]) + math.sqrt(stack.shape[2]))
    leading = (_leading(matrix) for matrix in stack)
    return max(int((values > max(floor, _GRAIN * float(values[0]))).sum()) for values in leading)


def _leading(matrix: Tensor) -> Tensor:
    """Return about the ``LIMIT + 1`` largest singular values: a random sketch, turned once, seeded here and now."""
    width = LIMIT + 1 + _EXTRA
    if width >= min(matrix.shape):
        values: Tensor = torch.linalg.svdvals(matrix)
        return values[: LIMIT + 1]
    drawn = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ drawn)[0]
    basis = torch.linalg.qr(matrix @ (matrix.T @ basis))[0]
    values = torch.linalg.svdvals(basis.T @ matrix)
    return values[: LIMIT + 1]


def _of_factors(models: Models, name: str, ranks: bool) -> _Found:
    """Compare ``s·B·A`` of two adapters without building it."""
    one, other = (m.factors(name) for m in models if isinstance(m, Adapter))
    shape = (len(one.b), one.a.shape[1])
    if shape != (len(other.b), other.a.shape[1]):
        raise UserError(f"{name} has another shape in {models[1].folder}; give two adapters of one base")
    b = torch.cat([other.scale * other.b.double(), -one.scale * one.b.double()], dim=1)
    a = torch.cat([other.a.double(), one.a.double()])
    pairs = ((one.a, other.a), (one.b, other.b))
    masks = [_unequal(*pair) if pair[0].shape == pair[1].shape else None for pair in pairs]
    rescaled = one.scale != other.scale
    counts = [int(m.sum()) if m is not None else y.numel() for m, (_, y) in zip(masks, pairs, strict=True)]
    same = not rescaled and sum(counts) == 0
    return _Found(
        shape,
        one.a.numel() + one.b.numel(),
        sum(counts),
        0.0 if same else lowrank.norm(b, a),
        abs(one.scale) * lowrank.norm(one.b, one.a),
        None if not ranks else 0 if same else _product_rank(b, a),
        lambda kept: _touched_by(masks, (one, other), rescaled, kept),
    )


def _product_rank(b: Tensor, a: Tensor) -> int:
    values = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T)
    return min(LIMIT + 1, int((values > _GRAIN * values[0]).sum()))


def _touched_by(
    masks: Sequence[Tensor | None], pair: tuple[Factors, Factors], rescaled: bool, kept: Sequence[int]
) -> Tensor:
    """Say which rows (axis 0) or columns (axis 1) of the product a change of its factors reaches."""
    own, theirs = (1, 0) if tuple(kept) == (0,) else (0, 1)  # rows are B's, columns A's; masks are (A, B)
    mask, across = masks[own], masks[theirs]
    sides = [factors.b.T if own else factors.a for factors in pair]  # (r, rows or columns)
    if mask is None or across is None or rescaled or bool(across.any()):
        return (sides[0] != 0).any(dim=0) | (sides[1] != 0).any(dim=0)
    return mask.any(dim=1) if own else mask.any(dim=0)


# Neurons and layers --------------------------------------------------------------------------------------


class _Layers:
    """Gathers what the weights tell about each part's neurons."""

    def __init__(self, where: Places | None) -> None:
        self._parts: dict[str, Tensor] = {}
        self._shares: dict[str, list[tuple[str, Share]]] = {}
        if where is None:
            return
        for part, shares in where.shares.items():
            self._parts[part] = torch.zeros(where.parts[part].shape, dtype=torch.bool)
            for share in shares:
                self._shares.setdefault(share.key, []).append((part, share))

    def add(self, name: str, found: _Found) -> ModuleChange:
        """Take in one weight."""
        touched: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for part, share in self._shares.get(name, ()):
            mask = touched.setdefault(part, torch.zeros_like(self._parts[part]))
            held = seen.setdefault(part, torch.zeros_like(self._parts[part]))
            rows = slice(None) if share.expert is None else share.expert
            mask[rows] |= _neurons(share, found, mask[rows].shape)
            held[rows] = True
        for part, mask in touched.items():
            self._parts[part] |= mask
        neurons, total = (sum(int(mask.sum()) for mask in masks.values()) for masks in (touched, seen))
        return ModuleChange(
            found.entries,
            found.changed,
            found.norm,
            found.size,
            found.rank,
            neurons if touched else None,
            total if touched else None,
            name,
            layer_of(name),
            found.shape,
        )

    def finish(self, rows: Sequence[ModuleChange]) -> tuple[LayerChange, ...]:
        """Return the layers of these weights, those outside of all layers last."""
        layers: dict[int, list[ModuleChange]] = {}
        for row in rows:
            layers.setdefault(row.layer, []).append(row)
        order = sorted(layers, key=lambda layer: (layer < 0, layer))
        return tuple(self._layer(layer, layers[layer]) for layer in order)

    def _layer(self, layer: int, rows: Sequence[ModuleChange]) -> LayerChange:
        masks = [mask for part, mask in self._parts.items() if layer_of(part) == layer]
        known = [row.rank for row in rows if row.rank is not None]
        return LayerChange(
            sum(row.entries for row in rows),
            sum(row.changed for row in rows),
            math.hypot(*(row.norm for row in rows)),
            math.hypot(*(row.size for row in rows)),
            max(known) if known else None,
            sum(int(mask.sum()) for mask in masks) if masks else None,
            sum(mask.numel() for mask in masks) if masks else None,
            layer,
        )


def _neurons(share: Share, found: _Found, shape: torch.Size) -> Tensor:
    """Return which of a share's neurons changed: (width,) or (experts, width)."""
    kept = [axis for axis, step in enumerate(share.axes) if step is not None]
    changed = found.where(kept)
    neuron = torch.arange(shape[-1])
    expert = torch.arange(shape[0])[:, None] if len(shape) > 1 else torch.tensor(share.expert or 0)
    steps = (step for step in share.axes if step is not None)
    return changed[tuple(offset + step * neuron + stride * expert for offset, step, stride in steps)]
