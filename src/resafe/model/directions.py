"""Directions of the residual stream: take one out of it, add one to it, or take it out of the weights.

With r̂ = r / ‖r‖: ``x <- x - (x·r̂) r̂`` (Arditi et al., https://arxiv.org/abs/2406.11717).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resafe.errors import UserError
from resafe.model.hooks import _before
from resafe.model.layout import Block, plain, read_layout
from resafe.model.parts import base

# Names of what mixes tokens in a block, and of the map through which that writes.
MIXERS = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mixer", "mamba", "conv")
MIXER_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin")
# Norms between a part's output and the residual stream. One of a pair alone is another thing: Llama's
# post_attention_layernorm is the norm before its feed-forward network.
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
    ("post_norm1", "post_norm2"),
)
THIRD = "post_per_layer_input_norm"  # Gemma 4 adds something of its own per layer
_LEFT = 1e-3  # of a residual vector's length: what rounding may leave along the direction

Undo = Callable[[], None]


@contextmanager
def ablate_direction(model: PreTrainedModel | PeftModel, direction: Tensor) -> Iterator[None]:
    """Take a direction out of what enters every block and of what its parts add to the residual stream.

    Where a norm lies between a part and the residual stream, the norm's output is what is added.

    Args:
        model: the model.
        direction: (hidden,), of any length but zero.

    Raises:
        UserError: the direction is zero; or, on the first pass, a block still writes along the direction,
            in a way that is not known.
    """
    unit = _unit(direction)
    take = partial(_without, unit)
    with ExitStack() as stack:
        for block in read_layout(model):
            stack.callback(_before(block.module, take).remove)
            for writer in _writers(block):
                stack.callback(_change_output(writer, take).remove)
        stack.enter_context(_checked(model, unit))
        yield


@contextmanager
def add_direction(
    model: PreTrainedModel | PeftModel, direction: Tensor, layer: int, coefficient: float = 1.0
) -> Iterator[None]:
    """Add ``coefficient · direction`` (hidden,) to what enters one block, at every token."""
    step = coefficient * direction
    handle = _before(read_layout(model)[layer].module, lambda x: x + step.to(x))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def orthogonalize(model: PreTrainedModel | PeftModel, direction: Tensor) -> Undo:
    """Take a direction out of the weights that write to the residual stream, in memory.

    ``W <- W - r̂ r̂ᵀ W`` for the embeddings, the attention's output maps and every down projection, and the same
    for their biases. It does what `ablate_direction` does, but where embeddings are tied: there the
    head reads from the changed tensor too.

    Args:
        model: the model, without an adapter beside it.
        direction: (hidden,).

    Returns:
        What brings the old weights back, bit by bit; it holds copies of them.

    Raises:
        UserError: the model's weights cannot be made orthogonal: an adapter computes beside them, or a norm
            lies between them and the residual stream.
    """
    if isinstance(model, PeftModel):
        raise UserError("an adapter beside the weights cannot be made orthogonal; load with merge=True")
    unit, kept = _unit(direction), list[tuple[Tensor, Tensor]]()

    def undo() -> None:
        with torch.no_grad():
            for weight, old in kept:
                weight.copy_(old)

    for weight, axis in _writing(model, len(unit)):
        kept.append((weight, weight.detach().clone()))
        weight.copy_(_without(unit, weight.movedim(axis, -1)).movedim(-1, axis))
    try:
        with _checked(model, unit):
            model(input_ids=torch.arange(8, device=model.device)[None], use_cache=False)
    except UserError:
        undo()
        raise
    return undo


def _writing(model: PreTrainedModel, hidden: int) -> Iterator[tuple[Tensor, int]]:
    """Yield every tensor that writes to the residual stream once, with its axis of that."""
    layout, seen = read_layout(model), set[int]()
    inside = {id(m) for block in layout for m in block.module.modules()}
    found: list[tuple[Tensor, int]] = [
        (module.weight, 1)
        for module in plain(model).get_decoder().modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == hidden and id(module) not in inside
    ]
    for block in layout:
        for module in _mixer_outputs(block):
            found += _matrix_and_bias(module, "weight", 0 if isinstance(module, nn.Linear) else 1)
        for part in block.parts:
            down = part.down
            weight = base(down.module).get_parameter(down.attribute)
            found += _matrix_and_bias(base(down.module), down.attribute, 2 * weight.ndim - 3 - down.axis)
    for tensor, axis in found:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor, axis


def _matrix_and_bias(module: nn.Module, attribute: str, axis: int) -> list[tuple[Tensor, int]]:
    own = dict(module.named_parameters(recurse=False))
    bias = own.get("bias" if attribute == "weight" else f"{attribute}_bias")
    return [(own[attribute], axis), *([] if bias is None else [(bias, -1)])]


def _mixer_outputs(block: Block) -> Iterator[nn.Module]:
    for name, mixer in block.module.named_children():
        if name in MIXERS:
            for path, module in mixer.named_modules():
                if path.rpartition(".")[2] in MIXER_OUTPUTS and isinstance(module, nn.Linear | Conv1D):
                    yield module


def _writers(block: Block) -> list[nn.Module]:
    """Return the modules whose outputs a block adds to the residual stream."""
    children = dict(block.module.named_children())
    for pair in POST_NORMS:
        if all(name in children for name in pair):
            return [children[name] for name in (*pair, THIRD) if name in children]
    writers = [child for name, child in children.items() if name in MIXERS]
    for part in block.parts:
        step = part.name.removeprefix(block.name).strip(".").partition(".")[0]
        writers.append(children[step] if step else part.down.module)
    return list(dict.fromkeys(writers))


@contextmanager
def _checked(model: PreTrainedModel | PeftModel, unit: Tensor) -> Iterator[None]:
    """Look once at what each block leaves, and refuse what still lies along the direction."""
    handles: dict[int, RemovableHandle] = {}

    def check(block: Block, left: Tensor) -> Tensor:
        handles.pop(block.index).remove()
        x = left.float()
        along = (x @ unit.to(x)).abs().max()
        bound = max(_LEFT, 8 * torch.finfo(left.dtype).eps)
        if along > bound * torch.linalg.vector_norm(x, dim=-1).max():
            raise UserError(
                f"{block.name} of {block.architecture} still writes along the direction, through a part or a "
                "norm that resafe does not know; choose another model, or a hook instead of its weights"
            )
        return left

    for block in read_layout(model):
        handles[block.index] = _change_output(block.module, partial(check, block))
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def _change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass the (first) output of a module through ``change``."""

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def _unit(direction: Tensor) -> Tensor:
    length = float(direction.double().norm())
    if length == 0.0:
        raise UserError("the direction is zero, so it cannot be taken out of anything; choose another one")
    return direction.double() / (length + 1e-8)  # the published code's epsilon


def _without(unit: Tensor, x: Tensor) -> Tensor:
    """Return ``x - (x·r̂) r̂`` over the last axis, computed in float32."""
    if x.shape[-1] != len(unit):
        raise UserError(
            f"the direction has {len(unit)} numbers and what a block reads or writes {x.shape[-1]}; "
            "is it a direction of this model, and has that one residual stream?"
        )
    wide = x.float()
    r = unit.to(wide)
    return (wide - (wide @ r)[..., None] * r).to(x.dtype)
