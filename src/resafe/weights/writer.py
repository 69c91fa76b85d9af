"""Write an edited checkpoint beside its source: same shards, same names, and never a half-finished folder.

A run writes into a hidden folder next to the wanted one, notes every finished shard in a journal, and
renames the folder only when all is on disk. A killed run therefore leaves nothing that looks finished;
the same command finds the journal, checks that it is its own, and goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from resafe.errors import UserError
from resafe.weights.checkpoint import read_json, sha256
from resafe.weights.shard import Shard, TensorInfo, raw, read

# Receives a tensor as read from the source; returns what to write, of the same shape and type.
Transform = Callable[[TensorInfo, Tensor], Tensor]

JOURNAL = "resafe-partial.json"
WORKERS = 2  # one reads while the other computes or writes; more would only hold more memory
_MARGIN = 1 << 20  # bytes for the small files
_CANNOT_WRITE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EFBIG,
        errno.ENAMETOOLONG,
    }
)


@dataclass(frozen=True)
class Staging:
    """The hidden folder that a run fills before it is renamed to ``out``."""

    folder: Path
    out: Path
    done: dict[str, str]  # finished weight file -> SHA-256

    def record(self, name: str) -> None:
        """Note that a weight file is complete and on disk."""
        self.done[name] = sha256(self.folder / name)
        self._save()

    def _save(self) -> None:
        journal = self.folder / JOURNAL
        state = json.loads(journal.read_text(encoding="utf-8"))
        temporary = journal.with_suffix(".tmp")
        _write_synced(temporary, json.dumps({**state, "done": self.done}).encode())
        os.replace(temporary, journal)


def check_free(out: Path) -> None:
    """Refuse an output folder that already holds something.

    Raises:
        UserError: ``out`` exists and is not an empty folder, or a disk is mounted there.
    """
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already holds something; choose another --out or remove it first")
    if out.is_mount():  # a finished folder is renamed into place, and cannot be renamed over a mounted disk
        raise UserError(f"a disk is mounted at {out}; give a folder inside it as --out")


@contextmanager
def staged(out: Path, key: str, nbytes: int) -> Iterator[Staging]:
    """Open the staging folder of ``out``, and move it into place when the block ends well.

    Args:
        out: the folder to make.
        key: what identifies this very job (inputs, method, parameters); only the same job resumes.
        nbytes: how much will be written, to refuse a full disk before anything is.

    Raises:
        UserError: ``out`` holds something already, or the disk is too small or fills up.
    """
    check_free(out)
    folder = out.absolute().parent / f".{out.name}.resafe-partial"
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        done = _resume(folder, key)
        _check_space(out, nbytes - sum((folder / name).stat().st_size for name in done))
        folder.mkdir(parents=True, exist_ok=True)
        _write_synced(folder / JOURNAL, json.dumps({"key": key, "done": done}).encode())
        yield Staging(folder, out, done)
        (folder / JOURNAL).unlink()
        _sync_folder(folder)
        if out.is_dir():
            out.rmdir()
        os.rename(folder, out)
        _sync_folder(out.absolute().parent)
    except UserError:
        _clear(folder, parents)
        raise
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _clear(folder, parents)
        raise UserError(
            f"cannot write {out}: {error.strerror}; free space or choose another --out"
        ) from error


def _clear(folder: Path, parents: Sequence[Path]) -> None:
    """Remove the staging folder, and the folders above it that were made for it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # somebody else has put something there meanwhile
        for parent in parents:
            parent.rmdir()


def _resume(folder: Path, key: str) -> dict[str, str]:
    """Return the finished files of an earlier run of the same job, and clear anything else away."""
    finished = {n: h for n, h in _noted(folder / JOURNAL, key).items() if (folder / n).is_file()}
    finished = {name: digest for name, digest in finished.items() if sha256(folder / name) == digest}
    if not finished:
        shutil.rmtree(folder, ignore_errors=True)
    for file in sorted(folder.rglob("*"), reverse=True):  # what was being written when the run was killed
        if file.is_dir():
            file.rmdir()
        elif str(file.relative_to(folder)) not in finished:
            file.unlink()
    return finished


def _noted(journal: Path, key: str) -> dict[str, str]:
    """Return what a journal says is finished, if it is this job's and whole."""
    try:
        state = read_json(journal)
    except (UserError, FileNotFoundError):
        return {}
    done = state.get("done")
    mine = state.get("key") == key and isinstance(done, dict)
    return (
        {str(name): str(digest) for name, digest in done.items()} if mine and isinstance(done, dict) else {}
    )


def _check_space(out: Path, nbytes: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes + _MARGIN:
        raise UserError(
            f"cannot write {out}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free space or choose another --out"
        )


def write_shard(
    source: Shard, target: Path, targets: Collection[str], transform: Transform, workers: int = WORKERS
) -> None:
    """Write ``source`` with the tensors in ``targets`` transformed; every other byte stays as it is.

    Tensors are read, transformed and written ``workers`` at a time, each at its own offset, so that memory
    holds a few tensors whatever the shard's size.

    Raises:
        UserError: a tensor holds NaN or infinity, before or after the transform.
    """
    with target.open("wb") as stream:
        stream.write(source.header)
        os.ftruncate(stream.fileno(), source.nbytes)
        stream.flush()

        def one(info: TensorInfo) -> None:
            tensor = read(info)
            check_finite(tensor, info)
            if info.name in targets:
                tensor = transform(info, tensor)
                if tensor.shape != info.shape or tensor.dtype != info.dtype:
                    raise AssertionError(f"the transform of {info.name} changed its shape or type")
                check_finite(tensor, info, edited=True)
            _write_at(stream.fileno(), raw(tensor), info.offset)

        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(one, info) for info in source.tensors.values() if info.nbytes]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
                wait(jobs)
        os.fsync(stream.fileno())


def check_finite(tensor: Tensor, info: TensorInfo, *, edited: bool = False) -> None:
    """Refuse NaN and infinity.

    The sum is one cheap pass and is finite for nearly every healthy tensor; only where it is not
    are the entries looked at one by one.

    Raises:
        UserError: naming the tensor and its file.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad and edited:
        raise UserError(
            f"the edit of {info.name} in {info.file} gives {bad} entries that are NaN or infinite; "
            f"look for them in the reference and the base, or for values too large for {info.dtype}"
        )
    if bad:
        raise UserError(
            f"{info.name} in {info.file} has {bad} entries that are NaN or infinite; "
            "use a checkpoint from before the training diverged"
        )


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and bring it to disk.

    Raises:
        OSError: as for any other file; safetensors has an error of its own for it.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    os.chmod(file, stat.S_IMODE((file.parent / JOURNAL).stat().st_mode))  # it is made for its owner only
    fsync_file(file)


def fsync_file(file: Path) -> None:
    """Bring a file that was written elsewhere to disk."""
    _sync_folder(file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy small files, keyed by their name in ``target``, and bring them to disk."""
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _write_synced(target / name, file.read_bytes())


def write_text(file: Path, text: str) -> None:
    """Write a text file and bring it to disk."""
    _write_synced(file, text.encode())


def write_json(file: Path, data: Mapping[str, object]) -> None:
    """Write a JSON object and bring it to disk."""
    _write_synced(file, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
