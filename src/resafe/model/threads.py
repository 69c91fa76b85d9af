"""How many threads a model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resafe.errors import UserError
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint

_TINY = 20_000_000  # parameters


@contextmanager
def threads_for(model: Checkpoint | Adapter) -> Iterator[None]:
    """Use one thread for a tiny model: splitting its products costs more than it saves.

    Measured on two idle cores: 800 answers of the organism take 1.2 s with one thread and 2.0 s with two.
    """
    try:
        size = (model.base if isinstance(model, Adapter) else model).parameters
    except UserError:  # an adapter whose base is elsewhere: nothing will be run
        size = _TINY
    threads = torch.get_num_threads()
    try:
        if size < _TINY:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
