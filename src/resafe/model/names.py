"""The names of neurons: which entries of which checkpoint tensors belong to (part, expert, neuron).

A checkpoint may store other tensors than the model holds: one per expert where the model has all of them in one,
or under other names. Which entry goes where is not read from transformers' conversion rules but found by sending
numbered tensors through them, as `save_pretrained` would, and reading where each number has landed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from resafe.errors import UserError
from resafe.model.layout import plain, read_layout
from resafe.model.parts import FeedForward, Matrix, held
from resafe.weights.checkpoint import Checkpoint

ROLES = ("gate", "up", "down", "gate bias", "up bias")
_HIDDEN = 2  # entries left of an axis that holds no neurons: enough to see that it holds none


@dataclass(frozen=True)
class Place:
    """What one tensor of a checkpoint holds of one neuron.

    Attributes:
        key: the tensor's name in the checkpoint.
        role: ``gate``, ``up``, ``down``, ``gate bias`` or ``up bias``.
        at: for each axis the index, or None for all of it.
    """

    key: str
    role: str
    at: tuple[int | None, ...]

    @property
    def slices(self) -> tuple[int | slice, ...]:
        """The index for the tensor: ``tensor[place.slices]``."""
        return tuple(slice(None) if index is None else index for index in self.at)


@dataclass(frozen=True)
class Share:
    """One part's share of one checkpoint tensor, for one expert or for all.

    Attributes:
        key: the tensor's name.
        role: as in `Place`.
        expert: the expert whose neurons these are; None for all experts, or for a dense part.
        axes: for each axis None, if it holds no neurons, or (offset, step of a neuron, step of an expert).
        sizes: the tensor's extent along those axes; None along the others.
    """

    key: str
    role: str
    expert: int | None
    axes: tuple[tuple[int, int, int] | None, ...]
    sizes: tuple[int | None, ...]

    def place(self, expert: int, neuron: int) -> Place:
        """Return where a neuron lies."""
        at = (None if axis is None else axis[0] + axis[1] * neuron + axis[2] * expert for axis in self.axes)
        return Place(self.key, self.role, tuple(at))


@dataclass(frozen=True)
class Places:
    """Where every neuron of a model lies in its checkpoint.

    Attributes:
        parts: the parts by name.
        shares: each part's shares of the checkpoint's tensors; together they hold every neuron exactly once
            in each role.
    """

    parts: Mapping[str, FeedForward]
    shares: Mapping[str, tuple[Share, ...]]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every checkpoint tensor that holds neurons."""
        return tuple(dict.fromkeys(share.key for shares in self.shares.values() for share in shares))

    def of(self, part: str, expert: int | None, neuron: int) -> tuple[Place, ...]:
        """Return every place of one neuron (``expert`` is None in a dense part).

        Raises:
            UserError: there is no such neuron.
        """
        if part not in self.parts:
            raise UserError(
                f"there is no feed-forward part {part!r}: was the neuron set made for another model?"
            )
        found = self.parts[part]
        if (expert is None) != (found.experts is None) or not 0 <= (expert or 0) < (found.experts or 1):
            raise UserError(
                f"{part} has {found.experts or 'no'} experts, so there is no expert {expert} in it"
            )
        if not 0 <= neuron < found.width:
            raise UserError(f"{part} has neurons 0 to {found.width - 1}, not {neuron}")
        index = expert or 0
        return tuple(s.place(index, neuron) for s in self.shares[part] if s.expert in (None, index))


def places(model: PreTrainedModel | PeftModel, view: Checkpoint | None = None) -> Places:
    """Find every neuron of ``model`` in its checkpoint.

    Args:
        model: the model, plain or wrapped by PEFT (the places are then those in its base).
        view: the checkpoint; without it the names are those that ``save_pretrained`` would write. A
            checkpoint may also hold the model's own tensors.

    Raises:
        UserError: the checkpoint holds the tensors under neither kind of name, or a neuron would be found
            twice or not at all.
    """
    inner, layout = plain(model), read_layout(model)
    parts = {part.name: part for part in layout.parts}
    numbered = {part.name: dict(_numbered(part)) for part in layout.parts}
    ways = (_as_saved, _as_turned, _as_they_are)
    stored = None if view is None else {name: tuple(view.info(name).shape) for name in view.names}
    for way in ways if stored is not None else ways[:1]:
        shares = {name: _shares(parts[name], way(inner, tensors)) for name, tensors in numbered.items()}
        if stored is None or all(_fits(share, stored) for own in shares.values() for share in own):
            return Places(parts, shares)
    assert view is not None
    raise UserError(
        f"{view.folder} does not hold the tensors in which {layout.architecture} keeps its neurons, "
        f"such as {next(iter(numbered.values())).popitem()[0]}: save the model again with save_pretrained"
    )


def renamed(model: PreTrainedModel, view: Checkpoint) -> dict[str, str]:
    """Return which parameter a tensor of the checkpoint is, where the two have different names.

    Parameters that lie in several tensors, or share one, are left out.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbered = {
        name: torch.full((_HIDDEN,) * parameter.ndim, number)
        for number, (name, parameter) in enumerate(parameters.items())
    }
    names = list(parameters)
    found: dict[str, str] = {}
    for key, tensor in _as_saved(model, numbered).items():
        number = int(tensor.flatten()[0])
        whole = tensor.shape == numbered[names[number]].shape and bool((tensor == number).all())
        if whole and key != names[number] and key in view.names:
            found[key] = names[number]
    return found


class _Shapes:
    """A model to transformers' conversion, whose parameters have the shapes that it is told."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """Some conversions turn a tensor if it has not its parameter's shape; ours are short along one axis."""
        return self._tensors.get(name, torch.empty(0))


def _as_saved(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert as `save_pretrained` does."""
    return dict(revert_weight_conversion(_Shapes(model, tensors), tensors))


def _as_turned(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert as if no shape were the parameter's: how older checkpoints store what is turned on loading."""
    return dict(revert_weight_conversion(_Shapes(model, {}), tensors))


def _as_they_are(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the model's own tensors and names."""
    return tensors


def _fits(share: Share, stored: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the checkpoint has this tensor in this shape."""
    shape = stored.get(share.key, ())
    return len(shape) == len(share.sizes) and all(
        size in (None, there) for size, there in zip(share.sizes, shape, strict=True)
    )


def _numbered(part: FeedForward) -> Iterator[tuple[str, Tensor]]:
    """Yield the part's tensors with each entry the number of its (role, expert, neuron), counted from 1."""
    made: dict[str, Tensor] = {}
    for role, matrix in _maps(part).items():
        weight = made.setdefault(matrix.weight, _blank(matrix))
        matrix.neurons_last(weight)[:] = _ids(role, part)[..., None, :]
        if matrix.bias is not None and not matrix.inputs:
            shape = held(matrix.module, matrix.bias.rpartition(".")[2]).shape
            bias = made.setdefault(matrix.bias, torch.zeros(shape, dtype=torch.long))
            bias[..., matrix.neurons] = _ids(f"{role} bias", part)
    yield from made.items()


def _maps(part: FeedForward) -> dict[str, Matrix]:
    maps = {"up": part.up, "down": part.down}
    return maps if part.gate is None else {"gate": part.gate, **maps}


def _blank(matrix: Matrix) -> Tensor:
    """Return zeros of the weight's shape, with the axis that holds neither neurons nor experts made short."""
    shape = list(matrix.shape)
    own = {matrix.axis} if matrix.experts is None or matrix.stacked else {0, matrix.axis}
    return torch.zeros(
        [size if axis in own else _HIDDEN for axis, size in enumerate(shape)], dtype=torch.long
    )


def _ids(role: str, part: FeedForward) -> Tensor:
    count = math.prod(part.shape)
    start = 1 + ROLES.index(role) * count
    return torch.arange(start, start + count).reshape(part.shape)


def _shares(part: FeedForward, tensors: Mapping[str, Tensor]) -> tuple[Share, ...]:
    """Read where the numbers are, and check that each is in one place."""
    experts = part.experts or 1
    shares: list[Share] = []
    seen = torch.zeros(len(ROLES), experts, part.width, dtype=torch.long)
    for key, tensor in sorted(tensors.items()):
        free = [axis for axis in range(tensor.ndim) if _is_free(tensor, axis)]
        ids = tensor[tuple(slice(0, 1) if axis in free else slice(None) for axis in range(tensor.ndim))]
        at = ids.nonzero()  # (points, axes)
        number = ids[tuple(at.T)] - 1
        role, rest = number.div(experts * part.width, rounding_mode="floor"), number % (experts * part.width)
        expert, neuron = rest.div(part.width, rounding_mode="floor"), rest % part.width
        for kind in sorted(set(role.tolist())):
            chosen = role == kind
            axes = _axes(part, key, at[chosen], expert[chosen], neuron[chosen], free)
            only = int(expert[chosen][0]) if len(set(expert[chosen].tolist())) == 1 else None
            sizes = tuple(
                None if axis is None else size for axis, size in zip(axes, tensor.shape, strict=True)
            )
            shares.append(Share(key, ROLES[kind], None if part.experts is None else only, axes, sizes))
        seen.index_put_((role, expert, neuron), torch.tensor(1), accumulate=True)
    wanted = [role in _roles(part) for role in ROLES]
    if not torch.equal(seen, torch.tensor(wanted).long()[:, None, None].expand_as(seen)):
        raise UserError(
            f"the neurons of {part.name} are not each in the checkpoint once: its layout is not known"
        )
    return tuple(shares)


def _roles(part: FeedForward) -> set[str]:
    maps = _maps(part)
    return {*maps, *(f"{role} bias" for role, m in maps.items() if m.bias is not None and not m.inputs)}


def _is_free(tensor: Tensor, axis: int) -> bool:
    """Whether all entries along an axis are the same: then it holds no neurons."""
    return tensor.shape[axis] > 1 and bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _axes(
    part: FeedForward, key: str, at: Tensor, expert: Tensor, neuron: Tensor, free: list[int]
) -> tuple[tuple[int, int, int] | None, ...]:
    """Fit ``index = offset + step * neuron + stride * expert`` on each axis; it must be exact everywhere."""
    axes: list[tuple[int, int, int] | None] = []
    for axis in range(at.shape[1]):
        if axis in free:
            axes.append(None)
            continue
        index = at[:, axis]
        step, stride = _slope(index, neuron, expert), _slope(index, expert, neuron)
        offset = int(index[0] - step * neuron[0] - stride * expert[0])
        if not torch.equal(index, offset + step * neuron + stride * expert):
            raise UserError(f"{key} holds the neurons of {part.name} in an order that resafe does not know")
        axes.append((offset, step, stride))
    return tuple(axes)


def _slope(index: Tensor, by: Tensor, fixed: Tensor) -> int:
    """Return how far ``index`` moves when ``by`` grows by one and ``fixed`` stays."""
    same = fixed == fixed[0]
    low, high = by[same].min(), by[same].max()
    if low == high:
        return 0
    first, last = index[same & (by == low)][0], index[same & (by == high)][0]
    return math.trunc(int(last - first) / int(high - low))
