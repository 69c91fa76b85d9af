"""A neuron is the same neuron in memory and on disk, in one architecture of every kind that resafe understands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.model.layout import read_layout
from tests.architectures import CAUSAL, VISION, examine, tiny

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
GATED, FUSED, PLAIN = "gated", "gated fused", "plain"
EXPERTS = "gated fused experts"
PARTS = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gemma2": GATED,
    "gemma3": GATED,  # the one with eyes
    "phi3": FUSED,
    "gpt2": PLAIN,  # weights stored (in, out)
    "gpt_neox": PLAIN,
    "olmo2": GATED,
    "mixtral": EXPERTS,  # one tensor per expert in the checkpoint
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,  # interleaved, transposed, with bias, clamped
    "deepseek_v3": f"{GATED}, {EXPERTS}",
    "glm4": FUSED,
    "qwen2_moe": f"{EXPERTS}, {GATED}",  # a shared expert with a gate of its own
    "nemotron_h": f"{PLAIN} experts, {PLAIN}",
    "aria_text": f"{EXPERTS}, {GATED}",  # transposed
    "qwen3_vl_moe": EXPERTS,
    "llava": GATED,
    "qwen2_5_vl": GATED,
    "muse_spark": EXPERTS,  # a norm after each expert
    "llama4_text": f"{EXPERTS}, {GATED}",
    "dbrx": "gated experts",
    "jetmoe": EXPERTS,
    "longcat_flash": f"{EXPERTS}, {GATED}",
    "inkling_text": f"{EXPERTS}, gated experts",
    "moshi": FUSED,
    "bert": PLAIN,
    "opt": PLAIN,
    "ctrl": PLAIN,
    "bitnet": GATED,
}


@pytest.mark.parametrize("architecture", PARTS)
def test_a_neuron_is_ablated_alike_by_hook_and_on_disk(architecture: str, tmp_path: Path) -> None:
    row = examine(architecture, tmp_path)
    assert (row.state, row.parts) == ("works", PARTS[architecture]), row.reason
    assert f"| {architecture} | works | {row.parts} | {row.reason} |" in TABLE.read_text()


@pytest.mark.parametrize(
    ("architecture", "settings", "parts"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True, "num_key_value_heads": 4}, GATED),
        ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}, GATED),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20},
            f"{GATED}, {EXPERTS}",
        ),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, PLAIN),
        ("granitemoehybrid", {"num_local_experts": 0}, FUSED),
    ],
)
def test_a_switch_in_the_config_is_no_other_architecture(
    architecture: str, settings: dict[str, object], parts: str, tmp_path: Path
) -> None:
    row = examine(architecture, tmp_path, settings)
    assert (row.state, row.parts) == ("works", parts), row.reason


def test_experts_that_are_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_embed"):
        read_layout(tiny("doge", settings={"is_moe": True, "num_experts": 16}))


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("zamba2", "gate_up_proj_adapter_list"),
        ("zamba", r"layers\.4\..* has the weights of .*layers\.2\."),
        ("mamba", "no feed-forward block"),
    ],
)
def test_what_is_not_understood_is_refused_and_says_why(architecture: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_layout(tiny(architecture))


def test_the_table_names_every_architecture_of_the_release_it_was_made_with() -> None:
    lines = [line.split(" | ")[0] for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [line.removeprefix("| ") for line in lines if line not in ("| architecture", "| ---")]
    assert len(rows) == len(set(rows))
    assert len(set(rows) & {*CAUSAL, *VISION}) > 0.9 * len(rows)


def test_a_wrong_layout_would_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resafe.model import parts

    monkeypatch.setitem(parts.DENSE_BY_CLASS, "LlamaMLP", ("gate_proj", "up_proj", "gate_proj"))
    assert "do not share their neurons" in examine("llama", tmp_path).reason
    monkeypatch.setattr(parts, "DENSE_BY_CLASS", {})
    shifted = parts._halves
    monkeypatch.setattr(parts, "_halves", lambda width, **how: tuple(reversed(shifted(width, **how))))
    assert examine("jetmoe", tmp_path).state == "fails"  # gate for up: their product is another one


def test_the_tiny_models_leave_no_weight_at_zero() -> None:
    for name, parameter in tiny("gpt2").named_parameters():
        assert parameter.abs().min() > 0, name
    assert not torch.equal(tiny("gpt2", 0).lm_head.weight, tiny("gpt2", 1).lm_head.weight)
