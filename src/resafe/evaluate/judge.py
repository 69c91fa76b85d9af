"""What a judge is, and the verdicts it may give."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol, runtime_checkable


class Verdict(StrEnum):
    """What an answer does with its request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    INCOHERENT = "incoherent"


@runtime_checkable
class Judge(Protocol):
    """Reads one request and the answer to it, and says what the answer did.

    Whether an answered request is a harm or a service depends on the request, so a judge needs no
    notion of it: the harmful rate is the share of *answered* among harmful requests, over-refusal
    the share of *refused* among harmless ones.
    """

    name: str

    def judge(self, prompt: str, answer: str) -> Verdict:
        """Return the verdict on ``answer`` given ``prompt``."""
        ...
