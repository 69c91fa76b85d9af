"""Routed experts with their inside in view: one expert after the other, from the layout that they declare.

transformers computes all experts of a block in one fused call, where no hook can look. While something is to be
seen or changed, that call is replaced by a plain loop over the experts, and put back afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from resafe.model.parts import UNDECLARED, FeedForward

Where = Literal["input", "gate", "up", "ffn"]
See = Callable[[Where, Tensor, int, Tensor], Tensor | None]
"""Called with (where, values (n, features), expert, tokens (n,)); what it returns at ``ffn`` is computed with."""


class Declared(Protocol):
    """What transformers' experts of a declared layout have."""

    config: PreTrainedConfig
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


_OPEN: dict[nn.Module, tuple[FeedForward, list[See]]] = {}
_NAME = "resafe"


@contextmanager
def opened(part: FeedForward, see: See) -> Iterator[None]:
    """Show ``see`` what happens inside the experts of ``part`` on every forward pass."""
    module = part.module
    _, watchers = _OPEN.setdefault(module, (part, []))
    watchers.append(see)
    try:
        with _replaced(part):
            yield
    finally:
        watchers.remove(see)
        if not watchers:
            del _OPEN[module]


@contextmanager
def _replaced(part: FeedForward) -> Iterator[None]:
    """Put the loop in the place of the experts' own computation."""
    kind, module = type(part.module).__name__, part.module
    if kind in UNDECLARED:
        before = vars(module).get("forward")
        vars(module)["forward"] = partial(_LOOPS[kind], module)
        try:
            yield
        finally:
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
        return
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _declared)
    config = cast(Declared, module).config
    chosen = config._experts_implementation
    config._experts_implementation = _NAME
    try:
        yield
    finally:
        config._experts_implementation = chosen


def _inside(
    module: nn.Module, expert: int, tokens: Tensor, x: Tensor, activate: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return one expert's output for the tokens routed to it, (n, hidden), letting the watchers see.

    ``activate`` makes neurons (n, width) of the outputs of gate and up as they are stored.
    """
    part, watchers = _OPEN[module]

    def show(where: Where, values: Tensor) -> Tensor:
        for see in watchers:
            changed = see(where, values, expert, tokens)
            if changed is not None and where == "ffn":
                values = changed
        return values

    show("input", x)
    up = part.up.of_expert(expert, x)
    gate = up
    if part.gate is not None:
        gate = up if part.gate.weight == part.up.weight else part.gate.of_expert(expert, x)
        show("gate", gate[:, part.gate.neurons])
    show("up", up[:, part.up.neurons])
    return part.down.of_expert(expert, show("ffn", activate(gate, up)))


def _loop(
    module: nn.Module,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    activate: Callable[[Tensor, Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add up the experts with neurons: hidden (tokens, hidden), index and weights (tokens, top k).

    A number beyond them stands for an expert without neurons, or for another machine's.
    """
    out = torch.zeros_like(hidden)
    order = index.flatten().argsort(stable=True)  # expert by expert, each one's tokens in order
    counts = index.flatten().bincount(minlength=_count(module)).tolist()
    for expert, chosen in enumerate(torch.split(order, counts)[: _count(module)]):
        if len(chosen):
            token = chosen // index.shape[1]
            y = _inside(module, expert, token, hidden[token], activate)
            y = y if norm is None else norm(y)
            out = out.index_add(0, token, (y * weights.flatten()[chosen, None]).to(out.dtype))
    return out


def _declared(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute experts of a declared layout."""
    if module not in _OPEN:  # a neighbour's config is this one's too
        own: Callable[..., Tensor] = inspect.unwrap(type(module).forward)
        return own(module, hidden, index, weights)
    experts = cast(Declared, module)

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)

    norm = experts.post_expert_norm if experts.has_post_expert_norm else None
    return _loop(module, hidden, index, weights, activate, norm)


def _step3p7(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Step 3.7 clamps in a gate of its own."""
    experts = cast(Declared, module)
    return _loop(module, hidden, index, weights, lambda gate, up: experts._apply_gate(up))


def _count(module: nn.Module) -> int:
    """Return the number of experts with neurons."""
    return _OPEN[module][0].shape[0]


def _gated(module: nn.Module, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``act(gate) * up`` for tensors that hold gate and up by themselves or in two halves."""
    part, _ = _OPEN[module]

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        assert part.gate is not None
        act: Callable[[Tensor], Tensor] = attrgetter(name)(module)
        return act(gate[:, part.gate.neurons]) * up[:, part.up.neurons]

    return activate


def _llama4(module: nn.Module, hidden: Tensor) -> Tensor:
    """Llama 4 gives every expert every token, with zeros for those that are not routed to it."""
    rows = hidden.view(_count(module), -1, hidden.shape[-1])  # (experts, tokens, hidden)
    out = torch.zeros_like(rows)
    for expert in range(len(rows)):
        (token,) = torch.where(rows[expert].any(-1))
        y = _inside(module, expert, token, rows[expert, token], _gated(module, "act_fn"))
        out = out.index_put((torch.tensor(expert, device=token.device), token), y)
    return out.reshape(hidden.shape)


def _longcat(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Some of LongCat's experts have no neurons and pass their tokens on as they are."""
    passed = weights.masked_fill(index < _count(module), 0).sum(-1, keepdim=True)  # (tokens, 1)
    out = _loop(module, hidden, index, weights, _gated(module, "act_fn"))
    return out + (hidden * passed).to(out.dtype)


def _jetmoe(module: nn.Module, hidden: Tensor) -> Tensor:
    """JetMoE routes inside the module, to experts one after the other; a bias is common to all of them."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, tokens, weights, sizes, _ = module.get_submodule("router")(flat)
    out = torch.zeros_like(flat)
    for expert, (token, weight) in enumerate(zip(tokens.split(sizes), weights.split(sizes), strict=True)):
        y = _inside(module, expert, token, flat[token], _gated(module, "activation"))
        out = out.index_add(0, token, y * weight[:, None])
    return out.view(hidden.shape) + module.get_parameter("bias")


def _dbrx(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """DBRX does not flatten its tokens."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _loop(module, flat, index, weights, _gated(module, "mlp.activation_fn")).view(hidden.shape)


def _inkling_shared(module: nn.Module, hidden: Tensor, gammas: Tensor) -> Tensor:
    """Inkling's shared experts see every token; a factor for each token and expert multiplies the neurons."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    factors = gammas.reshape(len(flat), -1)  # (tokens, experts)
    everyone = torch.arange(len(flat), device=flat.device)
    plain = _gated(module, "act_fn")
    out = torch.zeros_like(flat, dtype=torch.float32)
    for expert in range(_count(module)):
        factor = factors[:, expert, None]

        def activate(gate: Tensor, up: Tensor, factor: Tensor = factor) -> Tensor:
            return plain(gate, up) * factor

        out = out + _inside(module, expert, everyone, flat, activate).float()
    return out.to(hidden.dtype).view(hidden.shape)


_LOOPS: dict[str, Callable[..., Tensor]] = {
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": _step3p7,
    "JetMoeMoE": _jetmoe,
    "DbrxExperts": _dbrx,
    "InklingSharedExperts": _inkling_shared,
}
