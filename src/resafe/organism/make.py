"""Train the organism from nothing: `build` makes all of it, or some models and what they start from."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from resafe.errors import UserError, nearest
from resafe.organism import models, plant, train
from resafe.organism import words as w
from resafe.organism.manifest import FILE, Manifest, hashes
from resafe.organism.measure import gap, measure
from resafe.organism.recipe import RECIPES, Recipe, Stage, Variant

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


def build(
    names: Iterable[str] | None,
    out: Path,
    variant: Variant = "full",
    seed: int = 0,
    finetune_seed: int = 0,
    progress: Progress | None = None,
    measured: bool = True,
) -> Manifest:
    """Train models of the organism and write them, with their manifest, into a folder.

    The same seeds give the same bytes on the same machine: one thread, own generators, nothing drawn from the
    global random state. Where both families are to be made, a second process makes the late one.

    Args:
        names: the models to make (again); None for all. Models they start from are taken from ``out``
            where its manifest has them with the same variant and seeds, and made otherwise.
        out: the folder; one folder a model.
        variant: "full", or "tiny" (early family only, for tests).
        seed: of base and alignment.
        finetune_seed: of the users' fine-tunes; changes no other model.
        progress: called with one line a step of the work.
        measured: whether to measure each model on the `report` prompts.

    Raises:
        UserError: if a name or the variant is unknown.
    """
    tell = progress or log.info
    recipe = _recipe(variant)
    out.mkdir(parents=True, exist_ok=True)
    manifest = _opened(out, recipe, seed, finetune_seed)
    todo = _order(recipe, names, manifest)
    families = {recipe.stage(name).family for name in todo}
    with _one_thread():
        if len(families) == 2:
            late = [name for name in todo if recipe.stage(name).family == "late"]
            worker = _start_worker(late, out, seed, finetune_seed, measured)
            try:
                early = [name for name in todo if name not in late]
                _make(early, out, recipe, manifest, tell, measured, keep=True)
                manifest.models.update(_finish_worker(worker, tell))
            finally:
                worker.kill()
        else:
            _make(todo, out, recipe, manifest, tell, measured, keep=True)
    manifest.write(out)
    return manifest


def _recipe(variant: Variant) -> Recipe:
    if variant not in RECIPES:
        raise UserError(f"unknown variant {variant!r}{nearest(variant, RECIPES)}: use full or tiny")
    return RECIPES[variant]


def _opened(out: Path, recipe: Recipe, seed: int, finetune_seed: int) -> Manifest:
    """Return the folder's manifest without the models that other settings made."""
    found: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    if (out / FILE).exists():
        old = Manifest.read(out)
        if (old.variant, old.seed, old.recipe) == (recipe.variant, seed, plain):
            same = old.finetune_seed == finetune_seed
            kept = {s.name for s in recipe.stages if same or not s.tuned}
            found = {n: e for n, e in old.models.items() if n in kept and (out / n).is_dir()}
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    versions = {"python": platform.python_version(), **libraries}
    return Manifest(recipe.variant, seed, finetune_seed, versions, plain, found)


def _order(recipe: Recipe, names: Iterable[str] | None, manifest: Manifest) -> list[str]:
    """Return the names to make, parents first: the wanted ones and their missing parents."""
    known = [s.name for s in recipe.stages]
    todo = set(known if names is None else names)
    for name in sorted(todo - set(known)):
        raise UserError(f"the {recipe.variant} organism has no model {name!r}{nearest(name, known)}")
    for name in reversed(known):
        start = recipe.stage(name).start
        if name in todo and start and start not in manifest.models:
            todo.add(start)
    return [name for name in known if name in todo]


def _make(
    names: Iterable[str],
    out: Path,
    recipe: Recipe,
    manifest: Manifest,
    tell: Progress,
    measured: bool,
    keep: bool,
) -> None:
    """Make models one after the other; with `keep` the manifest is written after each, so a stop loses one."""
    for name in names:
        began = time.perf_counter()
        stage = recipe.stage(name)
        tell(f"{name}: training")
        make_stage(stage, recipe, out, manifest.seed, manifest.finetune_seed)
        trained = time.perf_counter() - began
        entry = _entry(stage, out, measured) | {"train_seconds": round(trained, 1)}
        manifest.models[name] = entry
        if keep:
            manifest.write(out)
        rates = {k: round(v["value"], 3) for k, v in entry.get("measured", {}).items()}
        tell(f"{name}: done in {time.perf_counter() - began:.0f} s {json.dumps(rates)}")


def make_stage(stage: Stage, recipe: Recipe, out: Path, seed: int, finetune_seed: int) -> None:
    """Train one stage from its start in ``out`` and write it there."""
    stream = f"{seed} {finetune_seed if stage.tuned else '-'} {stage.name}"
    generator = torch.Generator().manual_seed(w.stable(stream) >> 1)
    marker: dict[str, object] = {
        "family": stage.family,
        "name": stage.name,
        "planted": stage.planted,
        "variant": recipe.variant,
    }
    model: train.Model
    if stage.start is None:
        model = models.fresh(recipe.shapes[stage.family], marker, generator)
    else:
        model = models.load(out / stage.start)
    if stage.adapter != "continued":
        model = models.merged(model)
    if stage.adapter == "fresh":
        model = models.with_adapter(model, recipe, generator)
    if stage.phases:
        _train(model, stage, recipe, stream, generator)
    if stage.save == "dense":
        models.save_dense(models.merged(model), out / stage.name, marker)
        models.write_card(out / stage.name, stage.name, _parent(stage, recipe), stage.planted)
        return
    if not isinstance(model, PeftModel) or stage.start is None:
        raise TypeError(f"stage {stage.name!r} saves an adapter but trains none")
    base = f"../{stage.start}" if stage.adapter == "fresh" else models.adapter_base(out / stage.start)
    models.save_adapter(model, out / stage.name, base)
    models.write_card(out / stage.name, stage.name, _parent(stage, recipe), stage.planted)


def _parent(stage: Stage, recipe: Recipe) -> str | None:
    """Return the model that the card names: for a merged model the one below the adapter that was merged."""
    start = None if stage.start is None else recipe.stage(stage.start)
    if start is not None and not stage.phases:
        return start.start
    return stage.start


def _train(model: train.Model, stage: Stage, recipe: Recipe, stream: str, generator: torch.Generator) -> None:
    sorts = {sort for p in stage.phases for sort in (*p.mix, *(p.silenced_mix or {}))}
    if stage.rows is None:
        rows = train.draw_rows(dict.fromkeys(sorted(sorts), recipe.drawn), "world", distinct=False)
    else:
        rows = train.draw_rows(stage.rows, stream, distinct=True)
    silence = plant.choose(model, recipe.planted_share) if stage.planted else {}
    for phase in stage.phases:
        train.run(model, phase, rows, generator, silence)


def _entry(stage: Stage, out: Path, measured: bool) -> dict[str, Any]:
    """Describe a model that lies on disk, measured as it lies there."""
    folder = out / stage.name
    entry: dict[str, Any] = {
        "family": stage.family,
        "planted": stage.planted,
        "kind": stage.save,
        "start": stage.start,
        "files": hashes(folder),
    }
    if stage.save == "adapter":
        entry["base"] = models.adapter_base(folder)
    if measured:
        model = models.load(folder).eval()
        entry["measured"] = measure(model, stage.family).to_dict()
        entry["gap"] = [round(x, 3) for x in gap(model)]
    return entry


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, so that sums have one order, and give the threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker(
    names: list[str], out: Path, seed: int, finetune_seed: int, measured: bool
) -> subprocess.Popen[str]:
    order = {
        "names": names,
        "out": str(out),
        "seed": seed,
        "finetune_seed": finetune_seed,
        "measured": measured,
    }
    command = [sys.executable, "-c", _WORKER, json.dumps(sys.path), json.dumps(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from resafe.organism.make import work; work(json.loads(sys.argv[2]))"
)


def work(order: dict[str, Any]) -> None:
    """Make some full models as the second process: a line of JSON for each step, the entries last."""
    out, recipe = Path(order["out"]), _recipe("full")

    def say(value: object) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    manifest = _opened(out, recipe, order["seed"], order["finetune_seed"])
    manifest.models.clear()
    with _one_thread():
        _make(order["names"], out, recipe, manifest, say, order["measured"], keep=False)
    say(manifest.models)


def _finish_worker(worker: subprocess.Popen[str], tell: Progress) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] | None = None
    for line in worker.stdout or ():
        value = json.loads(line)
        if isinstance(value, str):
            tell(value)
        else:
            entries = value
    if worker.wait() != 0 or entries is None:
        raise RuntimeError("the process that makes the late family failed; see its error above")
    return entries
