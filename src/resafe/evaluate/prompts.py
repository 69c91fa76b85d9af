"""Prompts: one request, and where known the answer that counts as right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a model.

    Attributes:
        prompt: what the user says.
        response: the wanted answer (a refusal, a task's label), where there is one.
        category: a group that rates may be split by.
    """

    prompt: str
    response: str | None = None
    category: str | None = None
