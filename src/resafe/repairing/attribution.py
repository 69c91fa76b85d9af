"""Attribution: reset that part of the fine-tuning delta to which safety was lost, and which the rest does not need.

Ours; ``docs/attribution.md`` derives it, with its controls and its failures. With T = tuned - aligned, resetting
an entry moves it by -T_ij, so to first order a loss L changes by ``-T_ij dL/dW_ij``. For L_safe (of the aligned
model's refusals of harmful prompts, under the tuned model) and L_keep (of answers that are to stay: the tuned model's
own to harmless prompts, the wanted ones to the user's task), both in nats a token, averaged over texts::

    A_u = mean over the entries of u of  T ⊙ ḡ_safe          what resetting u takes off L_safe
    C_u = mean over the entries of u of -T ⊙ ḡ_keep          what it adds to L_keep
    S_u = A_u - λ max(0, C_u)                                u: an entry, a row, a neuron or a matrix

ḡ is the mean gradient at W = tuned - α T for ``steps`` values of α in (0, ``reach``): at α = 0 the task is learnt so
well that its gradient says nothing. The clamp keeps a reset from being credited with making the task even better.

The units with the largest positive S go back to the aligned weights. How many is read off the *reset curve*: both
losses with growing shares reset, the smallest share whose L_safe plus rise of L_keep is within `TOLERANCE` of the
lowest. Neither prompts that choose nor generated answers are spent on it.

In memory: the tuned model with one parameter's gradient at a time, and on the CPU two float32 sums as large as the
matrices; of the aligned model and of T one matrix at a time, read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.evaluate.prompts import Prompt, read_prompts
from resafe.locating.gradients import answered, log_probabilities, pieces, taken
from resafe.locating.observe import Text, batches
from resafe.locating.texts import build_texts
from resafe.model.layout import FEED_FORWARD, read_layout
from resafe.model.load import LoadedModel, load
from resafe.model.parts import FeedForward, Matrix, held
from resafe.model.stored import InMemory, Piece
from resafe.neurons import NeuronSet, Site
from resafe.registry import Badge, Need, method
from resafe.repairing.base import Job, Kind, Plan, Repair, Target, Unit
from resafe.repairing.space import DenseSpace, choose_space
from resafe.weights.checkpoint import fingerprint

Neuron = Literal["entry", "row", "neuron", "module"]
TOLERANCE = 0.01  # nats a token within which the smaller edit is taken
SHARES = tuple(0.0025 * 2**k for k in range(8))  # of all units, up to .32
_TOGETHER = 16  # texts in a backward pass
_SITES = {"entry": Site.ENTRY, "row": Site.ROW, "neuron": Site.FFN}


@dataclass(frozen=True)
class Rung:
    """One point of a reset curve: with a share of the units reset, the two losses in nats a token."""

    share: float
    safe: float
    keep: float


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        masks: unit's tensor -> the chosen units.
        curve: the losses with nothing reset (share 0), then with growing shares; empty with a given share.
        share: the share that was taken.
        model: fingerprint of the tuned model.
    """

    masks: Mapping[str, Tensor]
    curve: tuple[Rung, ...]
    share: float
    model: str


@method(
    "attribution",
    verb="repair",
    title="Attribution of the delta to the loss of safety",
    badge=Badge.VARIANT,
    paper=None,
    needs=frozenset({Need.ALIGNED, Need.HARMFUL, Need.BENIGN}),
    strengths=(1.0,),
    variants=({}, {"unit": "row"}),
)
@dataclass(frozen=True)
class Attribution(Repair):
    """Reset what the loss of safety is attributed to and the user's task is not, to the aligned weights.

    Attributes:
        unit: what is reset as a whole: an ``entry`` of a matrix; a ``row``, which keeps a LoRA fine-tune an adapter;
            a feed-forward ``neuron``; or a ``module``, a whole matrix.
        share: share of all units; ``auto`` reads it off the reset curve.
        penalty: λ, what a nat a token of the answers to keep costs, in nats of refusals.
        steps: at how many points between tuned and aligned the gradients are taken; 0 is at the tuned model alone.
        reach: how far towards the aligned model these points go.
        task: file with prompts of the user's task and the wanted responses, to be kept like answers to harmless
            prompts.
    """

    unit: Neuron = "entry"
    share: float | Literal["auto"] = "auto"
    penalty: float = 0.3
    steps: int = 3
    reach: float = 0.5
    task: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.share != "auto" and not 0.0 < self.share <= 1.0:
            raise UserError(f"attribution: share must be above 0 and at most 1, not {self.share:g}")
        if self.steps < 0 or not 0.0 <= self.reach <= 1.0 or self.penalty < 0.0:
            raise UserError("attribution: steps and penalty must be at least 0, reach between 0 and 1")

    def kinds(self, job: Job) -> tuple[Kind, ...]:
        """Return the row space where whole rows are edited, else the dense one."""
        return super().kinds(job) if self.unit in ("row", "module") else (Kind.DENSE,)

    def names(self, matrices: Sequence[str], everything: Sequence[str]) -> Sequence[str]:
        """Return all matrices; with neurons, those of the feed-forward blocks."""
        if self.unit != "neuron":
            return matrices
        inside = [name for name in matrices if _part(name)[1] in FEED_FORWARD]
        if 7 * len(inside) != 3 * len(matrices):
            raise UserError("attribution: unit=neuron knows Llama-like blocks alone; choose unit=row")
        return inside

    def prepare(self, job: Job) -> Chosen:
        """Attribute, and choose, or take the neurons that are given."""
        model = fingerprint(job.tuned.files)
        names = self.names(choose_space(self.kinds(job), job).matrices(), ())
        if job.neurons is not None:
            return Chosen(self._given(job.neurons, model, names), (), 0.0, model)
        bench = self.bench(job, names)
        scores = self.scores(bench)
        if self.share != "auto":
            return Chosen(largest(scores, self.share), (), self.share, model)
        curve = self._curve(bench, scores)
        share = best_share(curve)
        return Chosen(largest(scores, share), curve, share, model)

    def bench(self, job: Job, names: Sequence[str]) -> Bench:
        """Load the tuned model, with the answers that it is to be measured by."""
        refusals = self._refusals(job)
        loaded = load(job.tuned.folder, merge=True)
        groups = {"safe": refusals, "keep": self._kept(job, loaded)}
        return Bench(loaded, DenseSpace(job.tuned, job.reference(), job.base), names, groups)

    def _refusals(self, job: Job) -> list[Text]:
        """Return the harmful prompts' refusals, by the aligned model where they carry none."""
        key = ("attribution", job.reference().folder)
        if key not in job.passes:
            aligned = load(job.reference().folder, merge=True)
            job.passes[key] = _answered(aligned, job.harmful, "harmful", job)
        found = job.passes[key]
        assert isinstance(found, list)
        return found

    def _kept(self, job: Job, tuned: LoadedModel) -> list[Text]:
        """Return answers to keep: to harmless prompts, and to the task's."""
        wanted = list(job.task) if self.task is None else read_prompts(Path(self.task))
        if any(prompt.response is None for prompt in wanted):
            source = self.task or "the task's file"
            raise UserError(f"{source} holds a prompt without a response; give every one the wanted one")
        kept = _answered(tuned, job.benign, "benign", job)
        return kept + (_answered(tuned, wanted, "task", job) if wanted else [])

    # Scores ------------------------------------------------------------------------------------------

    def scores(self, bench: Bench) -> dict[str, Tensor]:
        """Return S of every unit, by the tensor that holds its mask."""
        sums = {group: bench.zeros() for group in bench.groups}
        points = [(k + 0.5) / self.steps * self.reach for k in range(self.steps)] or [0.0]
        for alpha in points:
            bench.place(alpha)
            for group, total in sums.items():
                bench.add_gradients(group, total, 1 / len(points))
        bench.place(0.0)
        gains: dict[str, Tensor] = {}
        costs: dict[str, Tensor] = {}
        for name in bench.names:
            delta = bench.delta(name)
            for into, gradient in ((gains, sums["safe"].pop(name)), (costs, sums["keep"].pop(name))):
                pooled = self._pool(name, gradient.mul_(delta))
                key = self._key(name)
                into[key] = into[key] + pooled if key in into else pooled
        return {key: gain - self.penalty * (-costs[key]).clamp(min=0) for key, gain in gains.items()}

    def _key(self, name: str) -> str:
        return _part(name)[0] if self.unit == "neuron" else name

    def _pool(self, name: str, entries: Tensor) -> Tensor:
        """Average the entries of each unit: (out, in) -> (out, in), (out,), (neurons,) or (1,)."""
        if self.unit == "entry":
            return entries
        if self.unit == "module":
            return entries.mean()[None]
        return entries.mean(0 if self._columns(name) else 1)

    def _columns(self, name: str) -> bool:
        return self.unit == "neuron" and name.endswith("down_proj.weight")

    def mask(self, name: str, masks: Mapping[str, Tensor]) -> Tensor:
        """Return where one matrix is reset, broadcastable to (out, in)."""
        mask = masks[self._key(name)]
        return mask if self.unit == "entry" else mask[None, :] if self._columns(name) else mask[:, None]

    # How many ----------------------------------------------------------------------------------------

    def _curve(self, bench: Bench, scores: Mapping[str, Tensor]) -> tuple[Rung, ...]:
        """Return both losses with nothing and with growing shares reset; the model is left as it was."""
        rungs = [Rung(0.0, bench.loss("safe"), bench.loss("keep"))]
        for share in SHARES:
            masks = largest(scores, share)
            bench.place(partial(self.mask, masks=masks))
            rungs.append(Rung(share, bench.loss("safe"), bench.loss("keep")))
        return tuple(rungs)

    # The three steps ---------------------------------------------------------------------------------

    def measure(self, unit: Unit, statistics: object) -> float:
        """Return the share of the matrix's squared delta (of its left factor's, in an adapter) that is reset."""
        assert isinstance(statistics, Chosen)
        square = unit.delta().square()
        return float((square * self.mask(unit.name, statistics.masks)).sum() / square.sum().clamp(min=1e-30))

    def decide(self, measured: Mapping[str, object], statistics: object) -> Plan:
        """Edit the matrices in which anything was chosen."""
        assert isinstance(statistics, Chosen)
        units = frozenset(n for n in measured if bool(self.mask(n, statistics.masks).any()))
        if not units:
            raise UserError("attribution found nothing whose reset would make the model safer")
        neurons = None
        if self.unit in _SITES:
            neurons = NeuronSet(
                _SITES[self.unit], statistics.masks, "attribution", statistics.model, asdict(self)
            )
        curve = [asdict(rung) for rung in statistics.curve]
        return Plan(
            units,
            details={"share": statistics.share, "curve": curve, "reset": dict(measured)},
            neurons=neurons,
        )

    def edit(self, unit: Unit, plan: Plan, statistics: object) -> dict[str, Target]:
        """Aim at the aligned tensor where the mask is; a chosen matrix is reset as a whole."""
        assert isinstance(statistics, Chosen)
        mask = None if self.unit == "module" else self.mask(unit.name, statistics.masks)
        return {unit.key: Target(unit.aligned[unit.key], mask)}

    def _given(self, neurons: NeuronSet, model: str, names: Sequence[str]) -> Mapping[str, Tensor]:
        site = _SITES.get(self.unit)
        if neurons.site is not site:
            raise UserError(
                f"attribution with unit={self.unit} cannot reset neurons of site {neurons.site}; choose another unit"
            )
        neurons.check(model, "the tuned model")
        missing = sorted({self._key(name) for name in names} - set(neurons.masks))
        if missing:
            raise UserError(f"the neuron set lacks {missing[0]}; find the neurons of this model again")
        return neurons.masks


def best_share(curve: Sequence[Rung]) -> float:
    """Return the smallest share whose L_safe plus rise of L_keep is within `TOLERANCE` of the lowest."""
    start, *rungs = curve
    total = [rung.safe + max(0.0, rung.keep - start.keep) for rung in rungs]
    return next(r.share for r, loss in zip(rungs, total, strict=True) if loss <= min(total) + TOLERANCE)


def largest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Choose the share of all units with the largest scores, and only positive ones.

    The bits of positive floats are ordered as integers, so the threshold is found by bisection, in 31 counts and
    without a copy. Of equal scores that are together too many none is chosen.
    """
    wanted = max(1, round(share * sum(values.numel() for values in scores.values())))
    bits = {name: values.contiguous().view(torch.int32) for name, values in scores.items()}
    low, high = 1, 0x7F800000
    while low < high:
        middle = (low + high) // 2
        if sum(int((held >= middle).sum()) for held in bits.values()) > wanted:
            low = middle + 1
        else:
            high = middle
    return {name: held >= low for name, held in bits.items()}


@dataclass(frozen=True)
class Bench:
    """The tuned model in memory, to be moved towards the aligned one and back."""

    loaded: LoadedModel
    space: DenseSpace
    names: Sequence[str]
    groups: Mapping[str, Sequence[Text]]

    @cached_property
    def memory(self) -> InMemory:
        """The matrices in the loaded model."""
        return InMemory(self.loaded, self.space.catalogue)

    @cached_property
    def parts(self) -> dict[str, FeedForward]:
        """The loaded model's feed-forward parts."""
        return {part.name: part for part in read_layout(self.loaded.model).parts}

    def delta(self, name: str) -> Tensor:
        """Return T of one matrix, (out, in)."""
        return self.space.unit(name).delta()

    def zeros(self) -> dict[str, Tensor]:
        """Return a sum for each matrix, (out, in)."""
        return {name: torch.zeros(self.memory.shape(name)) for name in self.names}

    def place(self, towards: float | Callable[[str], Tensor]) -> None:
        """Set every matrix to ``tuned + towards · (aligned - tuned)``, a number or a mask of each matrix."""
        for name in self.names:
            unit = self.space.unit(name)
            start, end = unit.tuned[name].float(), unit.aligned[name].float()
            share = torch.tensor(towards) if isinstance(towards, float) else towards(name).float()
            self.memory.write(name, torch.lerp(start, end, share.expand_as(start)))

    def losses(self, group: str) -> Iterator[Tensor]:
        """Yield the sum over a few texts at a time of their mean cross-entropy, divided by the number of texts."""
        texts = self.groups[group]
        count = sum(text.start < len(text.ids) for text in texts)
        for batch in batches(self.loaded, texts, None):
            for piece in pieces(batch, answered(batch), _TOGETHER):
                said = log_probabilities(self.loaded, piece)
                yield -torch.stack([tokens.mean() for tokens in said]).sum() / count

    @torch.no_grad()
    def loss(self, group: str) -> float:
        """Return the loss of a group of texts, in nats a token."""
        loss = sum(float(part) for part in self.losses(group))
        if loss != loss:
            raise UserError(
                f"{self.space.tuned.folder} answers with NaN; use a checkpoint from before it diverged"
            )
        return loss

    def add_gradients(self, group: str, sums: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times the gradient of a group's loss, each parameter's as soon as it is whole."""
        takers: dict[nn.Parameter, list[Callable[[Tensor], object]]] = {}
        for name in self.names:
            for parameter, view, into in self._held(name, sums[name]):
                takers.setdefault(parameter, []).append(partial(_add, view, into, weight))
        with (
            torch.enable_grad(),
            taken({parameter: partial(_each, views) for parameter, views in takers.items()}),
        ):
            for part in self.losses(group):
                part.backward()  # type: ignore[no-untyped-call]

    def _held(
        self, name: str, sums: Tensor
    ) -> Iterator[tuple[nn.Parameter, Callable[[Tensor], Tensor], Tensor]]:
        """Yield the parameters that hold a matrix, how to view it in each, and what of its sum that fills."""
        stored = self.space.catalogue.matrices[name]
        if not stored.pieces:
            parameter = self.memory.parameter(stored.tensor)
            assert isinstance(parameter, nn.Parameter)
            yield parameter, stored.cut, sums
        for piece in stored.pieces:
            part = self.parts[piece.part]
            matrix = {"gate": part.gate, "up": part.up, "down": part.down}[piece.role]
            assert matrix is not None
            parameter = held(matrix.module, matrix.attribute)
            assert isinstance(parameter, nn.Parameter)
            yield parameter, partial(_view, matrix, piece), piece.of(sums)


def _view(matrix: Matrix, piece: Piece, gradient: Tensor) -> Tensor:
    """View one part's, or expert's, map in the gradient of the parameter that holds it, as (out, in)."""
    whole = matrix.neurons_last(gradient)
    mine = whole if piece.expert is None else whole[piece.expert]
    return mine if matrix.inputs else mine.T


def _each(takers: Sequence[Callable[[Tensor], object]], gradient: Tensor) -> None:
    for take in takers:
        take(gradient)


def _add(view: Callable[[Tensor], Tensor], into: Tensor, weight: float, gradient: Tensor) -> None:
    into.add_(view(gradient).float().cpu(), alpha=weight)


def _answered(loaded: LoadedModel, prompts: Sequence[Prompt], kind: str, job: Job) -> list[Text]:
    """Return prompts with the responses they carry, or the model's own; of harmful ones only refusals count."""
    texts = build_texts(loaded, prompts, kind, answer=loaded, judge=job.judge)
    return [text for text in texts if text.start < len(text.ids)]


def _part(name: str) -> tuple[str, str]:
    """Split ``model.layers.0.mlp.up_proj.weight`` into ``model.layers.0.mlp`` and ``mlp.up_proj``."""
    inside, _, matrix = name.removesuffix(".weight").rpartition(".")
    return inside, f"{inside.rpartition('.')[2]}.{matrix}"
