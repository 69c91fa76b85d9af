"""Pictures of where neurons lie and how far methods agree, drawn by matplotlib, which is optional."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resafe.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = tuple[str, Sequence[Sequence[float | None]]]
_KINDS = (".png", ".svg")
_CELL = 0.27  # inches; holds a number of two digits
_LETTER = 0.07  # inches a letter of a label takes
_COLUMNS = 40  # numbers of layers side by side
_LONGEST = 32  # letters of a label


def check(file: Path) -> None:
    """Refuse, before any work, a picture that could not be drawn.

    Raises:
        UserError: the name does not end in .svg or .png, or matplotlib is not installed.
    """
    if file.suffix.lower() not in _KINDS:
        raise UserError(f"{file} is no name of a picture; let it end in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "pictures are drawn by matplotlib, which is not installed; run pip install 'resafe[plot]'"
        ) from error


def overlap(
    file: Path,
    labels: Sequence[str],
    layers: Sequence[int],
    shares: Sequence[Sequence[float]],
    panels: Sequence[Panel],
) -> None:
    """Draw the chosen share of each layer (sets x layers), and beneath it matrices of sets x sets.

    Args:
        file: an .svg or .png file.
        labels: a name for each set.
        layers: the layers, the columns of ``shares``.
        shares: one row for each set.
        panels: title and matrix, values of at most 1, None where there is none.

    Raises:
        UserError: the file cannot be drawn or written.
    """
    check(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in labels]
    margin = 0.3 + _LETTER * max(map(len, names))
    side = max(2.2, _CELL * len(names))
    above = 0.9 + max(0.6, 0.2 * len(names))
    below = 0.7 + side + margin
    width = margin + max(0.25 * min(_COLUMNS, len(layers)) + 0.8, len(panels) * (side + 0.2))
    with rc_context({"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "resafe"}):
        figure = Figure(figsize=(width, above + below), layout="constrained")
        halves = figure.subfigures(2, 1, squeeze=False, height_ratios=[above, below])[:, 0]
        _layers(halves[0].subplots(), names, layers, shares)
        places = halves[1].subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, matrix) in zip(places, panels, strict=True):
            _matrix(axes, names, title, matrix)
        _save(figure, file)


def _layers(
    axes: Axes, names: Sequence[str], layers: Sequence[int], shares: Sequence[Sequence[float]]
) -> None:
    """Draw the heat map of sets x layers."""
    percent = [[100 * share for share in row] for row in shares]
    image = axes.imshow(percent, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    step = math.ceil(len(layers) / _COLUMNS)
    columns = range(0, len(layers), step)
    axes.set_xticks(columns, ["other" if layers[c] < 0 else str(layers[c]) for c in columns])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("layer")
    axes.set_title("Chosen share of each layer's neurons, %")


def _matrix(axes: Axes, names: Sequence[str], title: str, matrix: Sequence[Sequence[float | None]]) -> None:
    """Draw a matrix of sets x sets, each number in its cell."""
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    low = min(0.0, *(value for row in matrix for value in row if value is not None))
    axes.imshow(values, cmap="RdBu" if low < 0 else "Blues", vmin=-1 if low < 0 else 0, vmax=1)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None:
                colour = "white" if abs(value) > 0.55 else "black"
                axes.text(j, i, _short(value), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)


def _short(value: float) -> str:
    """Return two digits without the leading zero: .42, -.07, 1."""
    text = f"{value:.2f}"
    return "1" if text == "1.00" else text.replace("0.", ".", 1)


def _save(figure: Figure, file: Path) -> None:
    # Neither date nor version: the same numbers give the same file.
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else {"Software": None}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, bbox_inches="tight", metadata=metadata)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); choose another place") from error
