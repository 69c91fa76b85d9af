"""Neurons that are known to matter: activations raised on harmful prompts only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resafe.locating.observe import Bench, Text
from resafe.model.hooks import Seen, _tapped


def pick(one: Bench, share: float = 0.04, seed: int = 0) -> dict[str, Tensor]:
    """Return masks of a few random neurons of every part."""
    generator = torch.Generator().manual_seed(seed)
    return {p.name: torch.rand(p.shape, generator=generator) < share for p in one.layout.parts}


@contextmanager
def raised(one: Bench, rows: Sequence[Text], masks: Mapping[str, Tensor], by: float = 40.0) -> Iterator[None]:
    """Add a constant to the masked neurons on harmful texts, known by their first tokens, and on no other.

    What the neurons write is cut off first, so that no other neuron changes.
    """
    ids: list[Tensor] = []
    known = {text.ids[:3] for text in rows if text.group == "harmful"}
    handle = one.loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )

    def add(seen: Seen) -> Tensor:
        harmful = torch.tensor([float(tuple(row) in known) for row in ids[-1][:, :3].tolist()])  # (batch,)
        mask = masks[seen.part.name].float()
        if seen.expert is None:
            return seen.values + by * harmful[:, None, None] * mask
        assert seen.tokens is not None
        return seen.values + by * harmful[seen.tokens // ids[-1].shape[1]][:, None] * mask[seen.expert]

    saved: dict[nn.Parameter, Tensor] = {}
    for part in one.layout.parts:
        weight = part.down.tensor
        assert isinstance(weight, nn.Parameter)
        saved[weight] = weight.clone()
        columns = torch.movedim(weight, part.down.axis, -2)  # (width, hidden), or (experts, width, hidden)
        columns[masks[part.name]] = 0
    try:
        with _tapped(one.layout, [(part, "ffn", add) for part in one.layout.parts]):
            yield
    finally:
        handle.remove()
        for weight, value in saved.items():
            weight.copy_(value)
