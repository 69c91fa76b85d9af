"""Look at and change a running model's activations; every change is a context manager that undoes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from resafe.errors import UserError, nearest
from resafe.model.layout import Layout, read_layout

Callback = Callable[[Tensor], None]
"""Called with an activation (batch, sequence, features) on the model's device, with its gradient history."""
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A place to look at: the input or output of a linear map, or what a block leaves in the residual stream.

    Attributes:
        where: which tensor.
        name: the checkpoint's weight name for ``input`` and ``output``; empty for ``block``.
        layer: the layer's index for ``block``; -1 otherwise.
    """

    where: Literal["input", "output", "block"]
    name: str = ""
    layer: int = -1


def input_of(name: str) -> Site:
    """Name the input of the linear map whose checkpoint weight name is ``name``."""
    return Site("input", name=name)


def output_of(name: str) -> Site:
    """Name the output of the linear map whose checkpoint weight name is ``name``."""
    return Site("output", name=name)


def block_output(layer: int) -> Site:
    """Name the residual stream after block ``layer``."""
    return Site("block", layer=layer)


@dataclass
class Recorder:
    """Counts what was seen, so that a site which never ran cannot pass unnoticed."""

    calls: dict[Site, int] = field(default_factory=dict)

    @property
    def silent(self) -> tuple[Site, ...]:
        """The sites that were never called."""
        return tuple(site for site, count in self.calls.items() if count == 0)


@contextmanager
def capture(model: PreTrainedModel | PeftModel, sites: Mapping[Site, Callback]) -> Iterator[Recorder]:
    """Call ``sites[site]`` with the activation at each site on every forward pass; nothing is stored.

    Raises:
        UserError: when a site names a weight or layer that the model does not have.
    """
    layout = read_layout(model)
    recorder = Recorder({site: 0 for site in sites})
    targets = [(_find(layout, site), site, callback) for site, callback in sites.items()]
    handles: list[RemovableHandle] = []
    try:
        for module, site, callback in targets:
            handles.append(_observe(module, site, callback, recorder))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silence(model: PreTrainedModel | PeftModel, neurons: Mapping[int, Tensor]) -> Iterator[None]:
    """Hold the activation of ``neurons[layer]`` (indices) at zero, as if their columns of down were zero."""
    layout = read_layout(model)
    edits: dict[int, Edit] = {}
    for layer, index in neurons.items():
        chosen = _indices(layout, layer, index)
        edits[layer] = partial(_zero, chosen)
    with _edit_neurons(layout, edits):
        yield


@contextmanager
def scale(
    model: PreTrainedModel | PeftModel, factors: Mapping[int, tuple[Tensor, Tensor | float]]
) -> Iterator[None]:
    """Multiply neurons' activations: ``factors[layer]`` is (indices, one factor or one for each index)."""
    layout = read_layout(model)
    edits: dict[int, Edit] = {}
    for layer, (index, factor) in factors.items():
        chosen = _indices(layout, layer, index)
        row = torch.ones(layout[layer].width)  # (width,)
        row[chosen] = _for_each(factor, chosen, layer)
        edits[layer] = partial(_times, row)
    with _edit_neurons(layout, edits):
        yield


@contextmanager
def patch(
    model: PreTrainedModel | PeftModel, values: Mapping[int, tuple[Tensor, Tensor | float]]
) -> Iterator[None]:
    """Replace neurons' activations: ``values[layer]`` is (indices, values).

    The values are one number, one for each index, or (batch, sequence, indices), and are broadcast.
    """
    layout = read_layout(model)
    edits: dict[int, Edit] = {}
    for layer, (index, value) in values.items():
        chosen = _indices(layout, layer, index)
        new = torch.as_tensor(value)
        if new.ndim > 0 and new.shape[-1] not in (1, len(chosen)):
            raise ValueError(f"layer {layer}: {new.shape[-1]} values for {len(chosen)} neurons")
        edits[layer] = partial(_replace, chosen, new)
    with _edit_neurons(layout, edits):
        yield


@contextmanager
def _edit_neurons(layout: Layout, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Pass the input of down_proj through ``edits[layer]``."""
    handles: list[RemovableHandle] = []
    try:
        for layer, edit in edits.items():
            handles.append(layout[layer].down.module.register_forward_pre_hook(_pre_hook(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pre_hook(edit: Edit) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    return hook


def _zero(index: Tensor, hidden: Tensor) -> Tensor:
    return hidden.index_fill(-1, index.to(hidden.device), 0)


def _times(row: Tensor, hidden: Tensor) -> Tensor:
    return hidden * row.to(hidden)


def _replace(index: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    changed = hidden.clone()
    changed[..., index.to(hidden.device)] = value.to(hidden)
    return changed


def _for_each(factor: Tensor | float, index: Tensor, layer: int) -> Tensor:
    factors = torch.as_tensor(factor, dtype=torch.float32)
    if factors.ndim > 1 or (factors.ndim == 1 and len(factors) != len(index)):
        raise ValueError(f"layer {layer}: factors of shape {tuple(factors.shape)} for {len(index)} neurons")
    return factors.cpu()


def _indices(layout: Layout, layer: int, index: Tensor) -> Tensor:
    """Check neuron indices of one layer and return them as a flat int64 tensor on the CPU."""
    width = layout[layer].width
    flat = torch.as_tensor(index).cpu()
    if flat.ndim != 1 or (len(flat) and (flat.is_floating_point() or flat.dtype == torch.bool)):
        raise ValueError(f"layer {layer}: neurons must be a flat tensor of integer indices")
    outside = [neuron for neuron in flat.tolist() if not 0 <= neuron < width]
    if outside:
        raise UserError(
            f"layer {layer} of {layout.architecture} has neurons 0 to {width - 1}, not {outside[0]}: "
            "was the neuron set made for another model?"
        )
    if len(set(flat.tolist())) != len(flat):
        raise ValueError(f"layer {layer}: a neuron is named twice")
    return flat.long()


def _find(layout: Layout, site: Site) -> nn.Module:
    if site.where == "block":
        return layout[site.layer].module
    linears = layout.linears
    if site.name not in linears:
        raise UserError(
            f"{layout.architecture} has no block matrix {site.name!r}{nearest(site.name, linears)}; "
            "names are the checkpoint's, such as 'model.layers.0.mlp.down_proj.weight'"
        )
    return linears[site.name].module


def _observe(module: nn.Module, site: Site, callback: Callback, recorder: Recorder) -> RemovableHandle:
    def seen(value: Tensor) -> None:
        recorder.calls[site] += 1
        callback(value)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen(args[0])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen(output[0] if isinstance(output, tuple) else output)

    if site.where == "input":
        return module.register_forward_pre_hook(before)
    return module.register_forward_hook(after)
