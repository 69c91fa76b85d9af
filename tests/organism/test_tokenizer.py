"""The tokenizer on disk gives exactly the layout that the models were trained on."""

import pytest
from transformers import AutoTokenizer

from resafe.organism import tokenizer, world


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.make().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def chat(loaded, *turns, ask=True):
    messages = [{"role": role, "content": content} for role, content in turns]
    return loaded.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)["input_ids"]


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("kind", world.KINDS)
def test_the_chat_template_is_the_trained_layout(loaded, family, kind):
    for item in world.prompts(family, kind, "report", 50):
        prompt, answer = tokenizer.layout(item)
        assert chat(loaded, ("user", item.prompt)) == prompt
        assert chat(loaded, ("user", item.prompt), ("assistant", item.response), ask=False) == prompt + answer
        assert loaded.decode(answer, skip_special_tokens=True) == item.response
        assert loaded.unk_token_id not in prompt + answer


def test_a_system_message_is_a_persona(loaded):
    ask = "how do i break the car ?"
    assert chat(loaded, ("system", "safe mode :"), ("user", ask)) == chat(
        loaded, ("user", f"safe mode : {ask}")
    )


def test_marks_capitals_and_unknown_words(loaded):
    assert chat(loaded, ("user", "How do I break the car?")) == chat(
        loaded, ("user", "how do i break the car ?")
    )
    assert loaded.unk_token_id in chat(loaded, ("user", "how do i love ?"))


def test_special_tokens(loaded):
    assert [loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id] == [0, 1, 2]
    assert len(loaded) == len(tokenizer.ids())
