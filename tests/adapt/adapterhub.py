"""What AdapterHub's bottleneck adapters compute on a small GPT-2: run as a program where the packages adapters 1.3.0 and
transformers 4.57 are, it writes adapterhub.json beside this file. Every weight is a formula of its name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

KEYS = {"vocab_size": 29, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, "n_inner": 20}
TOKENS = [[3, 14, 15, 9, 26, 5, 8]]
KINDS = ("houlsby", "pfeiffer", "parallel")
FIXTURE = Path(__file__).with_suffix(".json")


def formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers between -0.5 and 0.5 that look drawn, the same everywhere; near 1 for a norm's weights."""
    start = sum((place + 1) * ord(char) for place, char in enumerate(name))
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    values = ((index * 7919 + start) * (index + 31 * start + 17) % 1009 / 1009 - 0.5).float().view(shape)
    return values + 1 if ".ln_" in name and name.endswith("weight") else values


def main() -> None:
    import adapters
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**KEYS, attn_implementation="eager")).eval()
    adapters.init(model)
    configs = {
        "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=3),
        "pfeiffer": adapters.SeqBnConfig(reduction_factor=3),
        "parallel": adapters.ParBnConfig(reduction_factor=3, scaling=4.0),
    }
    found = {}
    for kind, config in configs.items():
        model.add_adapter(kind, config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(formula(name, tuple(parameter.shape)))
        for kind in KINDS:
            model.set_active_adapters(kind)
            found[kind] = [[round(x, 6) for x in row] for row in model(torch.tensor(TOKENS)).logits[0].tolist()]
    made = {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    FIXTURE.write_text(json.dumps({"made_by": made, "logits": found}) + "\n")


if __name__ == "__main__":
    main()
