"""Bring a decided edit to disk: as the same kind of folder, a merged checkpoint, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from resafe.errors import UserError
from resafe.repairing.engine import Edit, EditedShare, ShareCounter
from resafe.repairing.space import AnySpace, DenseSpace, FactorSpace, RowSpace
from resafe.weights.adapter import WEIGHTS, Adapter, Factors
from resafe.weights.checkpoint import ADAPTER_CONFIG, INDEX, Checkpoint, travelling_files
from resafe.weights.patch import PATCH, PatchWriter
from resafe.weights.shard import Shard, TensorInfo, read, release
from resafe.weights.writer import (
    Staging,
    Transform,
    check_finite,
    copy_files,
    fsync_file,
    staged,
    write_json,
    write_shard,
    write_tensors,
)

Format = Literal["same", "merged", "adapter", "patch"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """What a finished run left on disk."""

    folder: Path
    hashes: dict[str, str]
    share: EditedShare


def output_kind(edit: Edit, wanted: Format) -> Literal["dense", "adapter"]:
    """Return what will be written.

    Raises:
        UserError: an adapter is wanted from an edit of whole matrices, or a patch that would merge an adapter.
    """
    if isinstance(edit.space, DenseSpace):
        if wanted == "patch" and isinstance(edit.space.tuned, Adapter):
            raise UserError(
                f"{edit.method.name} edits whole matrices here, so the result is no adapter any more and no patch "
                "leads to it; use --format merged"
            )
        if wanted == "adapter":
            raise UserError(
                f"{edit.method.name} edits whole matrices here, which no adapter of this rank can hold; "
                "use --format merged"
            )
        return "dense"
    return "dense" if wanted == "merged" else "adapter"


def write(
    edit: Edit,
    strength: float,
    out: Path,
    wanted: Format,
    key: str,
    finish: Callable[[Staging, EditedShare], None],
    progress: Progress | None = None,
) -> Written:
    """Write the edited model to ``out``; nothing is left there unless all of it is.

    Args:
        edit: the edit.
        strength: its strength; 0 copies the tuned model.
        out: the folder to make.
        wanted: its format.
        key: identifies this very job, see :func:`resafe.weights.writer.staged`.
        finish: writes the records of the run into the staging folder, given what changed.
        progress: called with (step, done, total).

    Raises:
        UserError: ``out`` is taken, the disk is full, the weights hold NaN, or nothing would change.
    """
    kind = output_kind(edit, wanted)
    counter = ShareCounter()
    source = _dense_source(edit.space) if kind == "dense" else None
    adapter = edit.space.tuned if isinstance(edit.space.tuned, Adapter) else None
    nbytes = sum(f.stat().st_size for f in (source.files if source else adapter.files if adapter else ()))
    with staged(out, key, 0 if wanted == "patch" else nbytes) as staging:
        if wanted == "patch":
            _write_patch(edit, strength, source, staging, counter, progress)
        elif source is not None:
            _write_dense(edit, strength, source, staging, counter, progress)
        else:
            _write_adapter(edit, strength, staging, counter)
        for name in edit.chosen if strength else ():
            if name not in counter.changed:  # written by an interrupted run that this one resumed
                edit.tensors(name, strength, counter)
        if strength != 0 and counter.changed.total() == 0:
            raise UserError(
                f"{edit.method.name} changed nothing: tuned and aligned are the same where it edits"
            )
        if wanted != "patch":
            _copy_others(edit.space, kind, staging)
        if edit.plan.neurons is not None:
            edit.plan.neurons.save(staging.folder / "neurons.safetensors")
            fsync_file(staging.folder / "neurons.safetensors")
        share = counter.share(edit)
        finish(staging, share)
    return Written(out, dict(staging.done), share)


def _dense_source(space: AnySpace) -> Checkpoint:
    return space.tuned.base if isinstance(space.tuned, Adapter) else space.tuned


def _write_dense(
    edit: Edit,
    strength: float,
    source: Checkpoint,
    staging: Staging,
    counter: ShareCounter,
    progress: Progress | None,
) -> None:
    tuned = edit.space.tuned
    for info in tuned.shard.tensors.values() if isinstance(tuned, Adapter) else ():
        check_finite(read(info), info)
    merged = {*tuned.modules, *tuned.replaced} if isinstance(tuned, Adapter) else set()
    chosen, transform = _transform(edit, strength, counter)
    for done, shard in enumerate(source.shards):
        if progress:
            progress("write", done, len(source.shards))
        if shard.file.name not in staging.done:
            file = staging.folder / shard.file.name
            staging.record(file.name, write_shard(shard, file, chosen | merged, transform))
    release()


def _transform(edit: Edit, strength: float, counter: ShareCounter) -> tuple[set[str], Transform]:
    """Return the tensors that the edit changes in a dense model, and how."""
    tuned, chosen = edit.space.tuned, set(edit.chosen if strength else ())

    def own(stored: Tensor) -> Tensor | None:
        return None if isinstance(tuned, Adapter) else stored  # what is stored is the base's

    def transform(info: TensorInfo, stored: Tensor) -> Tensor:
        if info.name in chosen:
            new = edit.space.effective(info.name, edit.tensors(info.name, strength, counter, own(stored)))
        else:
            new = tuned.tensor(info.name)
        return new.to(info.dtype)

    return chosen, transform


def _write_patch(
    edit: Edit,
    strength: float,
    source: Checkpoint | None,
    staging: Staging,
    counter: ShareCounter,
    progress: Progress | None,
) -> None:
    """Write what the edit changes; an edited adapter lies in the staging folder while it is compared."""
    if PATCH in staging.done:
        return
    with PatchWriter(staging.folder / PATCH) as patch:
        if source is not None:
            chosen, transform = _transform(edit, strength, counter)
            for done, shard in enumerate(source.shards):
                if progress:
                    progress("write", done, len(source.shards))
                patch.add_shard(shard, chosen, transform)
            release()
        else:
            _patch_adapter(edit, strength, staging, counter, patch)
    staging.record(PATCH)


def _patch_adapter(
    edit: Edit, strength: float, staging: Staging, counter: ShareCounter, patch: PatchWriter
) -> None:
    tuned = edit.space.tuned
    assert isinstance(tuned, Adapter)
    _write_adapter(edit, strength, staging, counter)
    settings = _adapter_settings(tuned, staging.folder / WEIGHTS, tuned.folder)
    if settings == tuned.settings:
        copy_files({ADAPTER_CONFIG: tuned.folder / ADAPTER_CONFIG}, staging.folder)
    else:
        write_json(staging.folder / ADAPTER_CONFIG, settings)
    for name in (WEIGHTS, ADAPTER_CONFIG):
        patch.add_file(tuned.folder / name, staging.folder / name)
        (staging.folder / name).unlink()
    del staging.done[WEIGHTS]


def _write_adapter(edit: Edit, strength: float, staging: Staging, counter: ShareCounter) -> None:
    space, chosen = edit.space, set(edit.chosen if strength else ())
    assert isinstance(space, RowSpace | FactorSpace)
    tuned = space.tuned
    if WEIGHTS in staging.done:
        return
    widened = isinstance(space, RowSpace) and space.reference is not None
    widened = widened or any(_grows(edit, name) for name in list(edit.chosen)[:1])
    if widened and strength:
        _write_widened(edit, strength, staging, counter)
        return
    by_key = {tuned.key(name, which): name for name in chosen for which in "AB"}
    edited: dict[str, dict[str, Tensor]] = {}

    def transform(info: TensorInfo, stored: Tensor) -> Tensor:
        name = by_key[info.name]
        if name not in edited:
            edited[name] = edit.tensors(name, strength, counter)
        return edited[name].pop(info.name, stored).to(info.dtype)

    digest = write_shard(tuned.shard, staging.folder / WEIGHTS, set(by_key), transform, workers=1)
    staging.record(WEIGHTS, digest)


def _grows(edit: Edit, name: str) -> bool:
    unit = edit.space.unit(name)
    targets = edit.repair.edit(unit, edit.plan, edit.statistics)
    return any(target.value.shape != unit.tuned[key].shape for key, target in targets.items())


def _write_widened(edit: Edit, strength: float, staging: Staging, counter: ShareCounter) -> None:
    """Write an adapter whose ranks grew; :func:`_adapter_settings` says so in its settings."""
    space, chosen = edit.space, set(edit.chosen)
    assert isinstance(space, RowSpace | FactorSpace)
    tuned = space.tuned
    tensors: dict[str, Tensor] = {}
    for name in tuned.modules:
        factors = tuned.factors(name)
        if name in chosen:
            factors = _after(space, name, edit.tensors(name, strength, counter))
        for which, tensor in (("A", factors.a), ("B", factors.b)):
            key = tuned.key(name, which)
            info = tuned.shard.tensors[key]
            check_finite(tensor, info, edited=name in chosen)
            tensors[key] = tensor.to(info.dtype).contiguous()
    write_tensors(staging.folder / WEIGHTS, tensors)
    staging.record(WEIGHTS)


def _after(space: RowSpace | FactorSpace, name: str, tensors: dict[str, Tensor]) -> Factors:
    if isinstance(space, RowSpace):
        return space.factors(name, tensors[space.tuned.key(name, "B")])
    return space.factors(name, tensors)


def _copy_others(space: AnySpace, kind: str, staging: Staging) -> None:
    """Let tokenizer, config and templates travel along; an adapter's own win over its base's."""
    tuned = space.tuned
    files = {str(f.relative_to(tuned.folder)): f for f in travelling_files(tuned.folder)}
    if kind == "dense" and isinstance(tuned, Adapter):
        base = tuned.base.folder
        own = {name: f for name, f in files.items() if name != ADAPTER_CONFIG and name != "README.md"}
        files = {str(f.relative_to(base)): f for f in travelling_files(base)} | own
        index = base / INDEX
    else:
        index = tuned.folder / INDEX
    if kind == "dense" and index.is_file():
        files[INDEX] = index
    copy_files(files, staging.folder)
    if kind == "adapter":
        assert isinstance(tuned, Adapter)
        settings = _adapter_settings(tuned, staging.folder / WEIGHTS, staging.out)
        if settings != tuned.settings:
            write_json(staging.folder / ADAPTER_CONFIG, settings)


def _adapter_settings(tuned: Adapter, file: Path, out: Path) -> dict[str, object]:
    """Return the settings of the adapter in ``file``: every module keeps its scale, alpha follows its rank.

    It is to lie in ``out``. A base given relative to the old folder is rewritten, so that the new one finds it too.
    """
    settings = dict(tuned.settings)
    written = Shard.open(file).tensors
    ranks = {name: written[tuned.key(name, "A")].shape[0] for name in tuned.modules}
    if any(rank != tuned.rank(name) for name, rank in ranks.items()):
        settings["use_rslora"] = False
        settings["rank_pattern"] = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
        settings["alpha_pattern"] = {
            name.removesuffix(".weight"): tuned.scale(name) * rank for name, rank in ranks.items()
        }
    ref = settings.get("base_model_name_or_path")
    beside = tuned.folder / str(ref)
    same_parent = out.absolute().parent == tuned.folder.absolute().parent
    if ref and not Path(str(ref)).is_absolute() and beside.is_dir() and not same_parent:
        settings["base_model_name_or_path"] = str(beside.resolve())
    return settings
