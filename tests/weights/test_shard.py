import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from resafe.errors import UserError
from resafe.weights.shard import DTYPES, Shard, raw, read, read_rows

SHAPES = {"wide": (3, 7), "tall": (9, 2), "vector": (5,), "scalar": (), "empty": (0, 4), "cube": (2, 3, 4)}


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_and_shape_reads_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "a.safetensors"
    save_file({name: sample(shape, dtype) for name, shape in SHAPES.items()}, file, metadata={"format": "pt"})
    shard = Shard.open(file)
    with safe_open(file, "pt") as theirs:
        assert set(shard.tensors) == set(theirs.keys())
        for name, info in shard.tensors.items():
            expected = theirs.get_tensor(name)
            ours = read(info)
            assert ours.dtype is expected.dtype is info.dtype
            assert ours.shape == expected.shape == info.shape
            assert info.numel == expected.numel()
            assert bytes(raw(ours)) == bytes(raw(expected))
    assert shard.nbytes == file.stat().st_size
    assert file.read_bytes().startswith(shard.header)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.sampled_from(["F32", "BF16", "I64", "U8"]))
@settings(max_examples=25, deadline=None)
def test_rows_equal_the_whole(tmp_path_factory: pytest.TempPathFactory, shape: list[int], kind: str) -> None:
    file = tmp_path_factory.mktemp("rows") / "a.safetensors"
    whole = sample(tuple(shape), DTYPES[kind])
    save_file({"before": torch.ones(3), "w": whole, "x": torch.ones(5)}, file)
    info = Shard.open(file).tensors["w"]
    for first in range(shape[0]):
        for last in range(first, shape[0] + 1):
            assert torch.equal(read_rows(info, first, last), whole[first:last])


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"z": torch.ones(2), "a": torch.ones(8, dtype=torch.float64), "m": torch.ones(3)}, file)
    offsets = [info.offset for info in Shard.open(file).tensors.values()]
    assert offsets == sorted(offsets)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


GOOD = save({"w": torch.ones(2), "v": torch.zeros(3)})
DAMAGED = {
    "empty file": b"",
    "three bytes": b"\1\2\3",
    "header of nothing": struct.pack("<Q", 0),
    "header longer than the limit": struct.pack("<Q", 1 << 40) + b"{}",
    "cut inside the header": GOOD[:20],
    "cut inside the data": GOOD[:-1],
    "bytes after the end": GOOD + b"\0",
    "not JSON": with_header(b"{nonsense"),
    "not UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "a list": with_header([1, 2]),
    "nested without end": with_header(b"[" * 100_000),
    "entry is a number": with_header({"w": 3}),
    "unknown type": with_header(entry("F4"), b"\0" * 8),
    "no type": with_header({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "shape is text": with_header(entry(shape="2"), b"\0" * 8),
    "shape holds text": with_header(entry(shape=["x"]), b"\0" * 8),
    "negative sides": with_header(entry(shape=[-1, -2]), b"\0" * 8),
    "negative offset": with_header(entry(offsets=[-8, 0])),
    "offsets backwards": with_header(entry(shape=[-2], offsets=[8, 0])),
    "offsets are text": with_header(entry(offsets=["0", "x"]), b"\0" * 8),
    "too few bytes for the shape": with_header(entry(shape=[3]), b"\0" * 8),
    "a hole": with_header(entry(offsets=[4, 12]), b"\0" * 12),
    "overlap": with_header({**entry(), "v": entry()["w"]}, b"\0" * 8),
    "outside the file": with_header(entry(shape=[1 << 40], offsets=[0, 1 << 42]), b"\0" * 8),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGED[case])
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        Shard.open(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_being_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD)
    info = list(Shard.open(file).tensors.values())[-1]
    file.write_bytes(GOOD[:-3])
    with pytest.raises(UserError, match="3 bytes early"):
        read(info)
