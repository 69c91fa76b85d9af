"""A model in memory on which edits are tried: apply, measure, undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.evaluate.damage import Reference, kl, reference_logprobs
from resafe.evaluate.judge import Judge
from resafe.evaluate.measure import Measurement, PromptSets, measure
from resafe.model.chat import encode_with_response
from resafe.model.load import LoadedModel, load
from resafe.repairing.base import Model
from resafe.repairing.engine import Edit


@dataclass
class TrialModel:
    """The tuned model, merged and in memory, and what its answers were before any edit.

    Attributes:
        loaded: the model.
        judge: reads its answers.
        evaluations: how many times a model was measured.
    """

    loaded: LoadedModel
    judge: Judge
    evaluations: int = 0
    _tensors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, judge: Judge) -> TrialModel:
        """Load a model with any adapter merged in float32."""
        loaded = load(model.folder, merge=True)
        return TrialModel(loaded, judge, 0, dict(loaded.model.state_dict(keep_vars=True)))

    def measure(self, prompts: PromptSets) -> Measurement:
        """Measure the model as it is now."""
        self.evaluations += 1
        return measure(self.loaded, prompts, self.judge)

    @contextmanager
    def edited(self, edit: Edit, strength: float) -> Iterator[LoadedModel]:
        """Hold the model edited; the tuned weights come back whatever happens inside.

        Raises:
            UserError: the edit names a tensor that the model in memory does not have.
        """
        kept: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name in edit.chosen if strength else ():
                    if name not in self._tensors:
                        raise UserError(
                            f"the model in memory has no tensor {name!r}, which {edit.method.name} edits"
                        )
                    kept[name] = self._tensors[name].detach().clone()
                    self._tensors[name].copy_(edit.weight(name, strength))
            yield self.loaded
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self._tensors[name].copy_(tensor)


def own_answers(trial: TrialModel, prompts: PromptSets, measured: Measurement) -> Reference | None:
    """Keep the tuned model's word probabilities on its own answers to benign prompts, for the damage."""
    pairs = [(p, t) for p, t in zip(prompts.benign, measured.answers.benign.texts, strict=True) if t.strip()]
    if not pairs:
        return None
    ids, starts = encode_with_response(trial.loaded.tokenizer, [p for p, _ in pairs], [t for _, t in pairs])
    return reference_logprobs(trial.loaded, ids, starts)


def damage(trial: TrialModel, reference: Reference | None) -> float | None:
    """Return KL(tuned || model as it is now), in nats per token of the tuned model's benign answers."""
    return None if reference is None else kl(trial.loaded, reference)
