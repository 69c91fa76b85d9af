"""Write an edited checkpoint beside its source: same shards, same names, and never a half-finished folder.

A run writes into a hidden folder next to the wanted one, notes every finished shard in a journal, and
renames the folder only when all is on disk. A killed run therefore leaves nothing that looks finished;
the same command finds the journal, checks that it is its own, and goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

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
_FLUSH = 64 << 20  # bytes written between two flushes
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

    def record(self, name: str, digest: str | None = None) -> None:
        """Note that a weight file is complete and on disk; its SHA-256 is taken where not given."""
        self.done[name] = digest or sha256(self.folder / name)
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
        if file.is_dir() and not file.is_symlink():
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
            f"cannot write {out}: {_size(nbytes + _MARGIN)} are needed and {_size(free)} are free; "
            "free space or choose another --out"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def write_shard(
    source: Shard, target: Path, targets: Collection[str], transform: Transform, workers: int = WORKERS
) -> str:
    """Write ``source`` with the tensors in ``targets`` transformed; every other byte stays as it is.

    Tensors are read, transformed and written ``workers`` at a time, each at its own offset, so that memory
    holds a few tensors whatever the shard's size. Meanwhile the disk takes what is written, and each tensor
    is hashed, in file order, before it is let go. Returns the SHA-256 of the file.

    Raises:
        UserError: a tensor holds NaN or infinity, before or after the transform.
    """
    with target.open("wb") as stream:
        stream.write(source.header)
        os.ftruncate(stream.fileno(), source.nbytes)
        stream.flush()
        digest = hashlib.sha256(source.header)

        def one(info: TensorInfo, before: Future[None] | None) -> None:
            tensor = read(info)
            check_finite(tensor, info)
            if info.name in targets:
                tensor = transform(info, tensor)
                if tensor.shape != info.shape or tensor.dtype != info.dtype:
                    raise AssertionError(f"the transform of {info.name} changed its shape or type")
                check_finite(tensor, info, edited=True)
            data = raw(tensor)
            _write_at(stream.fileno(), data, info.offset)
            flusher.wrote(len(data))
            if before is not None:
                before.result()  # the digest runs over the file in order
            digest.update(data)

        threads = max(1, torch.get_num_threads() // workers)
        with (
            _Flusher(stream.fileno()) as flusher,
            _threads_kept(),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool,
        ):
            jobs: list[Future[None]] = []
            for info in source.tensors.values():
                if info.nbytes:
                    jobs.append(pool.submit(one, info, jobs[-1] if jobs else None))
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
                wait(jobs)
        os.fsync(stream.fileno())
    return digest.hexdigest()


class _Flusher:
    """Sends what was written to the disk while more is being made, so that the final fsync is short."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._waiting = 0
        self._lock = Lock()

    def wrote(self, nbytes: int) -> None:
        """Note that so many bytes more are in the page cache."""
        with self._lock:
            self._waiting += nbytes
            if self._waiting >= _FLUSH and (self._running is None or self._running.done()):
                self._waiting = 0
                self._running = self._pool.submit(os.fdatasync, self._descriptor)

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()
        if self._running is not None and raised[0] is None:
            self._running.result()  # a disk error is told to one fsync only


@contextmanager
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one pass for the two extremes, which a NaN becomes both of."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def check_finite(tensor: Tensor, info: TensorInfo, *, edited: bool = False) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: naming the tensor and its file.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or all_finite(tensor):
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
