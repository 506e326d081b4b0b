"""What litgpt's adapter v1 (LLaMA-Adapter) computes on a small Llama: run as a program where the package litgpt 0.5.13 is, it writes
litgpt_adapter.json beside this file. One key head, for with more it cuts its fused map in another order than its model does."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.adapt.adapterhub import TOKENS, formula

DIM, HEADS, HIDDEN, VOCAB, LAYERS, LENGTH, START = 24, 4, 40, 29, 3, 5, 1
FIXTURE = Path(__file__).with_suffix(".json")


def main() -> None:
    from litgpt.adapter import GPT, Config

    config = Config(
        name="toy", block_size=16, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_query_groups=1, n_embd=DIM,
        head_size=DIM // HEADS, intermediate_size=HIDDEN, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=1e-6, mlp_class_name="LLaMAMLP", rope_base=10000, adapter_prompt_length=LENGTH, adapter_start_layer=START,
    )  # fmt: skip
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(formula(name, tuple(parameter.shape)) + (1 if ".norm_" in name else 0))
        logits = model(torch.tensor(TOKENS))[0]
    rows = [[round(x, 6) for x in row] for row in logits.tolist()]
    FIXTURE.write_text(json.dumps({"made_by": {"litgpt": "0.5.13", "torch": torch.__version__}, "logits": rows}) + "\n")


if __name__ == "__main__":
    main()
