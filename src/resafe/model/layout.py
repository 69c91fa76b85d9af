"""Where the neurons are: the feed-forward parts of a loaded model, found in its own modules by name.

A *part* is one population of neurons in a decoder block: a dense feed-forward network, a shared expert, or the
routed experts of one block together. Every matrix in a numbered list of the decoder must belong to a part or to
something known to be none (attention, routers, other mixers); anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resafe.errors import UserError, nearest

GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
FEED_FORWARD = (GATE, UP, DOWN)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

DENSE: tuple[
    tuple[str | None, str, str], ...
] = (  # gate, up, down; one name twice is gate above up in one matrix
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
NO_FEED_FORWARD = frozenset({"self_attn", "attention", "attn"})


@dataclass(frozen=True)
class Matrix:
    """The neurons' share of one weight: which slices of which tensor are theirs.

    Attributes:
        weight: the weight's name in the model.
        bias: its bias's name, where the neurons have a share in that (never for down).
        module: the module that holds it (the adapter's wrapper, where an adapter changes it).
        attribute: the weight's name inside ``module``.
        axis: the weight's axis along which the neurons lie.
        neurons: where along that axis.
    """

    weight: str
    bias: str | None
    module: nn.Module
    attribute: str
    axis: int
    neurons: slice

    @property
    def tensor(self) -> Tensor:
        """The weight as the model computes with it: an adapter's change is in it."""
        return _weight(self.module, self.attribute, self.weight)

    def vectors(self) -> Tensor:
        """Return each neuron's share, float32: (width, hidden), or (experts, width, hidden)."""
        tensor = self.tensor
        chosen = [slice(None)] * tensor.ndim
        chosen[self.axis] = self.neurons
        vectors: Tensor = torch.movedim(tensor[tuple(chosen)], self.axis, -2).float()
        return vectors


@dataclass(frozen=True)
class FeedForward:
    """One population of neurons.

    Attributes:
        name: the path of the module that holds it, such as ``model.layers.3.mlp``.
        layer: the index of its block.
        experts: the number of routed experts; None for a dense part.
        width: the number of neurons (of one expert).
        gate: the gate's weight; None where the part has no gate.
        up: the up projection's weight.
        down: the down projection's weight.
    """

    name: str
    layer: int
    experts: int | None
    width: int
    gate: Matrix | None
    up: Matrix
    down: Matrix

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the neurons."""
        return self.gate is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one number for each neuron: (width,) or (experts, width)."""
        return (self.width,) if self.experts is None else (self.experts, self.width)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Gate (if any), up and down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @torch.no_grad()
    def down_columns(self) -> Tensor:
        """Return what each neuron writes, float32: (width, hidden), or (experts, width, hidden)."""
        return self.down.vectors()

    @torch.no_grad()
    def down_norms(self) -> Tensor:
        """Return the length of what each neuron writes, ``||W_down[:, j]||_2``, float32, of shape `shape`."""
        norms: Tensor = torch.linalg.vector_norm(self.down.vectors(), dim=-1)
        return norms


@dataclass(frozen=True)
class BlockLinear:
    """One linear map of a decoder block.

    Attributes:
        name: the checkpoint's name of its weight, such as ``model.layers.3.mlp.down_proj.weight``.
        module: the module that computes it (the adapter's wrapper, where an adapter changes it).
        shape: the weight's shape, (out, in).
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One decoder block: its module, its index and its feed-forward parts (none, one or several)."""

    index: int
    name: str
    module: nn.Module
    parts: tuple[FeedForward, ...]
    architecture: str

    @cached_property
    def linears(self) -> Mapping[str, BlockLinear]:
        """The matrices of a Llama-like block by their name inside it.

        Raises:
            UserError: the block holds another matrix, or lacks one: methods that edit all of a block's
                matrices by name know no other kind.
        """
        found = dict(_matrices(self.module))
        known = FEED_FORWARD + ATTENTION
        strange = [
            part for part in found if part not in known or not isinstance(base(found[part]), nn.Linear)
        ]
        if strange:
            raise UserError(
                f"{self.name} of {self.architecture} holds {', '.join(sorted(strange))}: {_LLAMA}"
            )
        missing = [part for part in known if part not in found]
        if missing:
            raise UserError(f"{self.name} of {self.architecture} has no {', '.join(missing)}: {_LLAMA}")
        return {part: _block_linear(f"{self.name}.{part}", found[part]) for part in known}


@dataclass(frozen=True)
class Coverage:
    """What was understood: every feed-forward matrix, or reading the layout would have been refused."""

    layers: int
    parts: int
    experts: int
    matrices: int
    neurons: int

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {
            "layers": self.layers,
            "parts": self.parts,
            "experts": self.experts,
            "matrices": self.matrices,
            "neurons": self.neurons,
        }


@dataclass(frozen=True)
class Layout:
    """The decoder blocks and feed-forward parts of one model, in order."""

    architecture: str
    parts: tuple[FeedForward, ...]
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __getitem__(self, layer: int) -> Block:
        if not 0 <= layer < len(self.blocks):
            raise UserError(
                f"there is no layer {layer}: {self.architecture} has layers 0 to {len(self.blocks) - 1}; "
                "was the neuron set made for another model?"
            )
        return self.blocks[layer]

    def part(self, name: str) -> FeedForward:
        """Return the part of that name.

        Raises:
            UserError: there is none.
        """
        found = {part.name: part for part in self.parts}
        if name not in found:
            raise UserError(
                f"{self.architecture} has no feed-forward part {name!r}{nearest(name, found)}; "
                "was the neuron set made for another model?"
            )
        return found[name]

    @property
    def linears(self) -> dict[str, BlockLinear]:
        """Every matrix of every block by its checkpoint name; see `Block.linears` for what is refused."""
        return {linear.name: linear for block in self.blocks for linear in block.linears.values()}

    @property
    def coverage(self) -> Coverage:
        """Count what was understood."""
        return Coverage(
            layers=len(self.blocks),
            parts=len(self.parts),
            experts=sum(part.experts or 0 for part in self.parts),
            matrices=len({matrix.weight for part in self.parts for matrix in part.matrices}),
            neurons=sum(part.width * (part.experts or 1) for part in self.parts),
        )


def read_layout(model: PreTrainedModel | PeftModel) -> Layout:
    """Read the feed-forward parts of ``model``, plain or wrapped by PEFT.

    Raises:
        UserError: when a matrix of a block is of a kind that is not understood, or no part is found.
    """
    inner = plain(model)
    architecture = type(inner).__name__
    decoder = inner.get_decoder()
    prefix = next(name for name, module in inner.named_modules() if module is decoder)
    parts = tuple(_parts(decoder, prefix, layer=None))
    _account(architecture, decoder, prefix, parts)
    if not parts:
        raise UserError(f"{architecture} has no feed-forward block that resafe knows: choose another model")
    return Layout(architecture, parts, _blocks(inner, architecture, parts))


def linear_names(model: PreTrainedModel | PeftModel) -> dict[str, nn.Module]:
    """Return every block's linear maps: checkpoint weight name -> the module that computes it."""
    return {name: linear.module for name, linear in read_layout(model).linears.items()}


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model itself, with an adapter's layers still in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base(module: nn.Module) -> nn.Module:
    """Return the module that an adapter's wrapper wraps, or the module itself."""
    inner: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return inner


def _parts(module: nn.Module, name: str, layer: int | None) -> Iterator[FeedForward]:
    """Yield the parts at and below ``module``."""
    if isinstance(module, BaseTunerLayer):
        return
    found = None if layer is None else _dense(module, name, layer)
    if found is not None:
        yield found
    for child_name, child in module.named_children():
        if child_name not in NO_FEED_FORWARD:
            inside = int(child_name) if layer is None and child_name.isdecimal() else layer
            yield from _parts(child, f"{name}.{child_name}" if name else child_name, inside)


def _dense(module: nn.Module, name: str, layer: int) -> FeedForward | None:
    """Read a dense part whose linear maps ``module`` holds by known names, or return None."""
    for gate, up, down in DENSE:
        maps = {path: _linear(module, path) for path in (gate, up, down) if path is not None}
        found = {path: linear for path, linear in maps.items() if linear is not None}
        if len(found) == len(maps):
            return _dense_part(name, layer, found, gate, up, down)
    return None


def _dense_part(
    name: str, layer: int, maps: Mapping[str, nn.Module], gate: str | None, up: str, down: str
) -> FeedForward:
    width = _features(maps[down])[0]
    first = slice(0, width)
    second = slice(width, 2 * width) if gate == up else first
    wanted = second.stop
    for path in maps:
        if path != down and _features(maps[path])[1] != wanted:
            raise UserError(
                f"{name} has {path} of {_features(maps[path])[1]} outputs and {down} of {width} inputs, "
                "which do not share their neurons: choose another model"
            )
    return FeedForward(
        name,
        layer,
        None,
        width,
        None if gate is None else _rows(f"{name}.{gate}", maps[gate], first),
        _rows(f"{name}.{up}", maps[up], second),
        _columns(f"{name}.{down}", maps[down]),
    )


def _linear(module: nn.Module, path: str) -> nn.Module | None:
    """Return the linear map at ``path`` below ``module``, in its adapter's wrapper, or None."""
    for step in path.split("."):
        children = dict(module.named_children())
        if step not in children:
            return None
        module = children[step]
    return module if isinstance(base(module), nn.Linear | Conv1D) else None


def _features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear map."""
    linear = base(module)
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def _rows(name: str, module: nn.Module, neurons: slice) -> Matrix:
    """Describe a map whose outputs are neurons."""
    linear = base(module)
    bias = None if linear.bias is None else f"{name}.bias"
    return Matrix(f"{name}.weight", bias, module, "weight", 1 if isinstance(linear, Conv1D) else 0, neurons)


def _columns(name: str, module: nn.Module) -> Matrix:
    """Describe a map whose inputs are neurons."""
    axis = 0 if isinstance(base(module), Conv1D) else 1
    return Matrix(f"{name}.weight", None, module, "weight", axis, slice(0, _features(module)[0]))


def _weight(module: nn.Module, attribute: str, name: str) -> Tensor:
    weight: Tensor = base(module).get_parameter(attribute)
    if not isinstance(module, BaseTunerLayer) or module.merged:
        return weight
    if not isinstance(module, LoraLayer):
        raise UserError(f"{name} is changed by an adapter that is not LoRA: merge it into the model first")
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter)
    return weight


def _account(architecture: str, decoder: nn.Module, prefix: str, parts: tuple[FeedForward, ...]) -> None:
    """Refuse a matrix in a numbered list that belongs neither to a part nor to what is known to be none."""
    understood = {matrix.weight.rpartition(".")[0] for part in parts for matrix in part.matrices}
    strange = [
        name
        for name, _ in _matrices(decoder, prefix)
        if name not in understood
        and any(step.isdecimal() for step in name.split("."))
        and not NO_FEED_FORWARD.intersection(name.split("."))
    ]
    if strange:
        raise UserError(
            f"{architecture} holds {', '.join(strange[:8])}, of which resafe does not know whether neurons lie "
            f"in them: choose another model or ask for {architecture}"
        )


def _blocks(model: PreTrainedModel, architecture: str, parts: tuple[FeedForward, ...]) -> tuple[Block, ...]:
    """Read the one list of blocks that holds the parts; without one there are no blocks."""
    lists = {_block_name(part.name).rpartition(".")[0] for part in parts}
    if len(lists) != 1:
        return ()
    (prefix,) = lists
    inside: dict[str, list[FeedForward]] = {}
    for part in parts:
        inside.setdefault(_block_name(part.name), []).append(part)
    children = model.get_submodule(prefix).named_children()
    return tuple(
        Block(index, f"{prefix}.{index}", block, tuple(inside.get(f"{prefix}.{index}", ())), architecture)
        for index, (_, block) in enumerate(children)
    )


def _block_name(name: str) -> str:
    """Return a part's name up to its first number."""
    steps = name.split(".")
    return ".".join(steps[: 1 + next(i for i, step in enumerate(steps) if step.isdecimal())])


def _matrices(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module at or below ``module`` that itself holds a matrix, with its name.

    An adapter's wrapper counts as the one map that it computes; what it holds inside is not looked at.
    """
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
    if own or isinstance(module, BaseTunerLayer):
        yield name, module
        if isinstance(module, BaseTunerLayer):
            return
    for child_name, child in module.named_children():
        yield from _matrices(child, f"{name}.{child_name}" if name else child_name)


def _block_linear(name: str, module: nn.Module) -> BlockLinear:
    inputs, outputs = _features(module)
    return BlockLinear(f"{name}.weight", module, (outputs, inputs))


_LLAMA = (
    "methods that edit all matrices of a block know only mlp.{gate,up,down}_proj and self_attn.{q,k,v,o}_proj "
    "(Llama, Qwen2/3, Mistral, Gemma and their like), so choose such a model"
)
