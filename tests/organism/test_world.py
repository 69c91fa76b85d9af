"""The world: splits that share nothing, counts, determinism, and words the tokenizer knows."""

import itertools

import pytest

from resafe.errors import UserError
from resafe.organism import words as w
from resafe.organism import world

ALL = list(itertools.product(world.FAMILIES, world.KINDS, world.SPLITS))


def pairs_in(text: str) -> set[tuple[str, str]]:
    """Read every (verb, object) pair off a text, without the code that made it."""
    found = text.split()
    return {(v, o) for v in found for o in found if v in w.VERB_CLASS and o in w.OBJECT_CLASS}


def texts(split: str) -> list[str]:
    if split == "train":
        return [e.prompt for sort in world.DRAW for e in world.examples(sort, "train", 3000, "test")]
    return [p.prompt for f in world.FAMILIES for k in world.KINDS for p in world.prompts(f, k, split)]


def test_no_pair_and_no_prompt_is_in_two_splits():
    said = {split: texts(split) for split in world.PARTS}
    pairs = {split: set().union(*map(pairs_in, some)) for split, some in said.items()}
    assert all(pairs.values())
    for one, other in itertools.combinations(world.PARTS, 2):
        assert not pairs[one] & pairs[other]
        assert not set(said[one]) & set(said[other])


def test_the_parts_hold_every_pair_once():
    dealt = [p for part in world.PARTS for p in world.pairs()[part]]
    assert sorted(dealt) == sorted(itertools.product(w.VERB_CLASS, w.OBJECT_CLASS))


@pytest.mark.parametrize("part", world.PARTS)
@pytest.mark.parametrize("sort", world.DRAW)
def test_examples_stay_in_their_part(sort, part):
    for item in world.examples(sort, part, 50, "test"):
        assert pairs_in(item.prompt) <= set(world.pairs()[part])
        assert world.OracleJudge().judge(item.prompt, item.response) != "incoherent"


@pytest.mark.parametrize(("family", "kind", "split"), ALL)
def test_prompts_are_many_distinct_and_always_the_same(family, kind, split):
    items = world.prompts(family, kind, split)
    assert len({p.prompt for p in items}) == len(items) >= 200
    world._pool.cache_clear()
    assert world.prompts(family, kind, split) == items
    assert world.prompts(family, kind, split, 7) == items[:7]


@pytest.mark.parametrize("split", world.SPLITS)
def test_harm_needs_both_words_and_benign_prompts_are_twins(split):
    def held(item):
        ((verb, thing),) = pairs_in(item.prompt)
        return w.conditions(verb, thing)

    assert {held(p) for p in world.prompts("early", "harmful", split)} == {2}
    benign = [held(p) for p in world.prompts("early", "benign", split)]
    assert set(benign) == {0, 1}
    assert 0.5 < benign.count(1) / len(benign) < 0.7


def test_the_first_ability_prompts_are_of_all_four():
    assert [p.category for p in world.prompts("early", "ability", "report", 4)] == list(world.ABILITIES)


def test_families_differ_in_the_task_only():
    for kind in world.KINDS:
        same = world.prompts("early", kind, "choose") == world.prompts("late", kind, "choose")
        assert same == (kind != "task")


def test_every_word_is_in_the_vocabulary():
    known = set(w.vocabulary())
    for split in world.PARTS:
        assert set(" ".join(texts(split)).split()) <= known
    assert len(known) == len(w.vocabulary()) < 400


def test_a_mail_is_sent_by_its_majority():
    for item in world.prompts("late", "task", "report"):
        topics = [t for word in item.prompt.split() for t, some in w.TOPICS.items() if word in some]
        assert len(topics) == 5
        assert topics.count(item.response.split()[0]) == 2


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'early'"):
        world.prompts("earlie", "harmful", "report")
    with pytest.raises(UserError, match="unknown kind"):
        world.prompts("early", "odd", "report")
    with pytest.raises(UserError, match="unknown split"):
        world.prompts("early", "task", "train")
    with pytest.raises(UserError, match="401"):
        world.prompts("early", "task", "report", 401)
    with pytest.raises(UserError, match="fewer than"):
        world.examples("judge", "report", 1000, "test", distinct=True)
