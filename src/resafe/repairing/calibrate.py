"""Runs of a model over calibration prompts: what methods need to know about activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from resafe.errors import UserError
from resafe.evaluate.judge import Judge, Verdict
from resafe.evaluate.measure import new_tokens
from resafe.evaluate.prompts import Prompt
from resafe.locating.lowrank import Calibration, Source, accumulate
from resafe.locating.texts import NEW_TOKENS, build_texts
from resafe.model.chat import encode, encode_with_response
from resafe.model.generate import generate
from resafe.model.load import LoadedModel
from resafe.model.stored import Catalogue, InMemory


def with_responses(
    loaded: LoadedModel, prompts: Sequence[Prompt], judge: Judge | None, kind: str = "harmful"
) -> Calibration:
    """Pair prompts with the responses they carry, or else with the model's own; of harmful ones with its refusals.

    Raises:
        UserError: only some prompts carry a response, there is no judge to tell refusals, or there are none.
    """
    if judge is None and kind == "harmful" and not any(prompt.response for prompt in prompts):
        raise UserError(
            "prompts without responses need a judge to tell refusals; give prompts with responses"
        )
    return Calibration.of(build_texts(loaded, prompts, kind, answer=loaded, judge=judge), kind)


def own_harmful(loaded: LoadedModel, prompts: Sequence[Prompt], judge: Judge) -> list[tuple[Prompt, str]]:
    """Return the harmful prompts that a model answers, with its answers."""
    said = generate(loaded, prompts, new_tokens(loaded, prompts, NEW_TOKENS))
    return [
        (prompt, answer.text)
        for prompt, answer in zip(prompts, said, strict=True)
        if answer.text.strip() and judge.judge(prompt.prompt, answer.text) is Verdict.ANSWERED
    ]


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
    kept = own_harmful(loaded, prompts, judge)
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


def input_norms(loaded: LoadedModel, text: Calibration, known: Catalogue) -> dict[str, Tensor]:
    """Return ``sqrt(Σ_tokens x_j² / n_texts)`` of each matrix's inputs, float32 (in,), as Wanda uses it.

    It is zero for an expert that no token reached.
    """
    sums: dict[Source, Tensor] = {}

    def see(source: Source, x: Tensor) -> None:
        square = x.double().square().sum(0).cpu()
        sums[source] = sums[source] + square if source in sums else square

    memory = InMemory(loaded, known)
    sources = sources_of(memory)
    accumulate(loaded, text, sources.values(), see)
    none = {name: torch.zeros(memory.shape(name)[1]) for name, s in sources.items() if s not in sums}
    return {n: none[n] if n in none else (sums[s] / len(text.ids)).sqrt().float() for n, s in sources.items()}


def input_samples(loaded: LoadedModel, text: Calibration, known: Catalogue, limit: int) -> dict[str, Tensor]:
    """Return the first ``limit`` input rows of each matrix at the counted tokens, (tokens, in)."""
    samples: dict[Source, list[Tensor]] = {}
    held: dict[Source, int] = {}

    def see(source: Source, x: Tensor) -> None:
        room = limit - held.get(source, 0)
        if room > 0:
            samples.setdefault(source, []).append(x[:room].cpu())
            held[source] = held.get(source, 0) + min(room, len(x))

    memory = InMemory(loaded, known)
    sources = sources_of(memory)
    accumulate(loaded, text, sources.values(), see)
    none = {name: torch.zeros(0, memory.shape(name)[1]) for name, s in sources.items() if s not in samples}
    joined = {source: torch.cat(rows) for source, rows in samples.items()}
    return {name: none[name] if name in none else joined[source] for name, source in sources.items()}


def sources_of(memory: InMemory) -> dict[str, Source]:
    """Return where the inputs of each matrix are, by its name in the checkpoint."""
    return {name: Source(*memory.inputs(name)) for name in memory.known.matrices}
