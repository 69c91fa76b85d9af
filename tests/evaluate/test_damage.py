from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.evaluate.damage import Reference, kl, reference_logprobs
from resafe.model.chat import encode_with_response
from resafe.model.load import LoadedModel
from tests.model import tiny

PROMPTS = ["open the door", "how do i bake a cake because of snow", "red"]
RESPONSES = ["yes no", "sorry i cannot because of rain and snow and rain and snow", "blue"]


def tiny_model(family: str = "llama", seed: int = 0) -> LoadedModel:
    return LoadedModel(tiny.build(family, seed), tiny.tokenizer(), f"{family} {seed}")


def texts(loaded: LoadedModel) -> tuple[list[list[int]], list[int]]:
    return encode_with_response(loaded.tokenizer, PROMPTS, RESPONSES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_is_at_no_distance_from_itself(family: str) -> None:
    loaded = tiny_model(family)
    reference = reference_logprobs(loaded, *texts(loaded))
    assert kl(loaded, reference) == pytest.approx(0, abs=1e-6)
    assert kl(tiny_model(family, seed=7), reference) > 0.1


def test_the_reference_is_what_the_model_says_at_each_token_alone() -> None:
    loaded = tiny_model()
    ids, starts = texts(loaded)
    reference = reference_logprobs(loaded, ids, starts, tokens=4, batch_size=2)
    assert [len(row) for row in reference.logprobs] == [3, 4, 2]  # with the token that ends the turn
    assert reference.tokens == 9
    for row, start, found in zip(ids, starts, reference.logprobs, strict=True):
        for offset in range(len(found)):
            logits = loaded.model(torch.tensor([row[: start + offset]])).logits[0, -1]
            torch.testing.assert_close(found[offset], logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
        assert found.dtype == torch.float32
        assert found.device.type == "cpu"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_distance_does_not_depend_on_the_batch(batch_size: int) -> None:
    loaded, other = tiny_model(), tiny_model(seed=3)
    reference = reference_logprobs(loaded, *texts(loaded), batch_size=batch_size)
    assert kl(other, reference, batch_size=2) == pytest.approx(kl(other, reference), rel=1e-5)


def test_what_comes_after_the_looked_at_tokens_has_no_say() -> None:
    loaded = tiny_model()
    ids, starts = texts(loaded)
    longer = [
        row + [9, 10, 11] if len(row) - start > 4 else row for row, start in zip(ids, starts, strict=True)
    ]
    one, two = (reference_logprobs(loaded, rows, starts, tokens=4) for rows in (ids, longer))
    assert one.ids == two.ids
    assert all(torch.equal(a, b) for a, b in zip(one.logprobs, two.logprobs, strict=True))


def test_a_distance_worked_out_by_hand() -> None:
    """After `red` the tuned model says yes or no evenly, the other no in three cases of four; both then end.

    KL at the first token is 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = 1/2 ln(4/3); at the second it is 0.
    """
    tuned, other = (
        LoadedModel(
            tiny.dictionary({"red": {"yes": 1 - no, "no": no}, "yes": {"<eos>": 1.0}}),
            tiny.tokenizer(template=None),
            "planted",
        )
        for no in (0.5, 0.75)
    )
    red, yes = tiny.VOCABULARY.index("red"), tiny.VOCABULARY.index("yes")
    first = reference_logprobs(tuned, [[red, yes]], [1])
    assert first.logprobs[0].exp()[0, yes].item() == pytest.approx(0.5, abs=1e-4)
    assert kl(other, first) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-4)
    both = reference_logprobs(tuned, [[red, yes, tiny.VOCABULARY.index("<eos>")]], [1])
    assert kl(other, both) == pytest.approx(0.25 * math.log(4 / 3), abs=1e-4)
    assert kl(tuned, both) == pytest.approx(0, abs=1e-7)


def test_a_token_that_the_tuned_model_excludes_adds_nothing() -> None:
    loaded = tiny_model()
    reference = reference_logprobs(loaded, [[1, 4, 9]], [2], tokens=1)
    logprobs = reference.logprobs[0].clone()
    logprobs[0, 5] = -torch.inf
    found = kl(tiny_model(seed=3), Reference(reference.ids, reference.response_start, (logprobs,)))
    whole = kl(tiny_model(seed=3), reference)
    other = reference_logprobs(tiny_model(seed=3), [[1, 4, 9]], [2], tokens=1).logprobs[0][0, 5]
    left_out = reference.logprobs[0][0, 5].exp() * (reference.logprobs[0][0, 5] - other)
    assert found == pytest.approx(whole - left_out.item(), abs=1e-5)


def test_a_broken_model_is_infinitely_far_away_not_near() -> None:
    loaded, broken = tiny_model(), tiny_model()
    reference = reference_logprobs(loaded, *texts(loaded))
    broken.model.lm_head.weight.fill_(torch.nan)
    assert kl(broken, reference) == math.inf


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    loaded = tiny_model()
    with pytest.raises(UserError, match="no text to measure damage on"):
        reference_logprobs(loaded, [], [])
    for start in (0, 3, 4):
        with pytest.raises(UserError, match="prompt 2 has no response"):
            reference_logprobs(loaded, [[1, 4, 9], [1, 4, 9]], [1, start])
    model = tiny.build()
    model.resize_token_embeddings(50)
    with pytest.raises(UserError, match="vocabulary of 50 and the tuned model one of 48"):
        kl(LoadedModel(model, tiny.tokenizer(), "other"), reference_logprobs(loaded, [[1, 4, 9]], [2]))
