"""Which architectures resafe understands: builds each one tiny, ablates neurons in every way, writes the table.

    python benchmarks/support_table.py [--out docs/architectures.md] [ARCHITECTURE ...]

Every causal language model of the installed transformers and every vision-language model is built with random
weights, its layout is read, one neuron of every feed-forward part (and of every routed expert) is silenced by hook
and by zeroing what the checkpoint holds of it, through `save_pretrained` and `from_pretrained`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.architectures import CAUSAL, VISION, Row, examine  # noqa: E402

STATES = {
    "works": "works",
    "refused": "refused",
    "fails": "**fails**",
    "none": "no feed-forward block",
    "not built": "not checked",
}
INTRODUCTION = """# Architectures

Made by `python benchmarks/support_table.py` with transformers {version}. Each architecture was built tiny with random
weights and biases. It *works* if all of this holds:

* every matrix of its decoder's blocks is known to belong to a feed-forward part or to something else;
* looking inside changes no logits, and silencing a neuron of any part changes them;
* in a gated part the neurons are linear in what is called up, and not in what is called the gate;
* a neuron of every part (and of every expert that a token reached), silenced by hook, gives the same logits as its
  gate and up rows zeroed, and as its down column zeroed, in the checkpoint that `save_pretrained` wrote, loaded again:
  to 1e-5 of the largest logit, or 1e-5 where that is below 1;
* the names found for the saved model and for the loaded one are the same.

*Refused*: `resafe` says why and stops. *Not checked*: transformers did not build or run it from a small config without
images or other inputs; nothing is claimed about it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [run(name) for name in options.names or (*CAUSAL, *VISION)]
    if not options.names:
        options.out.write_text(page(rows))
        print(f"wrote {options.out}")
    sys.exit(any(row.state == "fails" for row in rows))


def run(name: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        row = examine(name, Path(folder))
    print(name, row.state, row.parts, row.reason, sep=" | ", flush=True)
    return row


def page(rows: Sequence[Row]) -> str:
    causal = [row for row in rows if row.architecture in CAUSAL]
    vision = [row for row in rows if row.architecture in VISION]
    return "\n".join(
        [
            INTRODUCTION.format(version=transformers.__version__),
            *section("Causal language models", causal),
            *section("Vision-language models, with text alone", vision),
        ]
    )


def section(title: str, rows: Sequence[Row]) -> list[str]:
    count = Counter(row.state for row in rows)
    blocks = count["works"] + count["refused"] + count["fails"]
    return [
        f"## {title}",
        "",
        f"{count['works']} of {blocks} checked ones with a feed-forward block work "
        f"({100 * count['works'] / blocks:.1f} %); "
        f"{count['refused']} refused, {count['fails']} fail, {count['none']} have no feed-forward block, "
        f"{count['not built']} not checked.",
        "",
        "| architecture | | parts | remark |",
        "| --- | --- | --- | --- |",
        *(
            f"| {r.architecture} | {STATES[r.state]} | {r.parts} | {r.reason.replace('|', '/')} |"
            for r in rows
        ),
        "",
    ]


if __name__ == "__main__":
    main()
