"""Neuron sets: which neurons were chosen, at which site, of which model; a value type with set algebra."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resafe.errors import UserError

FORMAT = "resafe neuron set 1"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Site(StrEnum):
    """Where a neuron is looked at."""

    FFN = "ffn"
    GATE = "gate"
    UP = "up"
    ROW = "row"
    ENTRY = "entry"


@dataclass(frozen=True)
class NeuronSet:
    """Chosen neurons, as one boolean mask per tensor.

    Attributes:
        site: what one entry of a mask stands for (a row of a matrix, an entry of a LoRA factor, ...).
        masks: tensor name -> bool tensor; shape (out,) at site ``row``, the tensor's own at ``entry``.
        method: name of the method that chose them.
        model: fingerprint of the model they were found in.
        parameters: the method's parameters.
    """

    site: Site
    masks: Mapping[str, Tensor]
    method: str
    model: str
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """Number of neurons that could have been chosen."""
        return sum(mask.numel() for mask in self.masks.values())

    def _combine(self, other: NeuronSet, rule: Callable[[Tensor, Tensor], Tensor]) -> NeuronSet:
        if self.site != other.site or self.model != other.model:
            raise UserError("these neuron sets belong to different models or sites; locate both on one model")
        names = dict.fromkeys([*self.masks, *other.masks])
        masks = {}
        for name in names:
            mine, theirs = self.masks.get(name), other.masks.get(name)
            zero = torch.zeros_like(next(m for m in (mine, theirs) if m is not None))
            masks[name] = rule(zero if mine is None else mine, zero if theirs is None else theirs)
        return NeuronSet(self.site, masks, f"{self.method},{other.method}", self.model)

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def jaccard(self, other: NeuronSet) -> float:
        """Return ``|A ∩ B| / |A ∪ B|``, and 1.0 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def per_layer(self) -> dict[int, int]:
        """Number of chosen neurons per decoder layer."""
        counts: dict[int, int] = {}
        for name, mask in self.masks.items():
            layer = layer_of(name)
            counts[layer] = counts.get(layer, 0) + int(mask.sum())
        return dict(sorted(counts.items()))

    def random_like(self, seed: int) -> NeuronSet:
        """Return as many neurons per tensor, drawn at random."""
        masks = {name: shuffled(mask, seed, name) for name, mask in self.masks.items()}
        return NeuronSet(self.site, masks, f"random like {self.method}", self.model, {"seed": seed})

    def save(self, file: Path) -> None:
        """Write the set as safetensors: eight neurons a byte, shapes and provenance in the metadata."""
        from safetensors.torch import save

        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        packed = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))
            for name, mask in self.masks.items()
        }
        metadata = {
            "resafe": FORMAT,
            "kind": "neuron set",
            "site": self.site.value,
            "method": self.method,
            "model": self.model,
            "parameters": json.dumps(dict(self.parameters), sort_keys=True),
            "shapes": json.dumps(shapes),
        }
        file.write_bytes(_ordered(save(packed, metadata=metadata)))

    @staticmethod
    def load(file: Path) -> NeuronSet:
        """Read a set.

        Raises:
            UserError: the file is missing, or is no neuron set.
        """
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise UserError(f"{file} does not exist; give a neuron set that resafe saved")
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = stream.metadata() or {}
                packed = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file: {error}") from error
        if metadata.get("resafe") != FORMAT:
            raise UserError(f"{file} is not a resafe neuron set; give one that `resafe` saved")
        try:
            shapes = json.loads(metadata["shapes"])
            return NeuronSet(
                Site(metadata["site"]),
                {name: _unpacked(packed.pop(name), shape) for name, shape in shapes.items()},
                metadata["method"],
                metadata["model"],
                dict(json.loads(metadata["parameters"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is a damaged neuron set ({error}); find the neurons again") from error


def _ordered(data: bytes) -> bytes:
    """Sort the header of a safetensors file: its writer puts the metadata in another order every time."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    sound = packed.dtype is torch.uint8 and packed.shape == ((count + 7) // 8,)
    if not sound or any(side < 0 for side in shape):
        raise ValueError(f"{packed.numel()} bytes do not hold a mask of shape {shape}")
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def layer_of(name: str) -> int:
    """Return the decoder layer in a tensor's name, or -1 for a tensor outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def expert_of(name: str) -> int | None:
    """Return the expert in a tensor's name, or None."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def shuffled(mask: Tensor, seed: int, name: str) -> Tensor:
    """Return a mask of the same shape and count whose entries are drawn at random, seeded by name."""
    # The CPU generator takes 32 bits of seed, so seed and name are mixed into as many.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    order = torch.randperm(mask.numel(), generator=generator)
    return mask.reshape(-1)[order].reshape(mask.shape)
