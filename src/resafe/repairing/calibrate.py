"""Runs of a model over calibration prompts: what methods need to know about activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.evaluate.judge import Judge, Verdict
from resafe.evaluate.measure import new_tokens
from resafe.evaluate.prompts import Prompt
from resafe.locating.lowrank import Calibration, Source, accumulate
from resafe.model.chat import encode, encode_with_response
from resafe.model.generate import generate
from resafe.model.load import LoadedModel

_NEW_TOKENS = 64


def with_responses(loaded: LoadedModel, prompts: Sequence[Prompt], judge: Judge | None) -> Calibration:
    """Pair prompts with the responses they carry, or else with the model's own refusals.

    Raises:
        UserError: the model refuses none of the prompts, so that there is nothing to calibrate on.
    """
    if all(prompt.response for prompt in prompts):
        return Calibration(
            *encode_with_response(loaded.tokenizer, prompts, [p.response or "" for p in prompts])
        )
    if judge is None:
        raise UserError(
            "prompts without responses need a judge to tell refusals; give prompts with responses"
        )
    answers = [answer.text for answer in generate(loaded, prompts, _NEW_TOKENS)]
    kept = [
        (prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if judge.judge(prompt.prompt, answer) is Verdict.REFUSED
    ]
    if not kept:
        raise UserError(
            f"{loaded.source} refuses none of {len(prompts)} harmful prompts, so it cannot serve as the reference; "
            "give another --aligned, or prompts with responses"
        )
    return Calibration(*encode_with_response(loaded.tokenizer, [k[0] for k in kept], [k[1] for k in kept]))


def harmful_answers(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    judge: Judge | None,
    answers: Literal["own", "given"],
) -> Calibration:
    """Pair harmful prompts with harmful answers: the responses they carry, or the model's own that do not refuse.

    Raises:
        UserError: a prompt carries no response, or the model refuses all of them.
    """
    if answers == "given":
        given = [prompt.response for prompt in prompts if prompt.response]
        if len(given) < len(prompts):
            raise UserError(
                f"{len(prompts) - len(given)} of {len(prompts)} harmful prompts carry no response; "
                "give harmful answers with them, or answers=own"
            )
        return Calibration(*encode_with_response(loaded.tokenizer, prompts, given))
    if judge is None:
        raise UserError("the model's own answers need a judge to tell refusals; give answers=given")
    said = [answer.text for answer in generate(loaded, prompts, new_tokens(loaded, prompts, _NEW_TOKENS))]
    kept = [
        (prompt, answer)
        for prompt, answer in zip(prompts, said, strict=True)
        if answer.strip() and judge.judge(prompt.prompt, answer) is Verdict.ANSWERED
    ]
    if not kept:
        raise UserError(
            f"{loaded.source} answers none of {len(prompts)} harmful prompts, so there is no harmful answer to learn "
            "from; give some with the prompts, and answers=given"
        )
    return Calibration(*encode_with_response(loaded.tokenizer, [k[0] for k in kept], [k[1] for k in kept]))


def prompts_only(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Calibration:
    """Encode prompts alone; every token of them counts."""
    ids = encode(loaded.tokenizer, prompts)
    return Calibration(ids, [0] * len(ids))


def input_norms(loaded: LoadedModel, text: Calibration, names: Iterable[str]) -> dict[str, Tensor]:
    """Return ``sqrt(Σ_tokens x_j² / n_texts)`` of each matrix's inputs, float32 (in,), as Wanda uses it."""
    sums: dict[str, Tensor] = {}

    def see(source: Source, x: Tensor) -> None:
        square = x.double().square().sum(0).cpu()
        sums[source.name] = sums[source.name] + square if source.name in sums else square

    accumulate(loaded, text, map(Source, names), see)
    return {name: (total / len(text.ids)).sqrt().float() for name, total in sums.items()}


def input_samples(
    loaded: LoadedModel, text: Calibration, names: Iterable[str], limit: int
) -> dict[str, Tensor]:
    """Return the first ``limit`` input rows of each matrix at the counted tokens, (tokens, in)."""
    samples: dict[str, list[Tensor]] = {}
    held: dict[str, int] = {}

    def see(source: Source, x: Tensor) -> None:
        room = limit - held.get(source.name, 0)
        if room > 0:
            samples.setdefault(source.name, []).append(x[:room].cpu())
            held[source.name] = held.get(source.name, 0) + min(room, len(x))

    accumulate(loaded, text, map(Source, names), see)
    return {name: torch.cat(rows) for name, rows in samples.items()}
