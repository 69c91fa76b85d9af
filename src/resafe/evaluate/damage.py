"""How far an edit moves the model on harmless text: the KL divergence from the tuned model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.model.generate import by_length, check_fits, pad_right, rows_per_batch
from resafe.model.load import LoadedModel


@dataclass(frozen=True)
class Reference:
    """The tuned model's log-probabilities at the first tokens of each response.

    Attributes:
        ids: prompt and first response tokens of each text, cut after the last token that is looked at.
        response_start: where each response begins.
        logprobs: for each text, (looked-at tokens, vocabulary) in float32 on the CPU.
    """

    ids: tuple[tuple[int, ...], ...]
    response_start: tuple[int, ...]
    logprobs: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """The number of response tokens over all texts."""
        return sum(len(row) for row in self.logprobs)


def reference_logprobs(
    loaded: LoadedModel,
    ids: Sequence[Sequence[int]],
    response_start: Sequence[int],
    tokens: int = 8,
    batch_size: int | None = None,
) -> Reference:
    """Store the log-probabilities that ``loaded`` gives at the first ``tokens`` tokens of each response.

    Takes 4 bytes x vocabulary x tokens for each text: 5 MB a text for 150,000 words and 8 tokens.

    Args:
        loaded: the tuned model.
        ids: tokens of prompt and response, as from `resafe.model.chat.encode_with_response`.
        response_start: the position of each response's first token; at least 1.
        tokens: how many tokens of a response are looked at; shorter responses give fewer.
        batch_size: texts in a batch.

    Raises:
        UserError: when there is no text, or a text has no response token.
    """
    if not ids:
        raise UserError("there is no text to measure damage on; give benign prompts with responses")
    for number, (text, start) in enumerate(zip(ids, response_start, strict=True), start=1):
        if not 1 <= start < len(text):
            raise UserError(
                f"prompt {number} has no response to measure damage on; give it one or leave it out"
            )
    cut = tuple(tuple(text[: start + tokens]) for text, start in zip(ids, response_start, strict=True))
    starts = tuple(response_start)
    found: dict[int, Tensor] = {}
    for row, logprobs in _logprobs(loaded, cut, starts, batch_size):
        found[row] = logprobs.cpu()
    return Reference(cut, starts, tuple(found[row] for row in range(len(cut))))


def kl(loaded: LoadedModel, reference: Reference, batch_size: int | None = None) -> float:
    """Return the mean of KL(tuned || model) over the looked-at tokens, in nats per token.

    KL(P || Q) = sum over v of P(v)·(log P(v) - log Q(v)), summed in float64. A model that gives no
    numbers at all is infinitely far away.

    Raises:
        UserError: when the model's vocabulary is not the reference's.
    """
    total = 0.0
    for row, found in _logprobs(loaded, reference.ids, reference.response_start, batch_size):
        tuned = reference.logprobs[row].to(found.device)  # (tokens, vocabulary)
        if tuned.shape != found.shape:
            raise UserError(
                f"{loaded.source} has a vocabulary of {found.shape[-1]} and the tuned model one of "
                f"{tuned.shape[-1]}; damage can be measured only between models with one vocabulary"
            )
        # A token that the tuned model excludes adds nothing, whatever the other gives it: 0·log 0 = 0.
        terms = torch.where(tuned > -torch.inf, tuned.exp() * (tuned - found), 0.0)
        total += float(terms.cpu().double().sum())
    mean = total / reference.tokens
    if math.isnan(mean):
        return math.inf
    return max(0.0, mean)  # a model against itself may come out at -1e-9 by rounding


@torch.no_grad()
def _logprobs(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], starts: Sequence[int], batch_size: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (text number, log-probabilities of its response tokens: (tokens, vocabulary), float32)."""
    check_fits(loaded, ids)
    for chunk in by_length([len(row) for row in ids], rows_per_batch(loaded, batch_size)):
        first = min(starts[row] for row in chunk) - 1  # the position before a token predicts it
        last = max(len(ids[row]) for row in chunk) - 1
        tokens, attention, _ = pad_right(loaded, [ids[row] for row in chunk], [starts[row] for row in chunk])
        kept = torch.arange(first, last, device=loaded.device)
        logits = loaded.model(
            input_ids=tokens, attention_mask=attention, logits_to_keep=kept, use_cache=False
        ).logits
        for place, row in enumerate(chunk):
            wanted = logits[place, starts[row] - 1 - first : len(ids[row]) - 1 - first]
            yield row, wanted.float().log_softmax(-1)
