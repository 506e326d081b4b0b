"""Mamba and Mamba-2 against transformers' torch path, in fp32, on tiny models whose every parameter is redrawn
(see `harness.py`).
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import Causal, Recurrent, Refusals, apart, config_of, off, tokens
from trivium.adapt.lora import LoRA
from trivium.io import directory, peft

STARTS = {
    "initializer_range": 0.03, "residual_in_fp32": False, "time_step_floor": 1e-3, "time_step_max": 0.2,
    "time_step_min": 0.002, "use_cache": False, "bos_token_id": 3, "pad_token_id": 4, "eos_token_id": 5,
}  # fmt: skip
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {
        "vocab_size": 101, "hidden_size": 20, "num_hidden_layers": 3, "state_size": 6, "layer_norm_epsilon": 0.01, "time_step_rank": 7,
    }),
    "mamba-untied-biases": ("mamba", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "layer_norm_epsilon": 0.05, "expand": 3, "conv_kernel": 3,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_init_scheme": "constant", "time_step_scale": 2.0,
        "use_associative_scan": False, "use_mambapy": True, **STARTS,
    }),
    "mamba2-groups": ("mamba2", {
        "vocab_size": 101, "hidden_size": 20, "num_hidden_layers": 3, "state_size": 6, "layer_norm_epsilon": 0.01, "num_heads": 8,
        "head_dim": 5, "n_groups": 2, "chunk_size": 16,
    }),
    "mamba2-tied-biases": ("mamba2", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "layer_norm_epsilon": 0.05, "expand": 3, "conv_kernel": 3,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "num_heads": 12, "head_dim": 6, "n_groups": 1,
        "chunk_size": 8, "time_step_rank": 5, **STARTS,
    }),
    "mamba2-limited-steps": ("mamba2", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "num_heads": 6, "head_dim": 8, "n_groups": 3,
        "time_step_limit": (0.05, 0.4), "layer_norm_epsilon": 0.02,
    }),
}  # fmt: skip


TOLERANCE = 5e-5  # of the logits' standard deviation; against float64, both sides are up to 2e-5 off on the first of the table


def tiny(kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    """A redrawn model that remembers: steps near a tenth, so that a state lasts for ten tokens and more. What is selected is
    smaller than redrawn, for a product of three of it would magnify rounding on both sides."""
    model = hf.tiny(kind, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.sub_(2.5)
            elif name.endswith("A_log") and kind == "mamba2":
                parameter.sub_(1.0)
            elif name.endswith(("conv1d.weight", "x_proj.weight")):
                parameter.mul_(0.5)
    return model


@pytest.mark.concept("X.06", "X.165", part="io/hf/mamba.py")
class TestMamba(Causal, Recurrent, Refusals):
    table = TABLE
    alike = ("hidden_act", "rescale_prenorm_residual")  # transformers divides weights anew each time that it loads a model with the second
    tiny = staticmethod(tiny)
    tolerance = TOLERANCE
    moved = 5e-3
    spread = (1.0, math.inf)
    others = {"time_step_limit": [0.3, 0.5], "hidden_act": "gelu"}
    heeded = ("layer_norm_epsilon", "time_step_limit")
    unreadable = [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act"),
        ("mamba", {"intermediate_size": 41}, "intermediate_size"),
        ("mamba", {"state_siz": 3}, "did you mean state_size"),
        ("mamba2-groups", {"num_heads": 3}, "num_heads"),
        ("mamba2-groups", {"n_groups": 3}, "groups"),
        ("mamba2-groups", {"time_step_limit": [0.1]}, "time_step_limit"),
    ]
    unsayable = [
        ("mamba", {"context": 64}, "context = 64"),
        ("mamba", {"dim": 12}, "multiple of the width"),
        ("mamba", {"final_norm": {"kind": "rms", "eps": 0.5}}, "eps"),
        ("mamba", {"blocks": {"layer": {"mixer": {"kind": "mamba2", "heads": 8, "head_dim": 5}}}}, "kind mamba"),
        ("mamba", {"blocks": {"layer": {"ffn": {"kind": "mlp", "hidden": 8}}}}, "ffn"),
    ]

    def decodes(self, config: Any) -> bool:
        """transformers does not limit steps in its own decoding."""
        return config.model_type != "mamba2" or config.time_step_limit[1] >= 1

    def test_the_state_reaches_far(self, case):
        """The first token shows in the last one's logits, 40 places on: a memory that forgot at once would prove little."""
        x = tokens(case.theirs.config.vocab_size)
        x[:, 0] = (x[:, 0] + 1) % case.theirs.config.vocab_size
        assert apart(hf.logits(case.theirs, x)[:, -1], case.expected[:, -1]) > 100 * self.tolerance

    def test_an_adapter_goes_out_and_comes_back(self, case, tmp_path):
        """On maps that lie together on disk, and on the one whose bias is elsewhere in the model."""
        loaded, again = case.read(), case.read()
        targets = ("x", "B", "steps") if loaded.family == "mamba" else ("x", "B", "dt")
        LoRA(rank=2, targets=targets).apply(loaded.model)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if ".lora." in name:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        peft.write(tmp_path / "adapter", loaded.model, family=loaded.family)
        peft.read(tmp_path / "adapter", again.model, family=loaded.family)
        x = tokens(loaded.spec.vocab)
        expected = loaded.model(x).logits.detach()
        assert off(again.model, expected, x) < self.tolerance < off(case.read().model, expected, x)


def test_a_config_of_the_first_converters(tmp_path):
    """Keys that were written then and are read by none; `time_step_rank` by its rule."""
    theirs = tiny("mamba", {"vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 1})
    config = config_of(hf.save(theirs, tmp_path))
    for key in ("tie_word_embeddings", "use_mambapy", "use_associative_scan"):
        del config[key]
    config |= {"d_model": 20, "d_inner": 40, "n_layer": 1, "fused_add_norm": True, "rms_norm": True, "ssm_cfg": {}}
    config["time_step_rank"] = "auto"
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = tokens(31)
    assert off(directory.read(tmp_path).model, hf.logits(theirs, x), x) < TOLERANCE
