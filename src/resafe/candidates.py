"""A model in memory on which edits are tried: apply, measure, undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from resafe.evaluate.damage import Reference, kl, reference_logprobs
from resafe.evaluate.judge import Judge
from resafe.evaluate.measure import Measurement, PromptSets, measure
from resafe.model.chat import encode_with_response
from resafe.model.load import LoadedModel, load
from resafe.model.stored import InMemory, catalogue
from resafe.repairing.base import Model
from resafe.repairing.engine import Edit


@dataclass
class TrialModel:
    """The tuned model, merged and in memory, and what its answers were before any edit.

    Attributes:
        loaded: the model.
        judge: reads its answers.
        memory: where its checkpoint's tensors lie in it.
        evaluations: how many times a model was measured; a look at a part of the prompts counts as that part.
    """

    loaded: LoadedModel
    judge: Judge
    memory: InMemory
    evaluations: float = 0.0

    @staticmethod
    def of(model: Model, judge: Judge) -> TrialModel:
        """Load a model with any adapter merged in float32."""
        loaded = load(model.folder, merge=True)
        return TrialModel(loaded, judge, InMemory(loaded, catalogue(model)))

    def measure(self, prompts: PromptSets, whole: PromptSets | None = None) -> Measurement:
        """Measure the model as it is now; ``whole`` is what ``prompts`` are a part of."""
        self.evaluations += 1.0 if whole is None else len(prompts) / len(whole)
        return measure(self.loaded, prompts, self.judge)

    @contextmanager
    def edited(self, edit: Edit, strength: float) -> Iterator[LoadedModel]:
        """Hold the model edited; the tuned weights come back whatever happens inside.

        Raises:
            UserError: the edit names a tensor that the model in memory does not have.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for name in edit.chosen if strength else ():
                    for place, value in self.memory.places(name, edit.weight(name, strength)):
                        kept.append((place, place.detach().clone()))
                        place.copy_(value)
            yield self.loaded
        finally:
            with torch.no_grad():
                for place, before in reversed(kept):  # two names may be of one parameter
                    place.copy_(before)


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
