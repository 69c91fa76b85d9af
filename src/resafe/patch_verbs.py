"""Apply a patch to a model folder, or take it back: the whole folder changes in one step, or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resafe.errors import UserError
from resafe.weights.patch import PATCH, Mark, Patch, rewrite
from resafe.weights.writer import Staging, fsync_file, staged

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_CWD = -100
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Patched:
    """What applying or reverting a patch did.

    Attributes:
        verb: ``apply`` or ``revert``.
        patch: the patch file.
        folder: the model as it is now.
        done: False where the model was as wanted before.
        changed: number of entries that the patch changes.
        files: SHA-256 of every file that the patch covers, as they are now.
    """

    verb: str
    patch: Path
    folder: Path
    done: bool
    changed: int
    files: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return the same as JSON."""
        return {
            "verb": self.verb,
            "patch": str(self.patch),
            "folder": str(self.folder),
            "done": self.done,
            "changed": self.changed,
            "files": self.files,
        }


def apply(
    patch: str | Path, folder: str | Path, *, out: str | Path | None = None, progress: Progress | None = None
) -> Patched:
    """Apply a patch to the model it was made for.

    Args:
        patch: the patch file, or the folder that holds it.
        folder: the model to change, in place.
        out: folder to write the result to instead; ``folder`` then stays as it is.
        progress: called with (step, done, total).

    Raises:
        UserError: the patch is damaged or was made for another model; nothing has changed then.
    """
    return _patched("apply", patch, folder, out, progress)


def revert(
    patch: str | Path, folder: str | Path, *, out: str | Path | None = None, progress: Progress | None = None
) -> Patched:
    """Take a patch back from a model it was applied to; arguments and errors as for :func:`apply`."""
    return _patched("revert", patch, folder, out, progress)


def _patched(
    verb: str, file: str | Path, folder: str | Path, out: str | Path | None, progress: Progress | None
) -> Patched:
    patch, model = Patch.open(_patch_file(Path(file))), Path(folder).expanduser().resolve()
    if not model.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of the model that the patch was made for")
    sides = {
        one.name: (one.source, one.target) if verb == "apply" else (one.target, one.source)
        for one in patch.files
    }
    before, after = ({name: pair[side] for name, pair in sides.items()} for side in (0, 1))
    if out is None:
        shutil.rmtree(_beside(model), ignore_errors=True)  # left by a run that was killed at its very end
    done = _holds(model, before, after, verb, patch.file)
    place = model if out is None else Path(out)
    if done:
        _write(patch, model, place, after, out is None, verb, progress)
    elif out is not None:
        raise UserError(
            f"{folder} is already what `resafe {verb}` would make of it; nothing was written to {out}"
        )
    return Patched(verb, patch.file, place, done, patch.changed, {n: m.sha256 for n, m in after.items()})


def _beside(model: Path) -> Path:
    """Where the finished folder waits to take the model's name, and the old one to be removed."""
    return model.parent / f".{model.name}.resafe-patched"


def _patch_file(given: Path) -> Path:
    file = given / PATCH if given.is_dir() else given
    if not file.is_file():
        raise UserError(f"there is no patch {file}; `resafe repair --format patch` writes one")
    return file


def _holds(model: Path, before: dict[str, Mark], after: dict[str, Mark], verb: str, patch: Path) -> bool:
    """Whether the model is what the verb starts from; False if it is what the verb makes.

    Raises:
        UserError: it is neither.
    """
    first: dict[bool, str] = {}
    for name in before:
        if not (model / name).is_file():
            raise UserError(f"{model} has no {name}, which {patch} changes; give the model it was made for")
        found = Mark.of(model / name)
        for side, wanted in ((True, before), (False, after)):
            if found != wanted[name]:
                first.setdefault(side, name)
    for side in (True, False):
        if side not in first:
            return side
    raise UserError(
        f"{model / first[True]} is not the file that `resafe {verb} {patch}` starts from (its SHA-256 differs); "
        "give the very model that the patch was made for"
    )


def _write(
    patch: Patch,
    model: Path,
    place: Path,
    after: dict[str, Mark],
    in_place: bool,
    verb: str,
    progress: Progress | None,
) -> None:
    """Make the changed folder beside the model, or at ``place``; then, in place, let the two change names."""
    changed = {one.name: one for one in patch.files if one.source != one.target}
    beside = _beside(model)
    nbytes = sum(after[name].bytes for name in changed)
    with staged(beside if in_place else place, f"{verb} {patch.sha256}", nbytes) as staging:
        for done, one in enumerate(changed.values()):
            if progress:
                progress("write", done, len(changed))
            if one.name not in staging.done:
                rewrite(patch, one, model / one.name, staging.folder / one.name, after[one.name])
                staging.record(one.name, after[one.name].sha256)
        _carry(model, staging, link=in_place)
    if in_place:
        _exchange(beside, model)
        shutil.rmtree(beside)


def _carry(model: Path, staging: Staging, *, link: bool) -> None:
    """Let every other file of the model go along: as the same file, or as a copy."""
    for file in sorted(model.rglob("*")):
        new = staging.folder / file.relative_to(model)
        if str(file.relative_to(model)) in staging.done:
            continue
        if link and file.is_symlink():
            new.symlink_to(os.readlink(file))
        elif file.is_symlink() and file.is_dir():
            shutil.copytree(file, new)
        elif file.is_dir():
            new.mkdir()
        elif link:
            os.link(file, new)
        else:
            shutil.copy2(file, new)
            fsync_file(new)
    if link:
        shutil.copystat(model, staging.folder)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change names in one step.

    Raises:
        UserError: the system or the file system cannot do that.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        failed = library.renameat2(_AT_CWD, names[0], _AT_CWD, names[1], _EXCHANGE)
    if failed:
        shutil.rmtree(one)
        raise UserError(
            f"{other} cannot be changed in one step here ({os.strerror(ctypes.get_errno())}); "
            "use --out to write the result to a new folder"
        )
    fsync_file(other.parent)
