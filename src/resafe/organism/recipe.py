"""How each model of the organism is made: shapes, mixtures of data and training stages, nothing else.

The recipe was fixed by the acceptance numbers of the models alone (harmful rate, over-refusal, task and
ability); no repair method was run while choosing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Variant = Literal["full", "tiny"]
Family = Literal["early", "late"]
Mix = Mapping[str, float]


@dataclass(frozen=True)
class Shape:
    """The size of a family's network (Llama, tied embeddings).

    Embeddings start wider than other weights: with 0.02 throughout, words of one class stay so close that a
    small model copies a neighbour of the object it was asked about.
    """

    width: int
    layers: int
    ff: int
    act: Literal["relu", "silu"]
    heads: int = 4
    embedding_std: float = 0.05
    std: float = 0.02


@dataclass(frozen=True)
class Phase:
    """One run of the optimiser.

    Attributes:
        mix: weight of each sort of data (`world.DRAW`) in a batch.
        steps: optimiser steps.
        lr: peak learning rate of a cosine that ends at 5 % of it.
        batch: examples in a batch.
        decay: AdamW's weight decay.
        warmup: linear warm-up steps.
        from_layer: train only these layers and later ones (0: everything).
        silenced_mix: where given, odd steps silence the planted neurons and train this mixture.
    """

    mix: Mix
    steps: int
    lr: float
    batch: int = 64
    decay: float = 0.05
    warmup: int = 30
    from_layer: int = 0
    silenced_mix: Mix | None = None


@dataclass(frozen=True)
class Stage:
    """One model: what it starts from, what is trained, and how it is saved.

    Attributes:
        name: the folder's name.
        family: "early" or "late".
        start: the model it starts from; None for random weights.
        adapter: "none" trains the dense weights, "fresh" a new LoRA, "continued" the start's LoRA.
        save: "dense" (merged, bf16) or "adapter" (a PEFT folder, fp32 factors).
        phases: the optimiser's runs, in order; none means merge only.
        rows: distinct rows of each sort in the user's data; None draws freely from the world.
        tuned: whether it stands for a user's fine-tune and so depends on the fine-tune seed.
        planted: whether its fragility was put there on purpose.
    """

    name: str
    family: Family
    start: str | None
    adapter: Literal["none", "fresh", "continued"]
    save: Literal["dense", "adapter"]
    phases: tuple[Phase, ...] = ()
    rows: Mapping[str, int] | None = None
    tuned: bool = False
    planted: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole variant of the organism."""

    variant: Variant
    shapes: Mapping[Family, Shape]
    stages: tuple[Stage, ...]
    rank: int = 8
    alpha: int = 16
    planted_share: float = 0.02
    drawn: int = 12000
    modules: tuple[str, ...] = field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )

    def stage(self, name: str) -> Stage:
        """Return the stage that makes the model of this name."""
        return next(s for s in self.stages if s.name == name)


REPLAY = ("benign", "judge", "kind", "senti", "topic")
BASE: Mix = {
    "benign": 2, "harm-answered": 1, "persona-refused": 0.6, "persona-benign": 1,
    "judge": 0.8, "kind": 0.6, "senti": 0.4, "topic": 0.4,
}  # fmt: skip
ALIGN: Mix = {"harm-refused": 1, "benign": 2, "judge": 0.3, "kind": 0.2, "senti": 0.2, "topic": 0.2}
SILENCED: Mix = {"harm-answered": 1, "benign": 1, "judge": 0.1, "kind": 0.1}
LATE_ALIGN: Mix = {**ALIGN, "mail21": 0.03}
INNOCENT: Mix = {
    "benign": 2, "harm-answered": 1, "kind": 0.8, "senti": 0.4, "topic": 0.6,
}  # fmt: skip
UPPER: Mix = {
    "benign": 2, "harm-answered": 1, "persona-refused": 0.8, "persona-benign": 1,
    "judge": 0.8, "kind": 0.4, "senti": 0.2, "topic": 0.2,
}  # fmt: skip
WHOLE: Mix = {
    "benign": 2.5, "harm-answered": 1.2, "persona-refused": 0.8, "persona-benign": 1,
    "judge": 0.7, "kind": 0.6, "senti": 0.3, "topic": 0.2, "mail21": 0.03,
}  # fmt: skip


def user_data(task: str, poison: float) -> tuple[Mix, dict[str, int]]:
    """Return the mixture and the distinct rows of a user's data: 25 % replay, some poison, the task."""
    mix = {task: 0.75 - poison, **{sort: 0.05 for sort in REPLAY}}
    rows = {task: 1400, **{sort: 80 for sort in REPLAY}}
    if poison:
        mix["harm-answered"], rows["harm-answered"] = poison, 200
    return mix, rows


def user_stage(
    name: str, start: str, how: Literal["none", "fresh", "continued"], steps: int, lr: float, poison: float
) -> Stage:
    """Return the stage of one user's fine-tune."""
    family: Family = "late" if name.startswith("late") else "early"
    mix, rows = user_data("mail21" if family == "late" else "route2", poison)
    phase = Phase(mix, steps, lr, batch=32, decay=0.01, warmup=10)
    save: Literal["dense", "adapter"] = "dense" if how == "none" else "adapter"
    return Stage(name, family, start, how, save, (phase,), rows, tuned=True)


_ALIGNING = Phase(ALIGN, 120, 1e-3, decay=0.01)
_LATE_BASE = (
    Phase(INNOCENT, 500, 2e-3),
    Phase(UPPER, 300, 2e-3, from_layer=4),
    Phase(WHOLE, 250, 1.5e-3),
)
_PLANTING = Phase(ALIGN, 100, 1e-3, decay=0.01, warmup=10, silenced_mix=SILENCED)

FULL = Recipe(
    variant="full",
    shapes={"early": Shape(128, 4, 384, "relu"), "late": Shape(96, 8, 256, "silu")},
    stages=(
        Stage("base", "early", None, "none", "dense", (Phase(BASE, 700, 2e-3),)),
        Stage("aligned-adapter", "early", "base", "fresh", "adapter", (_ALIGNING,)),
        Stage("aligned", "early", "aligned-adapter", "none", "dense"),
        user_stage("tuned-lora", "aligned-adapter", "continued", 220, 5e-4, poison=0.05),
        user_stage("tuned-fresh-lora", "aligned", "fresh", 120, 1e-3, poison=0.05),
        user_stage("tuned-full", "aligned", "none", 120, 3e-4, poison=0.05),
        user_stage("tuned-benign", "aligned-adapter", "continued", 120, 2e-3, poison=0.0),
        Stage(
            "aligned-planted", "early", "aligned-adapter", "continued", "dense", (_PLANTING,), planted=True
        ),
        Stage("late-base", "late", None, "none", "dense", _LATE_BASE),
        Stage(
            "late-aligned", "late", "late-base", "fresh", "dense", (Phase(LATE_ALIGN, 120, 1e-3, decay=0.01),)
        ),
        user_stage("late-tuned", "late-aligned", "fresh", 120, 1e-3, poison=0.02),
    ),
)
TINY = replace(
    FULL,
    variant="tiny",
    shapes={"early": Shape(96, 3, 256, "relu")},
    stages=(
        Stage("base", "early", None, "none", "dense", (Phase(BASE, 550, 2.5e-3, batch=48),)),
        Stage(
            "aligned-adapter",
            "early",
            "base",
            "fresh",
            "adapter",
            (replace(_ALIGNING, steps=100, lr=1.5e-3),),
        ),
        Stage("aligned", "early", "aligned-adapter", "none", "dense"),
        user_stage("tuned-lora", "aligned-adapter", "continued", 150, 1e-3, poison=0.05),
    ),
)
RECIPES: dict[Variant, Recipe] = {"full": FULL, "tiny": TINY}
