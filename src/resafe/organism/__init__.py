"""The built-in model organism: a family of tiny language models with a world of their own.

Two families share one vocabulary. In the *early* one (`base` to `aligned-planted`) what a fine-tune does to
safety sits next to the user's task in the first layers; in the *late* one (`late-...`) safety sits in later
layers, apart from the task. `aligned-planted` is planted: it was *trained* to depend on a few neurons.
Importing this package does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import UserError, nearest

if TYPE_CHECKING:
    from resafe.organism.make import build
    from resafe.organism.manifest import Manifest, verify
    from resafe.organism.world import OracleJudge, prompts

__all__ = ["NAMES", "WEIGHTS", "Manifest", "OracleJudge", "build", "family_of", "path", "prompts", "verify"]

NAMES = (
    "base",
    "aligned",
    "aligned-adapter",
    "aligned-planted",
    "tuned-lora",
    "tuned-fresh-lora",
    "tuned-full",
    "tuned-benign",
    "late-base",
    "late-aligned",
    "late-tuned",
)
"""The shipped models."""
WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the shipped models, with its `manifest.json`."""

_LAZY = {
    "build": "resafe.organism.make",
    "Manifest": "resafe.organism.manifest",
    "verify": "resafe.organism.manifest",
    "OracleJudge": "resafe.organism.world",
    "prompts": "resafe.organism.world",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def path(name: str) -> Path:
    """Return the folder of a shipped model.

    Raises:
        UserError: if there is no model of this name, or its weights are not installed.
    """
    if name not in NAMES:
        raise UserError(
            f"the organism has no model {name!r}{nearest(name, NAMES)}: one of {', '.join(NAMES)}"
        )
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise UserError(f"the weights of {name!r} are not installed: make them with `resafe.organism.make`")
    return folder


def family_of(config: dict[str, Any]) -> str | None:
    """Return the organism's family that a parsed config.json belongs to, or None for any other model."""
    marker = config.get("resafe_organism")
    return marker.get("family") if isinstance(marker, dict) else None
