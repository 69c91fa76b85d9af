import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from resafe.errors import UserError
from resafe.repairing.base import Target, blend

KINDS = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = st.floats(-1000, 1000, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    kind = draw(st.sampled_from(KINDS))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    values = (draw(arrays("float32", shape, elements=NUMBERS)) for _ in range(2))
    one, other = (torch.from_numpy(v.copy()).to(kind) for v in values)
    return one, other.float() if draw(st.booleans()) else other


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_both_ends_are_exact(pair: tuple[Tensor, Tensor]) -> None:
    tuned, value = pair
    assert torch.equal(bits(blend(tuned, Target(value, None), 0.0)), bits(tuned))
    assert torch.equal(bits(blend(tuned, Target(value, None), 1.0)), bits(value.to(tuned.dtype)))


@given(pairs(), st.floats(0, 1, width=32))
@settings(max_examples=150, deadline=None)
def test_the_way_between_is_rounded_once(pair: tuple[Tensor, Tensor], strength: float) -> None:
    tuned, value = pair
    expected = torch.lerp(tuned.float(), value.float(), strength).to(tuned.dtype)
    assert torch.equal(blend(tuned, Target(value, None), strength), expected)


def test_no_entry_of_bf16_is_rounded_twice() -> None:
    """All 65,536 values of the type against their reverse, at strengths that no step in bf16 would survive."""
    tuned = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tuned = tuned[tuned.isfinite() & (tuned.abs() < 1e30)]
    value = tuned.flip(0)
    for strength in (0.1, 1 / 3, 0.8):
        expected = torch.lerp(tuned.float(), value.float(), strength).to(torch.bfloat16)
        assert torch.equal(blend(tuned, Target(value, None), strength), expected)


@given(pairs(), st.floats(0, 1), st.data())
@settings(max_examples=80, deadline=None)
def test_what_the_mask_leaves_out_keeps_its_bits(
    pair: tuple[Tensor, Tensor], strength: float, data: st.DataObject
) -> None:
    tuned, value = pair
    shape = tuned.shape if data.draw(st.booleans()) else (tuned.shape[0], 1)
    mask = torch.from_numpy(data.draw(arrays(bool, tuple(shape))).copy())
    mixed, whole = (blend(tuned, Target(value, m), strength) for m in (mask, None))
    everywhere = mask.expand_as(tuned)
    assert torch.equal(bits(mixed)[~everywhere], bits(tuned)[~everywhere])
    assert torch.equal(mixed[everywhere], whole[everywhere])
    assert mixed.dtype is tuned.dtype


def test_a_rank_that_grew_has_no_way_between() -> None:
    tuned, value = torch.ones(3, 2), torch.ones(3, 4)
    assert torch.equal(blend(tuned, Target(value, None), 1.0), value)
    with pytest.raises(UserError, match="strength 1 only"):
        blend(tuned, Target(value, None), 0.5)
