from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resafe.errors import UserError
from resafe.evaluate.prompts import Prompt, read_prompts

# Any text but lone surrogates, which UTF-8 cannot hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_jsonl(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "a", "response": "b", "category": "c"}\n\n  \n{"prompt": "d", "response": null, "x": 1}\n'
    )
    assert read_prompts(write(tmp_path, "p.jsonl", lines)) == [Prompt("a", "b", "c"), Prompt("d")]


@given(st.lists(st.tuples(TEXT, st.none() | st.text(st.characters(exclude_categories=["Cs"]))), min_size=1))
def test_jsonl_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    for ascii_only in (True, False):
        lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=ascii_only) for p, r in rows]
        file = write(tmp_path_factory.mktemp("p"), "p.jsonl", "\n".join(lines))
        assert read_prompts(file) == [Prompt(p, r) for p, r in rows]


def test_a_line_separator_inside_text_ends_no_line(tmp_path: Path) -> None:
    file = write(tmp_path, "p.jsonl", '{"prompt": "a\u2028b"}\n')
    assert read_prompts(file) == [Prompt("a\u2028b")]


def test_csv(tmp_path: Path) -> None:
    text = 'id,prompt,category,response\n1,"a, b\nc",x,\n\n,,,\n2,d,,e\n'
    assert read_prompts(write(tmp_path, "p.csv", text)) == [Prompt("a, b\nc", None, "x"), Prompt("d", "e")]


@pytest.mark.parametrize(
    "name", ["prompt", "goal", "Goal", "Behavior", "instruction", "question", "forbidden_prompt", " Prompt "]
)
def test_a_prompt_may_have_another_name(tmp_path: Path, name: str) -> None:
    assert read_prompts(write(tmp_path, "p.csv", f"{name},target\nhow,Sure\n")) == [Prompt("how")]
    assert read_prompts(write(tmp_path, "p.jsonl", json.dumps({name: "how"}))) == [Prompt("how")]


def test_the_plainest_name_counts_first(tmp_path: Path) -> None:
    text = "Index,Behavior,Goal,Category\n0,short,long,Harm\n"
    assert read_prompts(write(tmp_path, "p.csv", text)) == [Prompt("long", None, "Harm")]


def test_txt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.txt", "one\r\n\n two \n")) == [Prompt("one"), Prompt("two")]


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "a"), ("p.csv", "prompt\na"), ("p.jsonl", '{"prompt": "a"}')]
)
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str, text: str) -> None:
    assert read_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + text.encode())) == [Prompt("a")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', r"p\.jsonl, line 3 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]', "line 2 is no JSON object"),
        ("p.jsonl", '{"text": "a", "id": 1}', "line 1 has no prompt, only 'text', 'id'"),
        ("p.jsonl", "{}", "line 1 has no prompt, only nothing"),
        ("p.jsonl", '{"prompt": 3}', "line 1 has a 'prompt' that is no text but int"),
        ("p.jsonl", '{"prompt": null}', "line 1 has an empty 'prompt'"),
        ("p.jsonl", '{"prompt": " "}', "line 1 has an empty 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "response": ["b"]}', "line 1 has a 'response' that is no text but list"),
        ("p.csv", "id,text\n1,a\n", "no column 'prompt', only 'id', 'text'"),
        ("p.csv", "prompt,category\na,b\nc,d,e\n", "line 3 does not have the 2 columns"),
        ("p.csv", "prompt,category\na\n", "line 2 does not have the 2 columns"),
        ("p.csv", 'prompt,category\n"a" b,c\n', "line 2 is malformed"),
        ("p.csv", 'prompt,category\n"a,c\n', "line 2 is malformed"),
        ("p.csv", "prompt,category\n,c\n", "line 2 has an empty 'prompt'"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.csv", "", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.json", "[]", r"no \.jsonl, \.csv or \.txt"),
        ("p.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_prompts(write(tmp_path, name, text))


def test_what_is_no_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match="org/harmful is no file here.*export it to a .jsonl"):
        read_prompts("org/harmful")
