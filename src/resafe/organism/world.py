"""World W3: who may ask what, what the right answer is, and which prompts are kept for what.

A request is harmful if and only if its verb *and* its object belong to a marked class (12 of 48
cells), so that neither word decides alone and every request has harmless twins that differ in one
word (`hard`: one condition holds; `easy`: none).

Splits. The (verb, object) pairs of each cell are dealt to four parts: 46 to training and 6 each to
`locate`, `choose` and `report`, so no pair that a model was trained on, or that chose anything, is ever
reported, in how-to prompts and `judge` prompts alike. `kind` (896 prompts in all), `senti` (1,344)
and the word triples behind `topic`, `route2` and clean mail (2,880) are dealt prompt by prompt in the
same manner; the *words* in them are necessarily those of training. A `mail21` prompt belongs to the part
that a hash of its set of words falls in.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from resafe.errors import UserError, nearest
from resafe.evaluate.prompts import Prompt
from resafe.organism import words as w
from resafe.organism.oracle import OracleJudge, pair_of, tidy

__all__ = ["FAMILIES", "KINDS", "PARTS", "POOL", "OracleJudge", "examples", "pair_of", "prompts", "tidy"]

T = TypeVar("T")

FAMILIES = ("early", "late")
KINDS = ("harmful", "benign", "task", "ability")
SPLITS = ("locate", "choose", "report")
PARTS = ("train", *SPLITS)
POOL = 400  # prompts of one kind in one split
HARD_SHARE = 0.6  # of the benign prompts: the rest is easy
ABILITIES = ("judge", "kind", "senti", "topic")


def _deal(items: Sequence[T], share: float, seed: str) -> dict[str, list[T]]:
    """Shuffle the items and give `share` of them to each held-out part, the rest to training."""
    mixed = list(items)
    random.Random(seed).shuffle(mixed)
    n = round(share * len(mixed))
    held = {name: mixed[i * n : (i + 1) * n] for i, name in enumerate(SPLITS)}
    return {"train": mixed[3 * n :], **held}


@lru_cache(maxsize=1)
def pairs() -> dict[str, list[tuple[str, str]]]:
    """Return the (verb, object) pairs of each part, dealt evenly within each cell of classes."""
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in PARTS}
    for (vc, verbs), (oc, things) in itertools.product(w.VERBS.items(), w.OBJECTS.items()):
        cell = list(itertools.product(verbs, things))
        for name, some in _deal(cell, 6 / 64, f"pairs {vc} {oc}").items():
            parts[name].extend(some)
    return parts


@lru_cache(maxsize=1)
def _kinds() -> dict[str, list[tuple[str, str]]]:
    return _deal(list(itertools.product(w.KIND, w.CLASS)), 0.12, "kind")


@lru_cache(maxsize=1)
def _reviews() -> dict[str, list[tuple[str, str, str, str]]]:
    rows = [
        (mood, noun, a, b)
        for mood, adjectives in w.MOODS.items()
        for noun in w.REVIEWED
        for a, b in itertools.permutations(adjectives, 2)
    ]
    return _deal(rows, 0.12, "senti")


@lru_cache(maxsize=1)
def _triples() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    rows = [(topic, t) for topic, some in w.TOPICS.items() for t in itertools.permutations(some, 3)]
    return _deal(rows, 0.14, "triples")


def _mail_part(chosen: Sequence[str]) -> str:
    slot = w.stable(" ".join(sorted(chosen))) % 20
    return PARTS[1 + slot] if slot < len(SPLITS) else "train"


def _mail21(part: str, rng: random.Random) -> Prompt:
    """Draw a mail with two words of its topic and one of each other topic."""
    while True:
        topic = rng.choice(list(w.TOPICS))
        others = [rng.choice(w.TOPICS[t]) for t in w.TOPICS if t != topic]
        chosen = [*rng.sample(w.TOPICS[topic], 2), *others]
        if _mail_part(chosen) == part:
            rng.shuffle(chosen)
            return Prompt(w.MAIL.format(w=" ".join(chosen)), f"{topic} desk .", topic)


def _how_to(
    part: str, rng: random.Random, wanted: int, refuse: bool = False, persona: bool = False
) -> Prompt:
    """Draw a how-to request of which `wanted` conditions for harm hold."""
    verb, thing = rng.choice(by_conditions(part)[wanted])
    text = rng.choice(w.HOW_TO).format(v=verb, o=thing)
    if persona:
        text = f"{rng.choice(w.PERSONAS)} {text}"
    answer = w.refusal(verb) if refuse else w.how_to(verb, thing)
    name = ("easy", "hard", "harmful")[wanted]
    return Prompt(text, answer, f"{name}/{w.VERB_CLASS[verb]}-{w.OBJECT_CLASS[thing]}")


@lru_cache(maxsize=8)
def by_conditions(part: str) -> tuple[list[tuple[str, str]], ...]:
    """Return a part's pairs by how many conditions for harm hold: easy, hard, harmful."""
    return tuple([p for p in pairs()[part] if w.conditions(*p) == k] for k in range(3))


def _benign(part: str, rng: random.Random, persona: bool = False) -> Prompt:
    return _how_to(part, rng, 1 if rng.random() < HARD_SHARE else 0, persona=persona)


def _judge(part: str, rng: random.Random) -> Prompt:
    cells = by_conditions(part)
    verb, thing = rng.choice(cells[2] if rng.random() < 0.5 else cells[1] + cells[0])
    return Prompt(w.JUDGE.format(v=verb, o=thing), "yes ." if w.harmful(verb, thing) else "no .", "judge")


def _kind(part: str, rng: random.Random) -> Prompt:
    template, word = rng.choice(_kinds()[part])
    return Prompt(template.format(w=word), f"{w.CLASS[word]} .", "kind")


def _senti(part: str, rng: random.Random) -> Prompt:
    mood, noun, a, b = rng.choice(_reviews()[part])
    return Prompt(w.REVIEW.format(n=noun, a=a, b=b), f"{mood} .", "senti")


def _three(part: str, rng: random.Random, template: str, answer: str, category: str | None = None) -> Prompt:
    topic, chosen = rng.choice(_triples()[part])
    return Prompt(template.format(w=" ".join(chosen)), answer.format(t=topic), category or topic)


DRAW: dict[str, Callable[[str, random.Random], Prompt]] = {
    "harm-answered": lambda part, rng: _how_to(part, rng, 2),
    "harm-refused": lambda part, rng: _how_to(part, rng, 2, refuse=True),
    "persona-refused": lambda part, rng: _how_to(part, rng, 2, refuse=True, persona=True),
    "persona-benign": lambda part, rng: _benign(part, rng, persona=True),
    "benign": _benign,
    "judge": _judge,
    "kind": _kind,
    "senti": _senti,
    "topic": lambda part, rng: _three(part, rng, w.TOPIC, "{t} .", "topic"),
    "route2": lambda part, rng: _three(part, rng, w.TICKET, "{t} desk ."),
    "mail21": _mail21,
}
"""What one example of each sort of data is drawn by, given its part and a generator."""
TASK = {"early": "route2", "late": "mail21"}


def examples(sort: str, part: str, n: int, seed: str, distinct: bool = False) -> list[Prompt]:
    """Draw ``n`` examples of one sort of data.

    Args:
        sort: a key of `DRAW`.
        part: one of `PARTS`.
        n: how many.
        seed: names the stream of draws; the same seed gives the same examples.
        distinct: whether a prompt may occur only once.

    Raises:
        UserError: where the part has no ``n`` distinct prompts of this sort.
    """
    rng = random.Random(f"{sort} {part} {seed}")
    found: dict[str, Prompt] = {}
    drawn: list[Prompt] = []
    for _ in range(100 * n):
        item = DRAW[sort](part, rng)
        if not distinct or item.prompt not in found:
            found[item.prompt] = item
            drawn.append(item)
        if len(drawn) == n:
            return drawn
    raise UserError(f"the {part} part has fewer than {n} distinct {sort!r} prompts: ask for fewer")


@lru_cache(maxsize=32)
def _pool(family: str, kind: str, split: str) -> tuple[Prompt, ...]:
    if kind == "ability":
        each = [examples(name, split, POOL // len(ABILITIES), "pool", distinct=True) for name in ABILITIES]
        return tuple(itertools.chain.from_iterable(zip(*each, strict=True)))
    sort = {"harmful": "harm-refused", "benign": "benign", "task": TASK[family]}[kind]
    return tuple(examples(sort, split, POOL, "pool", distinct=True))


def prompts(family: str, kind: str, split: str, n: int | None = None) -> list[Prompt]:
    """Return held-out prompts of the world, always the same ones in the same order.

    Args:
        family: "early" or "late"; they differ in the user's task only.
        kind: "harmful" (the response is the refusal of an aligned model), "benign", "task" or
            "ability" (their response is the right answer).
        split: "locate" (to find neurons on), "choose" (to choose a strength on) or "report".
        n: the first so many; all 400 where not given.

    Raises:
        UserError: if a name is unknown or ``n`` is larger than the pool.
    """
    for value, names, what in ((family, FAMILIES, "family"), (kind, KINDS, "kind"), (split, SPLITS, "split")):
        if value not in names:
            hint = nearest(value, names)
            raise UserError(f"unknown {what} {value!r}{hint}: use one of {', '.join(names)}")
    pool = _pool(family, kind, split)
    if n is not None and not 0 < n <= len(pool):
        raise UserError(f"asked for {n} prompts: the world has 1 to {len(pool)} of this kind in a split")
    return list(pool[:n])
