"""Every repair method and control on every tuned model of the organism, over several fine-tuning seeds.

    python benchmarks/organism_methods.py --work /some/folder --out docs/results.md

Fine-tunes with seeds 1 and 2 are trained from the shipped parents (about five minutes each); seed 0 is shipped. Each
method's setting and strength are chosen on the choosing split and reported on the reporting split, by `resafe compare`.
The table gives the mean and the range over the seeds. JSON of every run is kept in the work folder, and a run that is
already there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import resafe
from resafe.organism import WEIGHTS, build

TUNED = ("tuned-lora", "tuned-fresh-lora", "tuned-full", "tuned-benign", "late-tuned")
SEEDS = (0, 1, 2)
RATES = ("harmful_rate", "over_refusal", "incoherent_rate", "task_score", "ability")


def family(work: Path, seed: int) -> Path:
    """Return a folder with the whole family whose tuned models have this fine-tuning seed."""
    if seed == 0:
        return WEIGHTS
    folder = work / f"seed{seed}"
    if not (folder / "manifest.json").is_file():
        shutil.copytree(WEIGHTS, folder)
        build(TUNED, folder, finetune_seed=seed, progress=print, measured=False)
    return folder


def row_of(result: dict[str, object]) -> dict[str, float | None]:
    """Flatten the rates of one measurement."""
    return {name: None if result[name] is None else result[name]["value"] for name in RATES}


def run(work: Path, name: str, seed: int) -> dict[str, object]:
    """Compare all methods on one tuned model, or read the comparison that is already there."""
    file = work / f"{name}.{seed}.json"
    if not file.is_file():
        file.write_text(json.dumps(resafe.compare(family(work, seed) / name).to_dict(), default=str))
    return json.loads(file.read_text())


def lines_of(comparison: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return label -> rates, damage and share, for the tuned model, its reference, each method and each control."""
    lines: dict[str, dict[str, object]] = {
        "reference": row_of(comparison["reference"]),
        "tuned": row_of(comparison["tuned"]),
    }
    for row in comparison["rows"]:
        share = row["edited_share"]
        setting = " ".join(f"{k}={v}" for k, v in row["parameters"].items())
        lines[row["method"]] = {
            **row_of(row["held_out"]),
            "damage": row["damage"],
            "model": share["model"],
            "targeted": share["targeted"],
            "setting": f"{setting} × {row['strength']:g}".strip(),
        }
        for control, found in row["controls"].items():
            lines[f"{row['method']}: {control}"] = row_of(found)
    return lines


def span(values: list[float | None], digits: int = 3) -> str:
    """Return ``mean (low–high)``."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    return f"{mean:.{digits}f} ({min(known):.{digits}f}–{max(known):.{digits}f})"


def table(name: str, comparisons: list[dict[str, object]]) -> str:
    """Return the Markdown table of one tuned model."""
    per_seed = [lines_of(c) for c in comparisons]
    out = [
        f"### {name}",
        "",
        "| | harmful | over-refusal | incoherent | task | ability | damage | edited, model | matrices | chosen |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in per_seed[0]:
        rows = [lines.get(label, {}) for lines in per_seed]
        cells = [span([r.get(rate) for r in rows]) for rate in RATES]
        cells += [span([r.get("damage") for r in rows], 5)]
        cells += [span([r.get(key) for r in rows]) for key in ("model", "targeted")]
        settings = "; ".join(str(r["setting"]) for r in rows if "setting" in r)
        shown = f"**{label}**" if ":" not in label else f"↳ {label.split(': ')[1]}"
        out.append(f"| {shown} | " + " | ".join(cells) + f" | {settings} |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=TUNED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    tables = [table(name, [run(options.work, name, seed) for seed in SEEDS]) for name in options.only]
    text = "\n".join(tables)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
