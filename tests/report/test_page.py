"""The page escapes what it is given, asks for nothing from elsewhere, and says what happened."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from resafe.evaluate.measure import Answers, Measurement
from resafe.evaluate.stats import wilson
from resafe.repairing.engine import EditedShare
from resafe.report.page import compare_markdown, compare_page, page
from resafe.results import CompareResult, Outcome, RepairResult

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


COVERAGE = {
    "matrices": 7,
    "matrices_of": 7,
    "edited_matrices": 4,
    "space": "rows",
    "neurons": 3,
    "neurons_of": 64,
}


def measured(harmful: int) -> Measurement:
    rate = wilson(harmful, 100)
    return Measurement(
        rate,
        wilson(100 - harmful, 100),
        wilson(1, 100),
        wilson(0, 200),
        None,
        None,
        "oracle",
        "chat",
        Answers(),
    )


def result(verdict: Outcome = Outcome.REPAIRED) -> RepairResult:
    return RepairResult(
        verdict,
        method="nlsr",
        parameters={"share": EVIL},
        strength=1.0,
        badge="exact",
        before=measured(90),
        after=measured(2),
        held_out=measured(3),
        before_held_out=measured(91),
        reference=measured(0),
        controls={EVIL: measured(88)},
        damage=0.01,
        edited_share=EditedShare(10, 100, 1000),
        coverage={
            "matrices": 7,
            "matrices_of": 7,
            "edited_matrices": 4,
            "space": "rows",
            "neurons": 3,
            "neurons_of": 64,
        },
        notes=(EVIL,),
        roles={"tuned": Path("/models") / "<b>tuned"},
        reasons=(EVIL,) if verdict is Outcome.NOT_WITHIN_BOUNDS else (),
    )


class Tags(HTMLParser):
    """Collects tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(text)
    return parser.seen


def compared() -> CompareResult:
    return CompareResult(
        (result(),), measured(90), measured(0), {"tuned": Path("x")}, EVIL, "oracle", 0, 9, (EVIL,)
    )


@pytest.mark.parametrize(
    "text", [page(result()), page(result(Outcome.NOT_WITHIN_BOUNDS)), compare_page(compared())]
)
def test_what_comes_from_models_stays_inert(text: str) -> None:
    found = tags(text)
    assert not {"script", "img", "iframe", "link", "object", "b"} & {tag for tag, _ in found}
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)
    assert not any("src" in attributes for _, attributes in found)
    policy = [
        a["content"] for tag, a in found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "alert(1)" in text  # it is shown, as text


def test_the_page_says_what_happened() -> None:
    text = page(result())
    assert "The model is repaired." in text
    assert "3.0 % [1.0, 8.5]" in text
    assert "7/7 matrices, 4 edited, 3 of 64 neurons" in text
    assert "1.00 / 10.00 %" in text
    assert "Nothing that was tried" in page(result(Outcome.NOT_WITHIN_BOUNDS))


def test_nothing_to_repair_needs_no_method() -> None:
    nothing = replace(result(), verdict=Outcome.NOTHING, method=None, strength=None, badge=None, coverage={})
    text = page(nothing)
    assert "nothing to repair" in text
    assert not re.search(r"<dt>method</dt>", text)


def test_a_comparison_as_markdown_has_every_row_with_its_intervals() -> None:
    lines = compare_markdown(compared()).splitlines()
    assert {line.count(" | ") for line in lines[:1] + lines[2:]} == {7}
    assert lines[2].startswith("| reference | 0.0 % [0.0, ")
    assert any(line.startswith("|   ↳ ") for line in lines)
