"""T5 and T5 v1.1 against transformers, in fp32, on tiny models whose every parameter is redrawn.

The two stacks differ in depth, heads are wider together than the model, and rows differ in their padding (see `harness.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import TOLERANCE, Family, Refusals, apart, config_of, tensors_of
from tests.parity.test_bart import Searched, ours_of, theirs_of
from trivium.core.errors import FileError
from trivium.io import directory
from trivium.io.hf import families

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {
        "vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "layer_norm_epsilon": 0.01,
    }),
    "t5-v1.1": ("t5", {
        "vocab_size": 89, "d_model": 40, "d_kv": 6, "d_ff": 72, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 5, "dropout_rate": 0.25,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 20, "layer_norm_epsilon": 0.05, "initializer_factor": 0.5,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 3, "eos_token_id": 4, "classifier_dropout": 0.3,
        "use_cache": False,
    }),
    "t5-gelu": ("t5", {
        "vocab_size": 89, "d_model": 40, "d_kv": 6, "d_ff": 72, "num_layers": 2, "num_heads": 5, "feed_forward_proj": "gelu",
        "layer_norm_epsilon": 0.02,
    }),
}  # fmt: skip


def tiny(kind: str, keys: dict[str, Any]) -> transformers.T5ForConditionalGeneration:
    """Redrawn; biases of distances and what sublayers add weigh more, and queries less, since scores are not scaled. v1.1 has a head
    of its own."""
    model = hf.tiny(kind, **keys)
    config = model.config
    if keys.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        hf.redraw(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(config.d_kv**-0.5)
            elif name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(3)
            elif "relative_attention_bias" in name:
                parameter.mul_(4)
            elif name == "shared.weight" and config.scale_decoder_outputs:
                parameter.mul_(2)
    return model


def save(model: transformers.T5ForConditionalGeneration, path: Path) -> Path:
    """As transformers writes it; it always says that the head is tied, and files of v1.1 say that it is not."""
    hf.save(model, path)
    (path / "config.json").write_text(json.dumps({**config_of(path), "tie_word_embeddings": model.config.scale_decoder_outputs}))
    return path


@pytest.mark.concept("X.156", part="io/hf/t5.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
@pytest.mark.concept("T03.03", part="io/directory.py")
class TestT5(Family, Searched, Refusals):
    table = TABLE
    noise = 0.1
    alike = ("architectures", "tie_word_embeddings", "is_encoder_decoder", "is_decoder")
    tiny = staticmethod(tiny)
    save = staticmethod(save)
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)
    start = 0
    spread = (0.4, 3.0)
    others = {"architectures": ["T5EncoderModel"], "dense_act_fn": "silu"}
    heeded = ("feed_forward_proj", "layer_norm_epsilon", "relative_attention_max_distance", "dropout_rate")
    refused = ("architectures", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", "num_heads")
    unreadable = [
        ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish'"),
        ("t5", {"feed_forward_proj": "double-gelu"}, "feed_forward_proj 'double-gelu'"),
        ("t5", {"is_gated_act": True}, "disagree"),
        ("t5", {"architectures": ["T5EncoderModel"]}, "architectures 'T5EncoderModel' is not supported"),
        ("t5", {"relative_attention_num_buckets": 7}, "buckets"),
    ]
    unsayable = [
        ("t5", {"decoder": {"head": {"kind": "lm", "tied": True}}}, "scale"),
        ("t5", {"decoder": {"head": {"kind": "lm", "scale": 0.5}}}, "scale"),
        ("t5", {"encoder": {"final_norm": {"kind": "none"}}}, "final_norm"),
        ("t5", {"encoder": {"context": 7}}, "context"),
    ]

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What `feed_forward_proj` says, `dense_act_fn` says too, and must not contradict."""
        for key, now in super().mutations(config):
            yield key, {**now, "dense_act_fn": None} if key == "feed_forward_proj" else now

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key == "feed_forward_proj":
            return "gated-silu" if config["is_gated_act"] else "silu"
        return super().other(key, value, config)

    def idle(self, config: dict[str, Any]) -> tuple[str, ...]:
        """What it says, `scale_decoder_outputs` says too."""
        return ("tie_word_embeddings",)

    def test_each_stack_has_one_table_of_distances(self, case):
        assert len([name for name, _ in case.read().model.named_parameters() if "table" in name]) == 2


def test_early_files(tmp_path):
    """No keys that came later; copies of the table of tokens, and a table of biases that nothing reads."""
    theirs = tiny(*TABLE["t5"])
    config = config_of(save(theirs, tmp_path))
    for key in ("scale_decoder_outputs", "tie_word_embeddings", "dense_act_fn", "is_gated_act", "is_decoder", "classifier_dropout"):
        del config[key]
    extra = {"n_positions": 512, "output_past": True, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
    weights = tensors_of(tmp_path)
    copies = {
        name: weights["shared.weight"].clone() for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    }
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 6)}
    safetensors.torch.save_file(weights | copies | unread, tmp_path / "model.safetensors")
    loaded = directory.read(tmp_path)
    assert apart(ours_of(loaded.model, theirs.config), theirs_of(theirs)) < TOLERANCE
    assert extra.items() <= families.get("t5").to_hf(loaded.spec, loaded.rest).items()
    copies["lm_head.weight"][0] += 1
    safetensors.torch.save_file(weights | copies, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="lm_head"):
        directory.read(tmp_path)
