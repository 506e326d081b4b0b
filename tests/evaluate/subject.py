"""The toy model, tokenizer and prompt on our side."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch

from tests.evaluate import toys
from trivium.evaluate.task import Subject
from trivium.models import presets
from trivium.models.transformer import TransformerModel, build
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
_NAMES = {
    "self_attn.q_proj": "mixer.inp.q",
    "self_attn.k_proj": "mixer.inp.k",
    "self_attn.v_proj": "mixer.inp.v",
    "self_attn.o_proj": "mixer.out",
    "mlp.gate_proj": "ffn.inp.gate",
    "mlp.up_proj": "ffn.inp.up",
    "mlp.down_proj": "ffn.out",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "lm_head": "head.out",
    "model.layers": "layers",
}


def model(seed: int = 0) -> TransformerModel:
    spec = presets.llama(dim=48, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=40, vocab=toys.vocab(), context=256)
    built = build(spec, device="cpu")
    state = {}
    for name, value in toys.weights(seed).items():
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = torch.from_numpy(value)
    built.load_state_dict(state, strict=True)
    return built.eval()


def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(toys.tokenizer_json()), {"eos_token": toys.END}, where="toy")


def subject(seed: int = 0, *, tokens: int = 2048, batch: int = 16) -> Subject:
    text = tokenizer()
    return Subject(model(seed), text, Prompt.of(text, TEMPLATE), tokens=tokens, batch=batch)
