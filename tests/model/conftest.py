from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved model of each family, and `adapter`, a LoRA adapter over `llama`."""
    root = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.save_dense(root / family, family)
    tiny.save_adapter(root / "adapter", root / "llama")
    return root
