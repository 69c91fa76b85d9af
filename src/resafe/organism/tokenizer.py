"""The organism's word-level tokenizer, as an ordinary Hugging Face fast tokenizer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from resafe.evaluate.prompts import Prompt
from resafe.organism import words as w

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set before = namespace(text='') %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set before.text = m['content'] + ' ' %}"
    "{% elif m['role'] == 'user' %}{{ ' <user> ' + before.text + m['content'] }}"
    "{% else %}{{ ' <asst> ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <asst>' }}{% endif %}"
)
"""The trained layout; a system message (a persona) goes before the user's words."""


@lru_cache(maxsize=1)
def ids() -> dict[str, int]:
    """Return the number of each token."""
    return {word: i for i, word in enumerate(w.vocabulary())}


def encode(text: str) -> list[int]:
    """Return the token numbers of a text of the world; a word outside it is a KeyError."""
    return [ids()[word] for word in text.split()]


def layout(item: Prompt) -> tuple[list[int], list[int]]:
    """Return an example as (prompt tokens, answer tokens): `bos user PROMPT asst` and `ANSWER eos`."""
    return encode(f"<bos> <user> {item.prompt} <asst>"), encode(f"{item.response} <eos>")


def make() -> PreTrainedTokenizerFast:
    """Return the tokenizer; marks need no space around them and capitals are folded."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(ids(), unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<asst>"],
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    return made
