"""The feed-forward parts of a model: which module holds them, and which slices of which tensors are neurons.

A part is recognised by the names of what a module holds, or, for routed experts, by the layout that the module
itself declares; never by shapes. Shapes are only checked against what the names promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from resafe.errors import UserError

# Gate, up and down of a dense part, as paths below the module that holds it; None for a part without a gate.
# One path for both gate and up is one matrix with the gate's rows above the up rows.
DENSE: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
    ("proj_up_gate", "proj_up", "proj_down"),
    ("input_linear", "input_linear", "output_linear"),
    ("Wi", "Wi", "Wo"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "intermediate.dense", "output.dense"),
    (None, "intermediate", "output"),
    (None, "dense.dense", "output.dense"),
    (None, "lin1", "lin2"),
    (None, "layer_1", "layer_2"),
    (None, "key", "value"),
    (None, "0", "2"),
)
DENSE_BY_CLASS = {"MoshiGatingMLP": ("fc1", "fc1", "fc2")}  # names of a plain part on a gated one

# Modules, by any step of their path, in which there are no feed-forward neurons: attention, other ways to mix
# tokens, routers and gates of whole blocks, what surrounds the residual stream, other senses than text.
_NO_FEED_FORWARD = """
self_attn self_attention self_att attention attn attentions rel_attn multi_head_attention encoder_attn
crossattention cross_attn cross_attn_layers
linear_attn mamba temporal_block mlstm_layer conv attn_sconv mlp_sconv post_attention_convolution
post_mlp_convolution
gate router shared_expert_gate receptance
input_layernorm post_attention_layernorm attn_hc ffn_hc attn_hyper_connection mlp_hyper_connection altup laurel
per_layer_input_gate per_layer_projection altup_projections altup_unembed_projections adapter_modules
patcher vision_model vision_tower visual image_encoder visual_projection embed_tokens_extend
"""
NO_FEED_FORWARD = frozenset(_NO_FEED_FORWARD.split())
# Maps that may stand beside a part, where a mixer can also be a feed-forward block.
_NO_PART = """
mixer conv1d in_proj out_proj x_proj dt_proj q_proj k_proj v_proj o_proj
feed_forward linear pre_expert_proj post_expert_proj
"""
NO_PART = frozenset(_NO_PART.split())

# Types whose entries are the numbers themselves: anything else needs scales beside it.
NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Matrix:
    """The neurons' share of one weight: which slices of which tensor are theirs.

    Attributes:
        weight: the weight's name in the model.
        bias: its bias's name, if it has one.
        module: the module that holds it (the adapter's wrapper, where an adapter changes it).
        attribute: the weight's name inside ``module``.
        axis: the weight's axis along which the neurons lie.
        neurons: where along that axis.
        inputs: whether the neurons are the map's inputs (down) or its outputs (gate, up).
        experts: the number of routed experts; None in a dense part.
        stacked: whether the experts lie one after the other along ``axis``, without an axis of their own.
    """

    weight: str
    bias: str | None
    module: nn.Module
    attribute: str
    axis: int
    neurons: slice
    inputs: bool
    experts: int | None = None
    stacked: bool = False

    @property
    def tensor(self) -> Tensor:
        """The weight as the model computes with it: an adapter's change is in it, packed numbers are unpacked."""
        weight = held(self.module, self.attribute)
        if weight.dtype not in NUMBERS:
            weight = dequantize_module_weight(base(self.module))
        if weight.dtype not in NUMBERS:
            raise UserError(
                f"{self.weight} is stored as {weight.dtype}: load a checkpoint that is not quantised"
            )
        if not isinstance(self.module, BaseTunerLayer) or self.module.merged:
            return weight
        if not isinstance(self.module, LoraLayer) or isinstance(self.module, ParamWrapper):
            raise UserError(
                f"{self.weight} is changed by an adapter whose change cannot be read beside it: "
                "load the model with merge=True"
            )
        for adapter in self.module.active_adapters:
            if adapter in self.module.lora_A:
                weight = weight + self.module.get_delta_weight(adapter)
        return weight

    @property
    def shape(self) -> torch.Size:
        """The weight's shape.

        Raises:
            UserError: it is packed, and lies in the checkpoint in a shape of its own.
        """
        weight = held(self.module, self.attribute)
        if weight.dtype not in NUMBERS:
            raise UserError(
                f"{self.weight} is stored as {weight.dtype}: load a checkpoint that is not quantised"
            )
        return weight.shape

    def vectors(self, of: Tensor | None = None) -> Tensor:
        """Return each neuron's share, float32: (width, hidden), or (experts, width, hidden).

        ``of`` is another tensor laid out like the weight, such as its gradient.
        """
        return self.neurons_last(self.tensor if of is None else of).transpose(-1, -2).float()

    def neurons_last(self, tensor: Tensor) -> Tensor:
        """View a tensor laid out like the weight as (other axis, width), or (experts, other axis, width)."""
        axis = self.axis
        if self.stacked:
            tensor, axis = torch.unflatten(tensor, axis, (self.experts or 1, -1)), axis + 1
        every = [slice(None)] * tensor.ndim
        every[axis] = self.neurons
        if self.experts is not None:
            every[0] = slice(0, self.experts)  # some have rows for experts that compute nothing
        moved: Tensor = torch.movedim(tensor[tuple(every)], axis, -1)
        return moved

    def of_expert(self, expert: int, x: Tensor) -> Tensor:
        """Apply one expert's map to ``x`` (n, in); for gate and up the outputs still lie in the stored order."""
        weight, axis = held(self.module, self.attribute), self.axis
        if self.stacked:
            weight = torch.unflatten(weight, axis, (self.experts or 1, -1))[expert]
        else:
            weight, axis = weight[expert], axis - 1
        name = None if self.bias is None else self.bias.rpartition(".")[2]
        bias = None if name is None else held(self.module, name)[expert]
        out_in = (axis == 0) != self.inputs
        return functional.linear(x, weight if out_in else weight.T, bias)


@dataclass(frozen=True)
class FeedForward:
    """One population of neurons.

    Attributes:
        name: the path of the module that holds it, such as ``model.layers.3.mlp``.
        layer: the index of its block.
        experts: the number of routed experts; None for a dense part.
        width: the number of neurons (of one expert).
        module: the module that holds it, without an adapter's wrapper.
        gate: the gate's weight; None where the part has no gate.
        up: the up projection's weight.
        down: the down projection's weight.
    """

    name: str
    layer: int
    experts: int | None
    width: int
    module: nn.Module
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
class Stored:
    """How routed experts are stored: paths of gate, up and down below their module, and the tensors' layout.

    Attributes:
        gate: the gate's path, the same as ``up`` where one tensor holds both; None without a gate.
        up: the up projection's path.
        down: the down projection's path.
        transposed: (experts, in, out) rather than (experts, out, in).
        interleaved: gate and up rows alternate rather than lie in two halves.
        bias: whether each weight has a bias beside it, named with ``_bias``.
        stacked: experts lie one after the other in a (experts * width, hidden) matrix.
    """

    gate: str | None
    up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    stacked: bool = False


DECLARATION = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
UNDECLARED = {  # classes of experts that declare no layout: read in their code
    "Llama4TextExperts": Stored("gate_up_proj", "gate_up_proj", "down_proj", transposed=True),
    "LongcatFlashExperts": Stored("gate_up_proj", "gate_up_proj", "down_proj"),
    "Step3p7Experts": Stored("gate_up_proj", "gate_up_proj", "down_proj"),
    "JetMoeMoE": Stored("input_linear.weight", "input_linear.weight", "output_linear.weight"),
    "DbrxExperts": Stored("mlp.w1", "mlp.v1", "mlp.w2", stacked=True),
    "InklingSharedExperts": Stored("gate_proj", "up_proj", "down_proj"),
}


def base(module: nn.Module) -> nn.Module:
    """Return the module that an adapter's wrapper wraps, or the module itself."""
    inner: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return inner


def held(module: nn.Module, attribute: str) -> Tensor:
    """Return a weight of a module, below its adapter's wrapper."""
    weight: Tensor = getattr(base(module), attribute)
    return weight


def features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear map."""
    linear = base(module)
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def find_parts(module: nn.Module, name: str, layer: int | None = None) -> Iterator[FeedForward]:
    """Yield the parts at and below ``module``; the layer is the first number in a path."""
    if layer is not None:
        part = read_experts(module, name, layer) or read_dense(module, name, layer)
        if part is not None:
            yield part
    if isinstance(module, BaseTunerLayer):
        return
    for child_name, child in module.named_children():
        if child_name not in NO_FEED_FORWARD:
            inside = int(child_name) if layer is None and child_name.isdecimal() else layer
            yield from find_parts(child, f"{name}.{child_name}" if name else child_name, inside)


def read_dense(module: nn.Module, name: str, layer: int) -> FeedForward | None:
    """Read a dense part whose linear maps ``module`` holds by known names, or return None."""
    known = DENSE_BY_CLASS.get(type(module).__name__)
    for gate, up, down in (known,) if known else DENSE:
        maps = {path: _linear(module, path) for path in (gate, up, down) if path is not None}
        found = {path: linear for path, linear in maps.items() if linear is not None}
        if len(found) < len(maps):
            continue
        width = features(found[down])[0]
        first, second = _halves(width, fused=gate == up)
        for path, linear in found.items():
            if path != down and features(linear)[1] != second.stop:
                raise UserError(
                    f"{name} has {path} of {features(linear)[1]} outputs and {down} of {width} inputs, "
                    "which do not share their neurons: choose another model"
                )
        return FeedForward(
            name,
            layer,
            None,
            width,
            module,
            None if gate is None else _map(f"{name}.{gate}", found[gate], first, inputs=False),
            _map(f"{name}.{up}", found[up], second, inputs=False),
            _map(f"{name}.{down}", found[down], slice(0, width), inputs=True),
        )
    return None


def read_experts(module: nn.Module, name: str, layer: int) -> FeedForward | None:
    """Read routed experts by their declared layout, or by their class where they declare none, or return None."""
    inner = base(module)
    stored = _declared(inner) or UNDECLARED.get(type(inner).__name__)
    if stored is None:
        return None
    down = inner.get_parameter(stored.down)
    if stored.stacked:
        experts = int(vars(inner)["num_experts"])
        width = down.shape[0] // experts
    else:
        experts, width = down.shape[0], down.shape[1 if stored.transposed else 2]
    first, second = _halves(width, fused=stored.gate == stored.up, interleaved=stored.interleaved)
    up_axis, down_axis = (0, 0) if stored.stacked else (2, 1) if stored.transposed else (1, 2)

    def matrix(path: str, axis: int, neurons: slice, inputs: bool) -> Matrix:
        owner, _, attribute = path.rpartition(".")
        return Matrix(
            f"{name}.{path}",
            f"{name}.{path}_bias" if stored.bias else None,
            inner.get_submodule(owner) if owner else module,
            attribute,
            axis,
            neurons,
            inputs,
            experts,
            stored.stacked,
        )

    return FeedForward(
        name,
        layer,
        experts,
        width,
        inner,
        None if stored.gate is None else matrix(stored.gate, up_axis, first, inputs=False),
        matrix(stored.up, up_axis, second, inputs=False),
        matrix(stored.down, down_axis, slice(0, width), inputs=True),
    )


def matrices(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module at or below ``module`` that itself holds a matrix, with its name.

    An adapter's wrapper counts as the one map that it computes; what it holds inside is not looked at.
    """
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
    if own or isinstance(module, BaseTunerLayer):
        yield name, module
        if isinstance(module, BaseTunerLayer):
            return
    for child_name, child in module.named_children():
        yield from matrices(child, f"{name}.{child_name}" if name else child_name)


def _declared(module: nn.Module) -> Stored | None:
    """Return the layout that experts declare of themselves (transformers sets it on each instance)."""
    said = vars(module)
    if not set(DECLARATION) <= said.keys():
        return None
    up = "gate_up_proj" if said["has_gate"] else "up_proj"
    return Stored(
        up if said["has_gate"] else None,
        up,
        "down_proj",
        transposed=bool(said["is_transposed"]),
        interleaved=not said["is_concatenated"],
        bias=bool(said["has_bias"]),
    )


def _halves(width: int, *, fused: bool, interleaved: bool = False) -> tuple[slice, slice]:
    """Return where gate and up lie in their tensors."""
    if fused and interleaved:
        return slice(0, 2 * width, 2), slice(1, 2 * width, 2)
    return slice(0, width), slice(width, 2 * width) if fused else slice(0, width)


def _linear(module: nn.Module, path: str) -> nn.Module | None:
    """Return the linear map at ``path`` below ``module``, in its adapter's wrapper, or None."""
    for step in path.split("."):
        children = dict(module.named_children())
        if step not in children:
            return None
        module = children[step]
    return module if isinstance(base(module), nn.Linear | Conv1D) else None


def _map(name: str, module: nn.Module, neurons: slice, *, inputs: bool) -> Matrix:
    linear = base(module)
    axis = int(isinstance(linear, Conv1D) != inputs)  # Conv1D stores (in, out)
    bias = None if linear.bias is None else f"{name}.bias"
    return Matrix(f"{name}.weight", bias, module, "weight", axis, neurons, inputs)
