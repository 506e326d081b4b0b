"""What bitsandbytes gives on a CPU for the drawn tensors below: 4-bit codes and values, steps of its 8-bit AdamW, and PEFT's LoRA on a
4-bit Llama. Run as a program where bitsandbytes 0.50.2 is installed beside the tests' packages, it writes bitsandbytes_golden.json beside
this file:

    python -m tests.nn.bitsandbytes_golden
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests.parity import hf

FIXTURE = Path(__file__).with_suffix(".json")
# Rows, columns, values to a block, whether scales are quantized too: blocks that end within rows, a last one that is cut, an odd number.
MATRICES = ((16, 64, 64, True), (5, 77, 32, True), (48, 50, 128, False), (66, 257, 64, True))
EVERY = 7  # of the values, one in so many is written down
LLAMA = {  # widths that blocks divide: bitsandbytes' CPU kernel gives other values where a row is shorter than a block
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
X = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
ADAMW = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
STEPS = 6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, columns: int) -> Tensor:
    """Rows of very different sizes, and one of zeros."""
    weight = drawn(rows, columns, seed=rows) * drawn(rows, 1, seed=columns).exp()
    weight[3] = 0.0
    return weight


def parameters() -> dict[str, Tensor]:
    """A large one, whose last block is cut, and a small one."""
    return {"large": drawn(65, 79, seed=1), "small": drawn(30, seed=2)}


def gradients(step: int) -> dict[str, Tensor]:
    return {name: drawn(*tensor.shape, seed=100 + step) * 10.0 ** (step % 3 - 3) for name, tensor in parameters().items()}


def adapted(model: Any) -> Any:
    """PEFT's adapter with every matrix drawn."""
    made = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    matrices = {name: parameter for name, parameter in made.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for number, name in enumerate(sorted(matrices)):
            matrices[name].copy_(0.2 * drawn(*matrices[name].shape, seed=number))
    return made


def text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().contiguous().numpy().tobytes()).decode()


def tensor(found: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(found)), dtype=dtype)


def in_four_bits(model: Any) -> Any:
    """bitsandbytes' maps in place of every linear map but the head, one after the other."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            model.set_submodule(name, made.to("cpu"))
            values = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
            assert (values - module.weight).norm() < 0.12 * module.weight.norm(), name
    model.is_loaded_in_4bit = True
    return model


def main() -> None:
    import bitsandbytes as bnb
    from bitsandbytes import functional

    tables = [functional.get_4bit_type("nf4", device="cpu"), functional.create_dynamic_map(True), functional.create_dynamic_map(False)]
    found: dict[str, Any] = {"made_by": {"bitsandbytes": bnb.__version__, "torch": torch.__version__, "peft": peft.__version__}}
    found["tables"] = dict(zip(("nf4", "dynamic", "positive"), map(text, tables), strict=True))
    found["matrices"] = []
    for rows, columns, block, double in MATRICES:
        codes, state = functional.quantize_4bit(matrix(rows, columns), blocksize=block, compress_statistics=double, quant_type="nf4")
        values = functional.dequantize_4bit(codes, state)
        found["matrices"].append(
            {"codes": text(codes.flatten()), "scales": text(state.absmax), "values": text(values.flatten()[::EVERY].clone())}
            | ({"outer": text(torch.cat([state.state2.absmax, state.offset[None]]))} if double else {})
        )
    params = {name: torch.nn.Parameter(value) for name, value in parameters().items()}
    optimizer = bnb.optim.AdamW8bit(list(params.values()), **ADAMW)
    found["steps"] = []
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            params[name].grad = gradient
        optimizer.step()
        found["steps"].append({name: text(value.flatten()[::EVERY].clone()) for name, value in params.items()})
    state = optimizer.state[params["large"]]
    found["state"] = {key: text(state[key].flatten()) for key in ("state1", "state2", "absmax1", "absmax2")}
    model = adapted(in_four_bits(hf.tiny("llama", **LLAMA)))
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 14
    model.train()  # at rest, bitsandbytes multiplies in bfloat16 on some processors; there is no dropout
    logits = model(input_ids=X, attention_mask=torch.ones_like(X)).logits
    logits.square().sum().backward()
    found["logits"] = text(logits)
    found["gradients"] = {
        name: text(parameter.grad) for name, parameter in model.named_parameters() if "layers.0.self_attn.v_proj.lora" in name
    }
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
