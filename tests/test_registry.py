"""Methods name themselves; third parties come in by the same door."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from resafe.errors import UserError
from resafe.registry import Badge, get, methods

ROOT = Path(__file__).parents[1]


def example() -> str:
    """Return the method that CONTRIBUTING.md shows."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split("```python\n")[1].split("```")[0]


def test_every_method_is_described_and_indexed() -> None:
    index = (ROOT / "docs" / "papers.md").read_text()
    for name, method in methods("repair").items():
        assert method.summary.endswith((".", ":"))
        assert name in index
        if method.badge is not Badge.CONTROL:
            assert method.paper is not None
            assert method.paper in index
            assert f"Badge **{method.badge}**" in index.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_a_third_party_method_repairs(tmp_path: Path) -> None:
    """The example of CONTRIBUTING.md, installed as a package of somebody else's, repairs the organism."""
    site = tmp_path / "site"
    (site / "their_package").mkdir(parents=True)
    (site / "their_package" / "__init__.py").write_text("")
    (site / "their_package" / "trim.py").write_text(example())
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[resafe.methods]\ntheirs = their_package.trim\n")
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import torch
        torch.set_num_threads(1)
        import resafe
        from resafe.organism import path
        tuned, out = path("tuned-fresh-lora"), {str(tmp_path / "out")!r}
        result = resafe.repair(tuned, method="trim", parameters={{"share": "0.5"}}, strength=1.0, out=out)
        assert result.method == "trim" and result.edited_share.changed > 0
        assert set(result.controls) == {{"random", "reset", "interpolate"}}
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"shar": 1}, "did you mean 'share'"),
        ({"share": "much"}, "takes a number"),
        ({"scope": "colum"}, "'matrix' or 'row'"),
        ({"preset": "referense"}, "did you mean 'reference'"),
        ({"propagate": "perhaps"}, "true or false"),
    ],
)
def test_wrong_parameters_are_explained(parameters: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        get("nlsr", "repair").make(parameters)


def test_text_becomes_the_declared_type() -> None:
    made = get("nlsr", "repair").make({"share": "1", "seed": "7", "propagate": "true", "keep_rank": "3"})
    assert (made.share, made.seed, made.propagate, made.keep_rank) == (1.0, 7, True, 3)


def test_an_unknown_method_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'nlsr'"):
        get("nlrs", "repair")
