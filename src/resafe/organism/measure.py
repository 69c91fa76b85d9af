"""What a model of the organism does on held-out prompts, and where in its depth it sees harm."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from resafe.evaluate.judge import Verdict
from resafe.evaluate.prompts import Prompt
from resafe.evaluate.stats import Rate, wilson
from resafe.organism import tokenizer, world
from resafe.organism import words as w
from resafe.organism.models import network
from resafe.organism.train import Model

LONGEST = 24  # tokens of an answer; the longest right one has 17


@dataclass(frozen=True)
class Measured:
    """The rates of one model, with Wilson 95 % intervals: see `measure`."""

    harmful: Rate
    over_refusal: Rate
    incoherent: Rate
    task: Rate
    ability: Rate

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain numbers."""
        return asdict(self)


@torch.inference_mode()
def answer(model: Model, items: Sequence[Prompt], size: int = 200) -> list[str]:
    """Decode an answer to each prompt greedily; prompts of one length share a batch, so nothing is padded."""
    inverse = {i: word for word, i in tokenizer.ids().items()}
    groups: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer.layout(item)[0] for item in items]
    for i, tokens in enumerate(encoded):
        groups[len(tokens)].append(i)
    answers = [""] * len(items)
    for members in groups.values():
        for at in range(0, len(members), size):
            some = members[at : at + size]
            for i, row in zip(some, _greedy(model, torch.tensor([encoded[i] for i in some])), strict=True):
                answers[i] = " ".join(inverse[t] for t in row)
    return answers


def _greedy(model: Model, tokens: Tensor) -> list[list[int]]:
    """Continue equally long rows (rows, length) until each has ended."""
    end = tokenizer.ids()["<eos>"]
    llama, past, step = network(model), None, tokens
    rows: list[list[int]] = [[] for _ in range(len(tokens))]
    open_rows = torch.ones(len(tokens), dtype=torch.bool)
    for _ in range(LONGEST):
        out = llama(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = out.logits[:, -1:].argmax(-1)
        open_rows &= step[:, 0] != end
        for i in open_rows.nonzero()[:, 0].tolist():
            rows[i].append(int(step[i, 0]))
        if not open_rows.any():
            break
    return rows


def measure(model: Model, family: str, split: str = "report", n: int | None = None) -> Measured:
    """Measure a model on one split's prompts.

    The harmful rate is the share of harmful requests answered, over-refusal the share of benign ones refused,
    the incoherent rate is over both; task and ability are shares of exactly right answers.
    """
    oracle = world.OracleJudge()
    verdicts: dict[str, list[Verdict]] = {}
    right: dict[str, Rate] = {}
    for kind in world.KINDS:
        items = world.prompts(family, kind, split, n)
        said = answer(model, items)
        verdicts[kind] = [oracle.judge(i.prompt, a) for i, a in zip(items, said, strict=True)]
        right[kind] = wilson(sum(i.response == a for i, a in zip(items, said, strict=True)), len(items))
    both = verdicts["harmful"] + verdicts["benign"]
    return Measured(
        harmful=wilson(verdicts["harmful"].count(Verdict.ANSWERED), len(verdicts["harmful"])),
        over_refusal=wilson(verdicts["benign"].count(Verdict.REFUSED), len(verdicts["benign"])),
        incoherent=wilson(both.count(Verdict.INCOHERENT), len(both)),
        task=right["task"],
        ability=right["ability"],
    )


@torch.inference_mode()
def gap(model: Model, n: int = 128) -> list[float]:
    """Return each layer's gap: mean cosine benign-benign minus benign-harmful of the last prompt token.

    Prompts are the `choose` split's; both sets use the same templates.
    """
    pairs = world.by_conditions("choose")
    found: list[list[Tensor]] = []
    for group in (pairs[2], pairs[1] + pairs[0]):
        drawn = random.Random("gap").choices(group, k=n)
        asked = [w.HOW_TO[k % len(w.HOW_TO)].format(v=v, o=o) for k, (v, o) in enumerate(drawn)]
        found.append(_last_states(model, asked))
    gaps = []
    for bad, good in zip(*found, strict=True):  # (prompts, width) each
        bad, good = torch.nn.functional.normalize(bad, dim=-1), torch.nn.functional.normalize(good, dim=-1)
        m = len(good)
        among = ((good @ good.T).sum() - m) / (m * (m - 1))
        gaps.append(float(among - (good @ bad.T).mean()))
    return gaps


def _last_states(model: Model, asked: Sequence[str]) -> list[Tensor]:
    """Return per layer the hidden states (prompts, width) of the last prompt token."""
    rows = []
    for text in asked:
        tokens = torch.tensor([tokenizer.encode(f"<bos> <user> {text} <asst>")])
        states = (
            network(model).model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
        )
        rows.append([s[0, -1] for s in states[1:]])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]
