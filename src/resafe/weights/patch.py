"""A patch file: what turns one model into another, byte for byte, and back.

For every file of the model it holds size and SHA-256 before and after, and between the two the exclusive or of
their bits, one tensor at a time, where they differ. So the same rule applies a patch and reverts it:
``target = source ^ x`` and ``source = target ^ x``. docs/patch.md specifies the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from resafe.errors import UserError
from resafe.weights.checkpoint import sha256
from resafe.weights.shard import Shard, raw, read
from resafe.weights.writer import Transform, check_finite, fsync_file

PATCH = "repair.patch"  # its name in the folder that `repair --format patch` makes
MAGIC = b"RESAFEP1"
CHUNK = 1 << 20  # the most entries of a chunk: what a reader must hold at once
_BLOCK = 16 << 20  # bytes copied at once where nothing changes
_WIDTHS = (1, 2, 4, 8)  # bytes of an entry
_TAIL = 8 + 32  # the footer's length, and the digest
_THREADS = 2

Kind = Literal["dense", "sparse"]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Mark:
    """By which a file is known: its size and its SHA-256."""

    bytes: int
    sha256: str

    @staticmethod
    def of(file: Path) -> Mark:
        """Read a file and return its mark."""
        return Mark(file.stat().st_size, sha256(file))


@dataclass(frozen=True)
class Chunk:
    """The difference of a run of entries: ``first`` and ``entries`` count within the section."""

    first: int
    entries: int
    kind: Kind
    at: int  # where its compressed bytes lie in the patch
    bytes: int


@dataclass(frozen=True)
class Section:
    """The difference of one tensor; of a whole file that is no tensor file, under no name."""

    name: str
    start: int  # where it begins in the patched file
    width: int  # bytes of an entry
    entries: int
    changed: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class PatchedFile:
    """One file of the model, before and after; without sections the two are the same."""

    name: str
    source: Mark
    target: Mark
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Patch:
    """An opened patch file."""

    file: Path
    sha256: str
    files: tuple[PatchedFile, ...]

    @staticmethod
    def open(file: Path) -> Patch:
        """Read and check a patch, without unpacking it.

        Raises:
            UserError: the file is no patch, or is damaged.
        """
        size = file.stat().st_size
        with file.open("rb") as stream:
            if size < len(MAGIC) + _TAIL or stream.read(len(MAGIC)) != MAGIC:
                raise UserError(
                    f"{file} is not a patch; give the one that `resafe repair --format patch` wrote"
                )
            digest = _digest(stream, size - 32)
            if stream.read(32) != digest:
                raise UserError(f"{file} is damaged or cut short; copy it again")
            stream.seek(size - _TAIL)
            (length,) = struct.unpack("<Q", stream.read(8))
            end = size - _TAIL - length
            if end < len(MAGIC):
                raise UserError(f"{file} is damaged: its footer is longer than itself; copy it again")
            stream.seek(end)
            footer = stream.read(length)
        try:
            return Patch(file, digest.hex(), _files(json.loads(footer), end))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged: its footer cannot be read ({error}); copy it again"
            ) from error

    @property
    def changed(self) -> int:
        """Number of entries that the patch changes."""
        return sum(section.changed for file in self.files for section in file.sections)


def _digest(stream: BinaryIO, nbytes: int) -> bytes:
    stream.seek(0)
    digest = hashlib.sha256()
    for start in range(0, nbytes, _BLOCK):
        digest.update(stream.read(min(_BLOCK, nbytes - start)))
    return digest.digest()


# Reading the footer --------------------------------------------------------------------------------------


def _files(footer: Mapping[str, object], end: int) -> tuple[PatchedFile, ...]:
    """Read the footer of a patch whose chunks end at ``end``.

    Raises:
        ValueError, KeyError, TypeError: it is malformed.
    """
    files = tuple(_file(entry, end) for entry in _list(footer["files"]))
    if not files or len({file.name for file in files}) < len(files):
        raise ValueError("a file is named twice, or none is")
    return files


def _file(entry: Mapping[str, object], end: int) -> PatchedFile:
    name = str(entry["name"])
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} is no plain file name")
    source, target = _mark(entry["source"]), _mark(entry["target"])
    sections = tuple(_section(section, end) for section in _list(entry["sections"]))
    reached = 0
    for section in sections:
        if section.start < reached:
            raise ValueError(f"sections of {name} overlap")
        reached = section.start + section.entries * section.width
    if reached > max(source.bytes, target.bytes):
        raise ValueError(f"a section reaches beyond {name}")
    if sections and source == target:
        raise ValueError(f"{name} has sections and claims to stay as it is")
    return PatchedFile(name, source, target, sections)


def _mark(entry: object) -> Mark:
    if not isinstance(entry, dict) or len(str(entry["sha256"])) != 64:
        raise ValueError("a file's hash is malformed")
    return Mark(_count(entry["bytes"]), str(entry["sha256"]))


def _section(entry: Mapping[str, object], end: int) -> Section:
    chunks = tuple(_chunk(chunk, end) for chunk in _list(entry["chunks"]))
    start, width, entries, changed = (_count(entry[key]) for key in ("start", "width", "entries", "changed"))
    section = Section(str(entry["name"]), start, width, entries, changed, chunks)
    reached = 0
    for chunk in chunks:
        if chunk.first < reached:
            raise ValueError(f"chunks of {section.name!r} overlap")
        reached = chunk.first + chunk.entries
    if (
        reached > section.entries
        or section.width not in _WIDTHS
        or not 0 < section.changed <= section.entries
    ):
        raise ValueError(f"the numbers of {section.name!r} do not fit together")
    return section


def _chunk(entry: Mapping[str, object], end: int) -> Chunk:
    first, entries, at, nbytes = (_count(entry[key]) for key in ("first", "entries", "at", "bytes"))
    kind = entry["kind"]
    if kind not in ("dense", "sparse") or not 0 < entries <= CHUNK or at < len(MAGIC) or at + nbytes > end:
        raise ValueError("a chunk's numbers do not fit together")
    return Chunk(first, entries, "sparse" if kind == "sparse" else "dense", at, nbytes)


def _list(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise TypeError("a list is malformed")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


# Making a patch ------------------------------------------------------------------------------------------


class PatchWriter:
    """Writes a patch one file of the model at a time, holding one tensor before and after."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")
        self._pool = ThreadPoolExecutor(_THREADS)
        self._digest = hashlib.sha256()
        self._files: list[PatchedFile] = []
        self._at = 0
        self._write(MAGIC)

    def __enter__(self) -> PatchWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Write the footer, unless something went wrong, and bring the file to disk."""
        with self._stream, self._pool:
            if kind is None:
                footer = json.dumps({"files": [asdict(file) for file in self._files]}).encode()
                self._write(footer + struct.pack("<Q", len(footer)))
                self._stream.write(self._digest.digest())
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def add_shard(self, shard: Shard, targets: Collection[str], transform: Transform) -> None:
        """Add a file of tensors of which those in ``targets`` become what ``transform`` makes of them.

        Raises:
            UserError: a tensor holds NaN or infinity, before or after.
        """
        old, new = hashlib.sha256(shard.header), hashlib.sha256(shard.header)
        sections = []
        for info in shard.tensors.values():
            before = after = read(info)
            check_finite(before, info)
            if info.name in targets:
                after = transform(info, before)
                check_finite(after, info, edited=True)
                sections += self._section(
                    info.name, info.offset, info.dtype.itemsize, raw(before), raw(after)
                )
            old.update(raw(before))
            new.update(raw(after))
        source, target = (Mark(shard.nbytes, digest.hexdigest()) for digest in (old, new))
        self._files.append(PatchedFile(shard.file.name, source, target, tuple(sections)))

    def add_file(self, source: Path, target: Path) -> None:
        """Add a file that becomes another: tensor by tensor where both hold the same ones, else whole."""
        if source.suffix == ".safetensors":
            one, other = Shard.open(source), Shard.open(target)
            if one.header == other.header:
                self.add_shard(one, one.tensors, lambda info, _: read(other.tensors[info.name]))
                return
        marks = [Mark.of(file) for file in (source, target)]
        end, sections = max(mark.bytes for mark in marks), []
        for start in range(0, end, _BLOCK):
            nbytes = min(_BLOCK, end - start)
            pair = (_bytes_of(file, start, nbytes).ljust(nbytes, b"\0") for file in (source, target))
            sections += self._section("", start, 1, *pair)
        self._files.append(PatchedFile(source.name, marks[0], marks[1], tuple(sections)))

    def _section(
        self, name: str, start: int, width: int, old: bytes | memoryview, new: bytes | memoryview
    ) -> list[Section]:
        """Write what two tensors differ in; nothing where they do not."""
        one, other = (np.frombuffer(data, dtype=f"<u{width}") for data in (old, new))
        starts = range(0, len(one), CHUNK)
        pieces = self._pool.map(lambda i: _pack(one[i : i + CHUNK] ^ other[i : i + CHUNK]), starts)
        chunks, changed = [], 0
        for first, (kind, count, data) in zip(starts, pieces, strict=True):
            if count:
                changed += count
                chunks.append(Chunk(first, min(CHUNK, len(one) - first), kind, self._at, len(data)))
                self._write(data)
        return [Section(name, start, width, len(one), changed, tuple(chunks))] if chunks else []

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._at += len(data)


def _pack(x: NDArray[np.unsignedinteger]) -> tuple[Kind, int, bytes]:
    """Return how a chunk's difference is stored, how many entries differ, and its compressed bytes.

    The bytes of all entries lie side by side by their place in the entry: the high ones hardly ever change.
    """
    where = np.flatnonzero(x)
    if 4 * len(where) >= len(x):
        return "dense", len(where), _deflate(_planes(x))
    gaps = np.diff(where, prepend=0).astype("<u4")
    return "sparse", len(where), _deflate(_planes(gaps) + _planes(x[where]))


def _deflate(data: bytes) -> bytes:
    """Compress, looking for runs only: on such bytes as small as the whole search, and several times as fast."""
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _planes(x: NDArray[np.unsignedinteger]) -> bytes:
    return x.view(np.uint8).reshape(len(x), x.itemsize).T.tobytes()


# Using a patch -------------------------------------------------------------------------------------------


def rewrite(patch: Patch, of: PatchedFile, source: Path, target: Path, wanted: Mark) -> None:
    """Write the side ``wanted`` of a file to ``target``, from the other one at ``source``, and bring it to disk.

    Raises:
        UserError: a chunk is damaged, or the result is not what the patch promises.
    """
    target.touch()

    def one(span: tuple[int, int, Section | None, Chunk | None]) -> None:
        start, nbytes, section, chunk = span
        data = np.frombuffer(_bytes_of(source, start, nbytes).ljust(nbytes, b"\0"), dtype=np.uint8)
        if section is not None and chunk is not None:
            data = data ^ _unpack(patch, section, chunk)
        with target.open("r+b") as stream:
            stream.seek(start)
            stream.write(data[: max(0, wanted.bytes - start)].data)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(one, _spans(of)):
            pass
    shutil.copymode(source, target)
    fsync_file(target)
    if Mark.of(target) != wanted:
        raise UserError(f"{patch.file} does not make of {source} what it promises; make the patch again")


def _spans(of: PatchedFile) -> Iterator[tuple[int, int, Section | None, Chunk | None]]:
    """Yield (start, bytes, section, chunk) for all of a file: the chunks, and what lies between them."""
    done = 0
    for section in of.sections:
        for chunk in section.chunks:
            start = section.start + chunk.first * section.width
            yield from ((at, min(_BLOCK, start - at), None, None) for at in range(done, start, _BLOCK))
            yield start, chunk.entries * section.width, section, chunk
            done = start + chunk.entries * section.width
    end = max(of.source.bytes, of.target.bytes)
    yield from ((at, min(_BLOCK, end - at), None, None) for at in range(done, end, _BLOCK))


def _unpack(patch: Patch, section: Section, chunk: Chunk) -> Bytes:
    """Return the difference of a chunk, as bytes in file order."""
    damaged = UserError(f"{patch.file} is damaged: a chunk of {section.name!r} is malformed; copy it again")
    width = section.width if chunk.kind == "dense" else section.width + 4
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(_bytes_of(patch.file, chunk.at, chunk.bytes), chunk.entries * width + 1)
    except zlib.error as error:
        raise damaged from error
    count, rest = divmod(len(data), width)
    if (
        rest
        or not unpacker.eof
        or (count != chunk.entries if chunk.kind == "dense" else count > chunk.entries)
    ):
        raise damaged
    rows = np.frombuffer(data, dtype=np.uint8).reshape(width, count).T  # (count, width)
    if chunk.kind == "dense":
        return np.ascontiguousarray(rows).reshape(-1)
    where = np.cumsum(np.ascontiguousarray(rows[:, :4]).view("<u4").reshape(-1), dtype=np.int64)
    if count and where[-1] >= chunk.entries:
        raise damaged
    x = np.zeros((chunk.entries, section.width), dtype=np.uint8)
    x[where] = rows[:, 4:]
    return x.reshape(-1)


def _bytes_of(file: Path, start: int, nbytes: int) -> bytes:
    """Read a range of a file; less where it ends before."""
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(nbytes)
