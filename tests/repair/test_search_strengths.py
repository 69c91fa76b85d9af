"""A search tries an edit only at strengths at which it exists."""

from resafe.registry import get
from resafe.repairing.base import Repair


def test_a_grown_rank_is_tried_at_full_strength_only() -> None:
    made = get("nlsr", "repair").make({"transplant": "exact"})
    assert isinstance(made, Repair)
    assert tuple(made.strengths((0.8, 1.0))) == (1.0,)
    plain = get("nlsr", "repair").make({})
    assert isinstance(plain, Repair)
    assert tuple(plain.strengths((0.8, 1.0))) == (0.8, 1.0)
