"""Tensors between two steps of a method, on disk: what is measured once may be larger than memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor


class Kept:
    """Named tensors, one file each, in a temporary folder (of TMPDIR) that is removed with the object."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="resafe-")
        self._files: dict[str, Path] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, in the place of an earlier one of that name."""
        file = self._files.setdefault(name, Path(self._folder.name) / f"{len(self._files)}.safetensors")
        save_file({"tensor": tensor.contiguous()}, file)

    def get(self, name: str) -> Tensor:
        """Read a tensor."""
        tensor: Tensor = load_file(self._files[name])["tensor"]
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)
