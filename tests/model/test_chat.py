from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from resafe.errors import UserError
from resafe.evaluate.prompts import Prompt
from resafe.model.chat import encode, encode_with_response, template_kind, turn_end

from . import tiny

NUMBER = {word: i for i, word in enumerate(tiny.VOCABULARY)}


def numbers(text: str) -> list[int]:
    return [NUMBER[word] for word in text.split()]


def test_a_prompt_goes_through_the_template_up_to_the_answer() -> None:
    found = encode(tiny.tokenizer(), [Prompt("open the door"), "red"])
    assert found == [numbers("<bos> <user> open the door <asst>"), numbers("<bos> <user> red <asst>")]


def test_without_a_template_a_prompt_is_its_plain_tokens() -> None:
    tokenizer = tiny.tokenizer(template=None)
    assert template_kind(tokenizer) == "none"
    assert template_kind(tiny.tokenizer()) == "chat"
    assert encode(tokenizer, ["open the door"]) == [numbers("open the door")]


def test_tokens_that_a_tokenizer_adds_itself_are_kept_at_the_start_only() -> None:
    tokenizer = tiny.tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert encode(tokenizer, ["red"]) == [numbers("<bos> red")]
    assert encode_with_response(tokenizer, ["red"], ["blue"]) == ([numbers("<bos> red blue")], [2])


def test_a_response_follows_the_prompt_and_ends_the_turn() -> None:
    ids, starts = encode_with_response(tiny.tokenizer(), ["open", "red"], ["sorry i cannot", "yes"])
    assert ids[0] == numbers("<bos> <user> open <asst> sorry i cannot <end>")
    assert ids[1] == numbers("<bos> <user> red <asst> yes <end>")
    assert starts == [4, 4]


def test_the_start_is_counted_even_where_the_response_is_in_the_prompt() -> None:
    ids, starts = encode_with_response(tiny.tokenizer(), ["yes yes yes"], ["yes"])
    assert ids[0][starts[0] :] == numbers("yes <end>")
    assert starts == [6]


@pytest.mark.parametrize(
    ("ending", "wanted"), [(" <end> ", "<end>"), (" <eos> ", "<eos>"), (" w1 ", None), ("", None)]
)
def test_the_turns_end_is_read_from_the_template(ending: str, wanted: str | None) -> None:
    tokenizer = tiny.tokenizer(template=tiny.TEMPLATE.replace(" <end> ", ending))
    assert turn_end(tokenizer) == (None if wanted is None else NUMBER[wanted])


def test_no_template_no_end() -> None:
    assert turn_end(tiny.tokenizer(template=None)) is None


def test_thinking_is_switched_off() -> None:
    tokenizer = tiny.tokenizer(
        template=tiny.TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}w1{% endif %}"
    )
    assert encode(tokenizer, ["red"]) == [numbers("<bos> <user> red <asst>")]


def test_a_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(UserError, match="prompt 2 has 6 tokens .* room for 5"):
        encode(tiny.tokenizer(), ["red", "open the door"], limit=5)
    with pytest.raises(UserError, match="prompt 1 has 6 tokens"):
        encode_with_response(tiny.tokenizer(), ["red"], ["blue"], limit=5)


def test_empty_texts_are_named() -> None:
    with pytest.raises(UserError, match="prompt 2 has no tokens"):
        encode(tiny.tokenizer(template=None), ["red", ""])
    with pytest.raises(UserError, match="prompt 1 has an empty response"):
        encode_with_response(tiny.tokenizer(), ["red"], [""])


def test_nothing_gives_nothing_and_unequal_lengths_are_an_error() -> None:
    assert encode(tiny.tokenizer(), []) == []
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        encode_with_response(tiny.tokenizer(), ["red", "blue"], ["yes"])
