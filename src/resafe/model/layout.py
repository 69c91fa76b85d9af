"""Where the neurons are: the feed-forward parts of a loaded model, found in its own modules by name.

A *part* is one population of neurons in a decoder block: a dense feed-forward network, a shared expert, or the
routed experts of one block together. Every matrix in a numbered list of the decoder must belong to a part or to
something known to be none (attention, routers, other mixers); anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resafe.errors import UserError, nearest
from resafe.model.parts import (
    NO_FEED_FORWARD,
    NO_PART,
    FeedForward,
    Matrix,
    base,
    features,
    find_parts,
    held,
    matrices,
)

GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
FEED_FORWARD = (GATE, UP, DOWN)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
READS = {  # query, key and value read one tensor, and so do gate and up
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    UP: GATE,
}


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

    @property
    def matrix(self) -> Matrix:
        """The whole weight, its rows in the place of neurons; an adapter's change is in its tensor."""
        return Matrix(self.name, None, self.module, "weight", 0, slice(None), inputs=False)


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
        found = dict(matrices(self.module))
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
        if not self.blocks:
            raise UserError(
                f"{self.architecture} keeps its blocks in no single list: look at its parts instead"
            )
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
    def maps(self) -> dict[str, nn.Module]:
        """Every plain linear map of every block by its weight's name, whatever else a block holds."""
        found = (pair for block in self.blocks for pair in matrices(block.module, block.name))
        return {f"{name}.weight": module for name, module in found if _is_plain(module)}

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
    decoder = inner.base_model.get_decoder()  # a head may be called decoder, too
    prefix = next(name for name, module in inner.named_modules() if module is decoder)
    parts = tuple(find_parts(decoder, prefix))
    _account(architecture, decoder, prefix, parts)
    _no_sharing(architecture, parts)
    if not parts:
        raise UserError(f"{architecture} has no feed-forward block that resafe knows: choose another model")
    return Layout(architecture, parts, _blocks(inner, architecture, parts))


def linear_names(model: PreTrainedModel | PeftModel) -> dict[str, nn.Module]:
    """Return every block's linear maps: checkpoint weight name -> the module that computes it."""
    return {name: linear.module for name, linear in read_layout(model).linears.items()}


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model itself, with an adapter's layers still in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _account(architecture: str, decoder: nn.Module, prefix: str, parts: tuple[FeedForward, ...]) -> None:
    """Refuse a matrix in a numbered list that belongs neither to a part nor to what is known to be none."""
    understood = {part.name for part in parts if part.experts is not None}
    understood |= {matrix.weight.rpartition(".")[0] for part in parts for matrix in part.matrices}
    strange: dict[tuple[str, ...], str] = {}  # the first of each kind
    for name, _ in matrices(decoder, prefix):
        steps = name.split(".")
        kind = tuple("*" if step.isdecimal() else step for step in steps)
        known = name in understood or NO_FEED_FORWARD.intersection(steps) or steps[-1] in NO_PART
        if "*" in kind and not known:
            strange.setdefault(kind, name)
    if strange:
        raise UserError(
            f"{architecture} holds {', '.join(strange.values())}, of which resafe does not know whether neurons lie "
            f"in them: choose another model or ask for {architecture}"
        )


def _no_sharing(architecture: str, parts: tuple[FeedForward, ...]) -> None:
    """Refuse two parts with one weight: then an edit of a neuron in one layer would be one in another, too."""
    owner: dict[int, str] = {}
    for part in parts:
        for weight in {id(held(matrix.module, matrix.attribute)) for matrix in part.matrices}:
            if owner.setdefault(weight, part.name) != part.name:
                raise UserError(
                    f"{part.name} of {architecture} has the weights of {owner[weight]}, so that its neurons "
                    "cannot be edited by themselves: choose another model"
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


def _is_plain(module: nn.Module) -> bool:
    return isinstance(base(module), nn.Linear | Conv1D)


def _block_linear(name: str, module: nn.Module) -> BlockLinear:
    inputs, outputs = features(module)
    return BlockLinear(f"{name}.weight", module, (outputs, inputs))


_LLAMA = (
    "methods that edit all matrices of a block know only mlp.{gate,up,down}_proj and self_attn.{q,k,v,o}_proj "
    "(Llama, Qwen2/3, Mistral, Gemma and their like), so choose such a model"
)
