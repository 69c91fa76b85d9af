from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resafe.errors import UserError
from resafe.model import load as loading
from resafe.model.chat import encode, encode_with_response
from resafe.model.generate import by_length, context_length, forward_batches, generate, stop_tokens
from resafe.model.load import LoadedModel

from . import tiny

load = partial(loading.load, device="cpu")  # also where there is an accelerator

PROMPTS = [
    "how do i bake a cake",
    "open",
    "the door yes no sorry i cannot because of rain and snow red green blue w1 w2 w3",
    "red",
    "w1 w2 w3",
    "snow and rain and snow and rain",
]


@pytest.fixture(params=[*tiny.FAMILIES, "adapter"])
def loaded(request: pytest.FixtureRequest, folders: Path) -> LoadedModel:
    return load(folders / request.param)


@pytest.fixture
def llama(folders: Path) -> LoadedModel:
    return load(folders / "llama")


@pytest.mark.parametrize("batch_size", [2, 4, None])
def test_an_answer_does_not_depend_on_its_batch(loaded: LoadedModel, batch_size: int | None) -> None:
    single = [generate(loaded, [prompt], 12)[0] for prompt in PROMPTS]
    assert generate(loaded, PROMPTS, 12, batch_size=batch_size) == single
    assert len({answer.text for answer in single}) > 2


def test_positions_count_from_the_prompts_own_first_token(llama: LoadedModel) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["attention_mask"], kwargs["position_ids"]))

    handle = llama.model.register_forward_pre_hook(look, with_kwargs=True)
    generate(llama, ["w1 w2 w3", "red"], 3)
    handle.remove()
    (first, positions), *later = seen
    for row, length in enumerate(first.sum(dim=1).tolist()):
        assert positions[row, -length:].tolist() == list(range(length))
        assert [step[1][row].tolist() for step in later] == [[length + n] for n in range(len(later))]
    assert first.sum(dim=1).tolist() == [6, 4]
    assert len(later) == 2


def test_answers_are_the_greedy_ones(loaded: LoadedModel) -> None:
    stops = stop_tokens(loaded)
    for prompt, answer in zip(PROMPTS, generate(loaded, PROMPTS, 10), strict=True):
        (ids,) = encode(loaded.tokenizer, [prompt])
        wanted: list[int] = []
        while len(wanted) < 10:
            token = int(loaded.model(torch.tensor([ids + wanted])).logits[0, -1].argmax())
            if token in stops:
                break
            wanted.append(token)
        assert list(answer.token_ids) == wanted
        assert answer.finished == (len(wanted) < 10)
        assert answer.text == loaded.tokenizer.decode(wanted, skip_special_tokens=True)


def test_the_models_own_sampling_settings_and_penalties_have_no_say(llama: LoadedModel) -> None:
    plain = generate(llama, PROMPTS, 12)
    config = llama.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 9.0
    config.suppress_tokens, config.no_repeat_ngram_size = [41, 12], 1
    assert generate(llama, PROMPTS, 12) == plain


def test_every_declared_end_stops_an_answer(llama: LoadedModel) -> None:
    plain = generate(llama, PROMPTS, 12)
    long = next(answer for answer in plain if len(set(answer.token_ids)) > 4)
    row, stop = plain.index(long), long.token_ids[3]
    assert stop not in long.token_ids[:3]
    assert stop not in stop_tokens(llama)
    llama.model.generation_config.eos_token_id = [2, stop]
    assert {2, stop, tiny.VOCABULARY.index("<end>")} == stop_tokens(llama)
    for answer, before in zip(generate(llama, PROMPTS, 12), plain, strict=True):
        cut = before.token_ids.index(stop) if stop in before.token_ids else len(before.token_ids)
        assert answer.token_ids == before.token_ids[:cut]
    assert generate(llama, PROMPTS, 12)[row].finished


def test_a_pad_token_that_is_also_the_end_does_no_harm(llama: LoadedModel) -> None:
    single = [generate(llama, [prompt], 12)[0] for prompt in PROMPTS]
    llama.tokenizer.pad_token = "<eos>"
    assert generate(llama, PROMPTS, 12) == single


def test_the_planted_words_come_out() -> None:
    model = tiny.dictionary({"red": {"yes": 0.9, "no": 0.1}, "yes": {"blue": 1.0}, "blue": {"<eos>": 1.0}})
    loaded = LoadedModel(model, tiny.tokenizer(template=None), "planted")
    (answer,) = generate(loaded, ["open red"], 8)
    assert answer.text == "yes blue"
    assert answer.finished
    (cut,) = generate(loaded, ["open red"], 1)
    assert (cut.text, cut.finished) == ("yes", False)


def test_progress_counts_answers(llama: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    generate(llama, PROMPTS, 2, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]
    assert generate(llama, [], 2) == []


def test_a_prompt_beyond_the_context_is_named(llama: LoadedModel) -> None:
    assert context_length(llama) == tiny.CONTEXT
    fits = " ".join(["red"] * (tiny.CONTEXT - 3 - 4))
    assert generate(llama, ["red", fits], 4)[1].text is not None
    with pytest.raises(UserError, match="prompt 2 has 61 tokens and the model's context leaves room for 60"):
        generate(llama, ["red", fits + " red"], 4)
    with pytest.raises(UserError, match="prompt 1 with its response has 65 tokens"):
        next(forward_batches(llama, [[4] * 65], [3]))


def test_a_token_without_an_embedding_is_refused(llama: LoadedModel) -> None:
    llama.tokenizer.add_tokens(["newcomer"])
    with pytest.raises(UserError, match="gives token 48, but the model knows tokens 0 to 47"):
        generate(llama, ["newcomer"], 2)


@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one_are_refused(llama: LoadedModel, number: int) -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(llama, ["red"], number)
    with pytest.raises(UserError, match="batch_size"):
        generate(llama, ["red"], 2, batch_size=number)


@given(st.lists(st.integers(1, 50)), st.integers(1, 9))
def test_batches_hold_every_row_once_longest_first(lengths: list[int], size: int) -> None:
    batches = by_length(lengths, size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])


def test_reading_batches_mark_exactly_the_responses(llama: LoadedModel) -> None:
    responses = ["yes", "sorry i cannot", "no", "because of rain", "blue blue", "w1"]
    ids, starts = encode_with_response(llama.tokenizer, PROMPTS, responses)
    found = []
    for tokens, attention, response in forward_batches(llama, ids, starts, batch_size=4):
        assert tokens.shape == attention.shape == response.shape
        assert not (response & (attention == 0)).any()
        for row in range(len(tokens)):
            length = int(attention[row].sum())
            assert attention[row, :length].all()
            found.append((tokens[row, :length].tolist(), tokens[row][response[row]].tolist()))
    wanted = [(row, row[start:]) for row, start in zip(ids, starts, strict=True)]
    assert sorted(found) == sorted(wanted)


def test_padding_on_the_right_changes_no_logits(loaded: LoadedModel) -> None:
    ids, starts = encode_with_response(loaded.tokenizer, PROMPTS, ["yes"] * len(PROMPTS))
    for tokens, attention, _ in forward_batches(loaded, ids, starts):
        padded = loaded.model(input_ids=tokens, attention_mask=attention).logits
        for row, length in enumerate(attention.sum(dim=1).tolist()):
            alone = loaded.model(tokens[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(padded[row, :length], alone, rtol=1e-4, atol=1e-4)
