"""Patches between real checkpoints and adapters on disk, and what becomes of damaged ones."""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe import patch_verbs
from resafe.errors import UserError
from resafe.patch_verbs import apply, revert
from resafe.weights.adapter import WEIGHTS
from resafe.weights.patch import CHUNK, MAGIC, Patch, PatchWriter, rewrite
from resafe.weights.shard import Shard
from tests.conftest import contents, fork, wait_for

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn)


def between(source: Path, target: Path, file: Path) -> Path:
    """Make the patch that turns every file of one folder into its namesake in another."""
    with PatchWriter(file) as patch:
        for one in sorted(source.iterdir()):
            patch.add_file(one, target / one.name)
    return file


def pair(root: Path, share: float = 0.01, seed: int = 0) -> tuple[Path, Path]:
    """Save two folders of two shards whose tensors differ in a share of their entries."""
    generator = torch.Generator().manual_seed(seed)
    folders = root / "one", root / "other"
    for number, kinds in enumerate((KINDS[:3], KINDS[3:])):
        before = {f"w{i}.{k}": torch.randn(40, 30, generator=generator).to(k) for i, k in enumerate(kinds)}
        after = {}
        for name, tensor in before.items():
            drawn = torch.randn(40, 30, generator=generator).to(tensor.dtype)
            mask = torch.rand(40, 30, generator=generator) < share
            bits = torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype
            after[name] = torch.where(mask, drawn.view(bits), tensor.view(bits)).view(tensor.dtype)
        for folder, tensors in zip(folders, (before, after), strict=True):
            folder.mkdir(exist_ok=True)
            tensors = tensors | {
                "same": torch.ones(3),
                "none": torch.zeros(0, 2),
                "scalar": torch.tensor(2.0),
            }
            save_file({f"{number}.{k}": v for k, v in tensors.items()}, folder / f"{number}.safetensors")
    return folders


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_there_and_back_is_byte_identical(tmp_path: Path, share: float) -> None:
    one, other = pair(tmp_path, share)
    before, after = contents(one), contents(other)
    file = between(one, other, tmp_path / "p")
    modes = {f.name: f.stat().st_mode for f in one.iterdir()}
    there = apply(file, one)
    assert contents(one) == after
    assert there.files == after
    assert revert(file, one).done
    assert contents(one) == before
    assert {f.name: f.stat().st_mode for f in one.iterdir()} == modes
    revert(file, other, out=tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert contents(other) == after
    assert {f.name for f in tmp_path.iterdir()} == {"one", "other", "p", "out"}


def test_applying_is_its_own_reverse(tmp_path: Path) -> None:
    """The file alone says it: the same exclusive or leads either way."""
    one, other = pair(tmp_path)
    patch = Patch.open(between(one, other, tmp_path / "p"))
    for of in patch.files:
        rewrite(patch, of, one / of.name, tmp_path / "there", of.target)
        rewrite(patch, of, tmp_path / "there", tmp_path / "back", of.source)
        assert (tmp_path / "back").read_bytes() == (one / of.name).read_bytes()


def test_the_count_is_of_changed_entries(tmp_path: Path) -> None:
    one, other = pair(tmp_path, 0.1)
    patch = Patch.open(between(one, other, tmp_path / "p"))
    for of in patch.files:
        before, after = load_file(one / of.name), load_file(other / of.name)
        counts = {}
        for name, tensor in before.items():
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
            counts[name] = int((tensor.view(kind) != after[name].view(kind)).sum())
        assert {s.name: s.changed for s in of.sections} == {n: c for n, c in counts.items() if c}


def test_a_few_changed_entries_make_a_small_patch(tmp_path: Path) -> None:
    """A tensor of several chunks: the sparse form costs less than four bytes an entry beyond its value."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    before = torch.randn(3, CHUNK, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = before.clone().view(-1)
    where = torch.randperm(after.numel(), generator=torch.Generator().manual_seed(1))[: after.numel() // 100]
    after[where] = after[where] * 1.5 + 0.1
    after[after.numel() // 3 * 2 :] = before.view(-1)[
        after.numel() // 3 * 2 :
    ]  # no chunk where nothing differs
    changed = int((after.view(torch.int16) != before.view(-1).view(torch.int16)).sum())
    save_file({"w": before}, tmp_path / "one" / "a.safetensors")
    save_file({"w": after.view(3, -1)}, tmp_path / "other" / "a.safetensors")
    file = between(tmp_path / "one", tmp_path / "other", tmp_path / "p")
    (section,) = Patch.open(file).files[0].sections
    assert [c.kind for c in section.chunks] == ["sparse"] * 2
    assert section.changed == changed
    assert file.stat().st_size < 1000 + 4 * changed
    expected = contents(tmp_path / "other")
    apply(file, tmp_path / "one")
    assert contents(tmp_path / "one") == expected


@pytest.mark.parametrize(("old", "new"), [(10, 30), (30, 10), (0, 5), (5, 0), (1 << 21, 3 << 20)])
def test_a_file_may_change_its_size(tmp_path: Path, old: int, new: int) -> None:
    for name, size in (("one", old), ("other", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.json").write_bytes(random.Random(size).randbytes(size))
    before, after = contents(tmp_path / "one"), contents(tmp_path / "other")
    file = between(tmp_path / "one", tmp_path / "other", tmp_path / "p")
    apply(file, tmp_path / "one")
    assert contents(tmp_path / "one") == after
    revert(file, tmp_path / "one")
    assert contents(tmp_path / "one") == before


def test_what_is_not_patched_stays(tmp_path: Path) -> None:
    """Other files, folders, links and hidden files are the same files afterwards; the model may be a link."""
    one, other = pair(tmp_path)
    file = between(one, other, tmp_path / "p")
    expected = contents(other)
    (one / "sub").mkdir()
    (one / "sub" / "tokenizer.json").write_text("{}")
    (one / ".hidden").write_text("x")
    (one / "linked").symlink_to("sub")
    (tmp_path / "store").mkdir()
    (one / "0.safetensors").rename(tmp_path / "store" / "blob")
    (one / "0.safetensors").symlink_to("../store/blob")
    inode, blob = (one / ".hidden").stat().st_ino, (tmp_path / "store" / "blob").read_bytes()
    (tmp_path / "alias").symlink_to(one)
    apply(file, tmp_path / "alias")
    assert (tmp_path / "alias").is_symlink()
    assert {n: d for n, d in contents(one).items() if n in expected} == expected
    assert (one / "sub" / "tokenizer.json").read_text() == "{}"
    assert (one / "linked").is_symlink()
    assert (one / ".hidden").stat().st_ino == inode
    assert (tmp_path / "store" / "blob").read_bytes() == blob
    revert(file, one, out=tmp_path / "out")
    assert (tmp_path / "out" / "linked" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / ".hidden").stat().st_ino != inode


def test_another_model_is_refused_untouched(tmp_path: Path) -> None:
    one, other = pair(tmp_path)
    file = between(one, other, tmp_path / "p")
    assert not apply(file, other).done  # it is as wanted already
    assert not revert(file, one).done
    with pytest.raises(UserError, match="is already what `resafe apply` would make"):
        apply(file, other, out=tmp_path / "out")
    mixed = shutil.copytree(one, tmp_path / "mixed")
    shutil.copy(other / "1.safetensors", mixed / "1.safetensors")
    strange = shutil.copytree(one, tmp_path / "strange")
    data = bytearray((strange / "1.safetensors").read_bytes())
    data[-1] ^= 1
    (strange / "1.safetensors").write_bytes(data)
    for folder in (mixed, strange):
        before = contents(folder)
        for verb in (apply, revert):
            with pytest.raises(UserError, match="the very model"):
                verb(file, folder)
        assert contents(folder) == before
    (strange / "1.safetensors").unlink()
    for folder, reason in ((strange, "has no 1.safetensors"), (tmp_path / "no", "is not a folder")):
        with pytest.raises(UserError, match=reason):
            apply(file, folder)
    for given in (tmp_path / "no", one):
        with pytest.raises(UserError, match="there is no patch"):
            apply(given, one)
    assert {f.name for f in tmp_path.iterdir()} == {"one", "other", "p", "mixed", "strange"}


@pytest.mark.parametrize("call", ["rename", "replace", "unlink", "rmdir", "fsync", "link", "exchange"])
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Killed before each call that names, removes or syncs a file: the model is as before or as wanted."""
    one, other = pair(tmp_path)
    (one / "sub").mkdir()
    (one / "sub" / "f").write_text("x")
    file = _patch_of(one, other, tmp_path / "p")
    before = contents(one)
    after = before | contents(other)
    module, name = (patch_verbs, "_exchange") if call == "exchange" else (os, call)
    real = getattr(module, name)

    def run(step: int) -> None:
        calls = iter(range(1000))

        def deadly(*arguments: object, **more: object) -> object:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        setattr(module, name, deadly)
        apply(file, one)

    seen = set()
    for step in range(100):
        code = wait_for(fork(lambda step=step: run(step), tmp_path)[0])
        found = contents(one)
        assert found in (before, after)
        seen.add((code, found == after))
        apply(file, one)  # the same command finishes it
        assert contents(one) == after
        assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
        revert(file, one)
        if code == 0:
            break
    assert step > 0
    assert (0, True) in seen
    assert any(code == -signal.SIGKILL for code, _ in seen)


def _patch_of(one: Path, other: Path, file: Path) -> Path:
    with PatchWriter(file) as patch:
        for name in ("0.safetensors", "1.safetensors"):
            patch.add_file(one / name, other / name)
    return file


def test_a_failed_patch_is_no_patch(tmp_path: Path) -> None:
    one, _ = pair(tmp_path)
    shard = Shard.open(one / "0.safetensors")

    def run() -> None:
        with PatchWriter(tmp_path / "p") as patch:
            patch.add_shard(shard, {"0.w0.torch.float32"}, lambda info, tensor: tensor * float("nan"))

    with pytest.raises(UserError, match="NaN"):
        run()
    with pytest.raises(UserError):
        Patch.open(tmp_path / "p")


# Damaged files -------------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def parts(data: bytes) -> tuple[bytes, dict[str, object]]:
    """Split a patch into its chunks and its footer."""
    (length,) = struct.unpack("<Q", data[-40:-32])
    return data[: -40 - length], json.loads(data[-40 - length : -40])


def joined(chunks: bytes, footer: object) -> bytes:
    text = footer if isinstance(footer, bytes) else json.dumps(footer).encode()
    return sealed(chunks + text + struct.pack("<Q", len(text)))


def refused(file: Path, data: bytes, folder: Path) -> None:
    before = contents(folder)
    file.write_bytes(data)
    with pytest.raises(UserError):
        apply(file, folder)
    with suppress(UserError):  # where the hashes are those of the source there is nothing to take back
        assert not revert(file, folder).done
    assert contents(folder) == before


def test_no_cut_and_no_flipped_bit_gets_through(tmp_path: Path) -> None:
    one, other = pair(tmp_path, 0.001)
    file = between(one, other, tmp_path / "p")
    data, draw = file.read_bytes(), random.Random(0)
    bad = tmp_path / "bad"
    for length in [0, 1, 7, 8, 39, 47, 48, len(data) - 1, *(draw.randrange(len(data)) for _ in range(100))]:
        bad.write_bytes(data[:length])
        with pytest.raises(UserError):
            Patch.open(bad)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        bad.write_bytes(flipped)
        with pytest.raises(UserError):
            Patch.open(bad)
    bad.write_bytes(data + b"\0")
    with pytest.raises(UserError):
        Patch.open(bad)
    refused(bad, sealed(MAGIC + struct.pack("<Q", 1 << 60)), one)


def test_random_damage_below_a_good_digest(tmp_path: Path) -> None:
    """A file can be sealed again: whatever its bytes say, the model is right or untouched, and no other error."""
    one, other = pair(tmp_path, 0.02)
    file = between(one, other, tmp_path / "p")
    data, draw = file.read_bytes()[:-32], random.Random(1)
    before, after = contents(one), contents(other)
    refusals = 0
    for _ in range(400):
        flipped = bytearray(data)
        for _ in range(draw.choice((1, 1, 3, 20))):
            flipped[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "bad").write_bytes(sealed(bytes(flipped)))
        try:
            apply(tmp_path / "bad", one)
        except UserError:
            refusals += 1
            assert contents(one) == before
        else:
            assert contents(one) == after  # a name or a count was hit that nothing depends on
            revert(file, one)
    assert refusals > 300


EDITS: dict[str, Callable[[dict[str, object]], object]] = {
    "no files": lambda f: f.clear(),
    "empty": lambda f: f["files"].clear(),
    "not a list": lambda f: f.update(files={"a": 1}),
    "twice": lambda f: f["files"].append(f["files"][0]),
    "outside": lambda f: f["files"][0].update(name="../one/0.safetensors"),
    "absolute": lambda f: f["files"][0].update(name="/etc/passwd"),
    "dots": lambda f: f["files"][0].update(name=".."),
    "null": lambda f: f["files"][0].update(name="a\0b"),
    "surrogate": lambda f: f["files"][0].update(name="a\ud800b"),
    "folder": lambda f: f["files"][0].update(name="sub"),
    "negative": lambda f: f["files"][0]["source"].update(bytes=-1),
    "huge": lambda f: f["files"][0]["target"].update(bytes=1 << 62),
    "larger than huge": lambda f: f["files"][0]["target"].update(bytes=1 << 70),
    "short hash": lambda f: f["files"][0]["source"].update(sha256="00"),
    "wrong target": lambda f: f["files"][0]["target"].update(sha256="0" * 64),
    "true": lambda f: f["files"][0]["sections"][0].update(width=True),
    "width": lambda f: f["files"][0]["sections"][0].update(width=3),
    "overlap": lambda f: f["files"][0]["sections"].append(f["files"][0]["sections"][0]),
    "beyond": lambda f: f["files"][0]["sections"][-1].update(start=1 << 40),
    "many entries": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(entries=CHUNK + 1),
    "no entries": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(entries=0),
    "kind": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(kind="pickle"),
    "other kind": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(kind="dense"),
    "into the footer": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(bytes=1 << 20),
    "cut": lambda f: f["files"][0]["sections"][0]["chunks"][0].update(bytes=4),
    "gone": lambda f: f["files"][0]["sections"].clear(),
    "no longer changed": lambda f: f["files"][0].update(target=f["files"][0]["source"]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_footer_that_lies(tmp_path: Path, edit: str) -> None:
    one, other = pair(tmp_path)
    (one / "sub").mkdir()
    chunks, footer = parts(_patch_of(one, other, tmp_path / "p").read_bytes())
    EDITS[edit](footer)
    refused(tmp_path / "bad", joined(chunks, footer), one)


@pytest.mark.parametrize("footer", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"files": [[]]}'])
def test_a_footer_that_is_none(tmp_path: Path, footer: bytes) -> None:
    one, _ = pair(tmp_path)
    refused(tmp_path / "bad", joined(MAGIC, footer), one)


def test_a_chunk_that_lies(tmp_path: Path) -> None:
    """Too much, too little, beyond the end: a bomb is not unpacked beyond what its entries need."""
    one, other = pair(tmp_path)
    _, footer = parts(_patch_of(one, other, tmp_path / "p").read_bytes())
    section = footer["files"][0]["sections"][0]
    section["changed"], width, entries = 1, section["width"], section["entries"]
    far = np.array([entries], "<u4").tobytes() + bytes(width)
    for kind, payload in (
        ("dense", bytes(entries * width - 1)),
        ("dense", bytes(100_000_000)),
        ("sparse", bytes(100_000_000)),
        ("sparse", bytes(5)),
        ("sparse", far),
    ):
        data = zlib.compress(payload)
        chunk = {"first": 0, "entries": entries, "kind": kind, "at": 8, "bytes": len(data)}
        section["chunks"] = [chunk]
        footer["files"][0]["sections"] = [section]
        refused(tmp_path / "bad", joined(MAGIC + data, footer), one)


def test_adapters_that_grow(tmp_path: Path) -> None:
    for name, rank in (("one", 4), ("other", 6)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.randn(rank, 9), "b": torch.randn(9, rank)}, tmp_path / name / WEIGHTS)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    before, after = contents(tmp_path / "one"), contents(tmp_path / "other")
    file = between(tmp_path / "one", tmp_path / "other", tmp_path / "p")
    apply(file, tmp_path / "one")
    assert contents(tmp_path / "one") == after
    revert(file, tmp_path / "one")
    assert contents(tmp_path / "one") == before
