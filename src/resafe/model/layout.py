"""Where the neurons are: the decoder blocks of a loaded model, read from its own modules by name.

Understood are blocks of the Llama kind: a gated feed-forward network ``mlp.{gate,up,down}_proj`` and an
attention ``self_attn.{q,k,v,o}_proj``. Anything else in a block that holds a matrix is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from resafe.errors import UserError

GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
FEED_FORWARD = (GATE, UP, DOWN)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


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
    """One decoder block: its module, its index and its linear maps by their name inside the block."""

    index: int
    name: str
    module: nn.Module
    linears: Mapping[str, BlockLinear]

    @property
    def gate(self) -> BlockLinear:
        """The feed-forward block's gate."""
        return self.linears[GATE]

    @property
    def up(self) -> BlockLinear:
        """The feed-forward block's up projection."""
        return self.linears[UP]

    @property
    def down(self) -> BlockLinear:
        """The feed-forward block's down projection; its input holds the neurons."""
        return self.linears[DOWN]

    @property
    def attention(self) -> tuple[BlockLinear, ...]:
        """Query, key, value and output projection."""
        return tuple(self.linears[name] for name in ATTENTION)

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.down.shape[1]


@dataclass(frozen=True)
class Coverage:
    """What was understood: every matrix of every block, or reading the layout would have been refused."""

    layers: int
    matrices: int
    feed_forward: int
    attention: int
    neurons: int

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {
            "layers": self.layers,
            "matrices": self.matrices,
            "feed_forward": self.feed_forward,
            "attention": self.attention,
            "neurons": self.neurons,
        }


@dataclass(frozen=True)
class Layout:
    """The decoder blocks of one model, in order."""

    architecture: str
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

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of neurons of each layer."""
        return tuple(block.width for block in self.blocks)

    @property
    def linears(self) -> dict[str, BlockLinear]:
        """Every linear map of every block by its checkpoint name."""
        return {linear.name: linear for block in self.blocks for linear in block.linears.values()}

    @property
    def coverage(self) -> Coverage:
        """Count what was understood."""
        return Coverage(
            layers=len(self.blocks),
            matrices=len(self.linears),
            feed_forward=len(self.blocks) * len(FEED_FORWARD),
            attention=len(self.blocks) * len(ATTENTION),
            neurons=sum(self.widths),
        )


def read_layout(model: PreTrainedModel | PeftModel) -> Layout:
    """Read the decoder blocks of ``model``, plain or wrapped by PEFT.

    Raises:
        UserError: when any matrix of any block is of a kind that is not understood, or one is missing.
    """
    inner = plain(model)
    architecture = type(inner).__name__
    decoder = inner.get_decoder()
    names = {id(module): name for name, module in inner.named_modules()}
    layers = dict(decoder.named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UserError(f"{architecture} keeps its blocks in no list named 'layers': {_scope(architecture)}")
    prefix = names[id(layers)]
    blocks = tuple(
        _read_block(architecture, f"{prefix}.{index}", index, module) for index, module in enumerate(layers)
    )
    return Layout(architecture, blocks)


def linear_names(model: PreTrainedModel | PeftModel) -> dict[str, nn.Module]:
    """Return every block's linear maps: checkpoint weight name -> the module that computes it."""
    return {name: linear.module for name, linear in read_layout(model).linears.items()}


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model itself, with an adapter's layers still in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _read_block(architecture: str, name: str, index: int, block: nn.Module) -> Block:
    """Read one block and refuse it unless its matrices are exactly the known ones."""
    found = dict(_matrices(block))
    known = FEED_FORWARD + ATTENTION
    strange = sorted(part for part in found if part not in known)
    strange += sorted(part for part, module in found.items() if part in known and _linear(module) is None)
    if strange:
        raise UserError(f"{name} of {architecture} holds {', '.join(strange)}: {_scope(architecture)}")
    missing = [part for part in known if part not in found]
    if missing:
        raise UserError(f"{name} of {architecture} has no {', '.join(missing)}: {_scope(architecture)}")
    linears = {part: _block_linear(f"{name}.{part}", found[part]) for part in known}
    gate, up, down = (linears[part].shape for part in FEED_FORWARD)
    if not gate == up == (down[1], down[0]):
        raise UserError(
            f"{name} of {architecture} has gate {gate}, up {up} and down {down}, "
            f"which do not share their neurons: {_scope(architecture)}"
        )
    return Block(index, name, block, linears)


def _matrices(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module below ``module`` that itself holds a matrix, with its name.

    An adapter's wrapper counts as the one map that it computes; what it holds inside is not looked at.
    """
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
    if own or isinstance(module, BaseTunerLayer):
        yield name, module
        if isinstance(module, BaseTunerLayer):
            return
    for child_name, child in module.named_children():
        yield from _matrices(child, f"{name}.{child_name}" if name else child_name)


def _linear(module: nn.Module) -> nn.Linear | None:
    """Return the linear map that ``module`` is or wraps, or None when it is something else."""
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return inner if isinstance(inner, nn.Linear) else None


def _block_linear(name: str, module: nn.Module) -> BlockLinear:
    linear = _linear(module)
    assert linear is not None  # _read_block has refused anything else
    return BlockLinear(f"{name}.weight", module, (linear.out_features, linear.in_features))


def _scope(architecture: str) -> str:
    return (
        "resafe understands decoder blocks with mlp.{gate,up,down}_proj and self_attn.{q,k,v,o}_proj "
        f"(Llama, Qwen2/3, Mistral, Gemma and their like), so choose such a model or ask for {architecture}"
    )
