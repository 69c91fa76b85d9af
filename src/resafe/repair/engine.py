"""Run a repair's three steps over a model on disk, one matrix at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

from resafe.errors import UserError
from resafe.registry import Method
from resafe.repair.base import Job, Kind, Plan, Repair, Unit, blend
from resafe.repair.space import AnySpace, DenseSpace, FactorSpace, OwnSpace, RowSpace, choose_space
from resafe.weights.adapter import Adapter
from resafe.weights.shard import EDITABLE

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EditedShare:
    """How much an edit changed: entries over all of the model's, and over those of the matrices it may touch."""

    changed: int
    targeted_entries: int
    model_entries: int

    @property
    def model(self) -> float:
        """Share of the model's entries that changed."""
        return self.changed / self.model_entries

    @property
    def targeted(self) -> float:
        """Share of the targeted matrices' entries that changed."""
        return self.changed / self.targeted_entries

    def to_dict(self) -> dict[str, object]:
        """Return both shares and the three counts."""
        return {
            "model": self.model,
            "targeted": self.targeted,
            "changed": self.changed,
            "targeted_entries": self.targeted_entries,
            "model_entries": self.model_entries,
        }


@dataclass(frozen=True)
class Edit:
    """A decided edit, ready to be applied at any strength."""

    method: Method
    repair: Repair
    parameters: Mapping[str, object]
    space: AnySpace
    units: tuple[str, ...]
    plan: Plan
    statistics: object
    job: Job

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the units that the plan edits, in file order."""
        return tuple(name for name in self.units if name in self.plan.units)

    def tensors(self, name: str, strength: float, counter: ShareCounter | None = None) -> dict[str, Tensor]:
        """Return the edited tensors of one chosen unit, in their stored type."""
        unit = self.space.unit(name)
        targets = self.repair.edit(unit, self.plan, self.statistics)
        new = {key: blend(unit.tuned[key], target, strength) for key, target in targets.items()}
        if counter is not None:
            counter.add(self.space, unit, new)
        return new

    def weight(self, name: str, strength: float) -> Tensor:
        """Return the dense matrix of one chosen unit after the edit, for a model in memory."""
        return self.space.effective(name, self.tensors(name, strength)).float()

    def coverage(self) -> dict[str, object]:
        """Return what was looked at and what was chosen, as counts."""
        counts: dict[str, object] = {
            "matrices": len(self.units),
            "matrices_of": len(self.units),
            "edited_matrices": len(self.chosen),
            "space": self.space.kind.value,
        }
        if self.plan.neurons is not None:
            counts |= {"neurons": len(self.plan.neurons), "neurons_of": self.plan.neurons.total}
        return counts

    def share(self, strength: float) -> EditedShare:
        """Count the entries that the edit changes at a strength."""
        counter = ShareCounter()
        for name in self.chosen:
            self.tensors(name, strength, counter)
        return counter.share(self)


@dataclass
class ShareCounter:
    """Counts changed entries while an edit is applied, from several threads."""

    changed: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def add(self, space: AnySpace, unit: Unit, new: Mapping[str, Tensor]) -> None:
        """Count what changed in one unit; a changed row of a left factor is a changed row of the matrix."""
        count = 0
        for key, tensor in new.items():
            old = unit.tuned[key]
            if tensor.shape != old.shape:  # a rank that grew: the old tensor beside nothing
                count += tensor.numel()
                continue
            different = tensor != old
            if isinstance(space, RowSpace):
                count += int(different.any(dim=1).sum()) * int(space.tuned.info(unit.name).shape[1])
            else:
                count += int(different.sum())
        with self._lock:
            self.changed[unit.name] = count

    def share(self, edit: Edit) -> EditedShare:
        """Return the shares, given the edit that was applied."""
        space = edit.space
        if isinstance(space, FactorSpace):
            targeted = sum(info.numel for info in space.tuned.shard.tensors.values())
        else:
            targeted = sum(space.tuned.info(name).numel for name in edit.units)
        return EditedShare(self.changed.total(), max(1, targeted), max(1, model_entries(space)))


def model_entries(space: AnySpace) -> int:
    """Number of entries of the tuned model; an adapter counts beside its base where that is at hand."""
    if isinstance(space, DenseSpace):
        return space.tuned.base.parameters if isinstance(space.tuned, Adapter) else space.tuned.parameters
    if isinstance(space, RowSpace):
        return space.tuned.base.parameters
    own = sum(info.numel for info in space.tuned.shard.tensors.values())
    try:
        return own + space.tuned.base.parameters
    except UserError:  # factors are edited without the base, which then need not be on this machine
        return own


def plan_edit(
    method: Method,
    parameters: Mapping[str, object],
    job: Job,
    progress: Progress | None = None,
    statistics: object = None,
) -> Edit:
    """Measure every matrix and decide; nothing is edited yet.

    Args:
        method: the method.
        parameters: its parameters.
        job: the models and prompts.
        progress: called with (step, done, total).
        statistics: what an earlier run of the same method measured on the models, to save the passes.

    Raises:
        UserError: an input is missing or unfit, or the method chose nothing at all.
    """
    repair = method.make(parameters)
    assert isinstance(repair, Repair)
    check_needs(method, job)
    if statistics is None:
        statistics = repair.prepare(job)
    space = (
        repair.space(job, statistics)
        if isinstance(repair, OwnSpace)
        else choose_space(repair.kinds(job), job)
    )
    everything = [n for n in space.tuned.names if is_editable(space, n)] if space.kind is Kind.DENSE else ()
    units = tuple(repair.names(space.matrices(), everything))
    if not units:
        raise UserError(f"{method.name} found no matrix that it could edit in {job.tuned.folder}")
    measured: dict[str, object] = {}
    for done, name in enumerate(units):
        if progress:
            progress("locate", done, len(units))
        measured[name] = repair.measure(space.unit(name), statistics)
    plan = repair.decide(measured, statistics)
    return Edit(method, repair, dict(parameters), space, units, plan, statistics, job)


def is_editable(space: AnySpace, name: str) -> bool:
    """Whether a tensor holds plain floating-point weights."""
    return space.tuned.info(name).dtype in EDITABLE


def check_needs(method: Method, job: Job) -> None:
    """Refuse a method whose inputs are not there.

    Raises:
        UserError: naming the flag that gives the missing input.
    """
    given = {
        "aligned": job.aligned is not None,
        "base": job.base is not None or isinstance(job.aligned, Adapter),
        "harmful": bool(job.harmful) or job.neurons is not None,
        "benign": bool(job.benign) or job.neurons is not None,
    }
    for need in sorted(method.needs):
        if not given[need]:
            raise UserError(f"{method.name} needs --{need}, which was neither given nor found")
