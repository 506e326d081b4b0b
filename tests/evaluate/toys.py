"""A tiny Llama and a tiny byte-level BPE tokenizer, pure functions of numbers, in the forms that other tools read (no import of the house here)."""

from __future__ import annotations

import json

import numpy as np

END = "<|end|>"
MERGES = (  # noqa: SIM905
    "Ġ t|h e|Ġt he|i n|e r|Ġ a|o n|r e|Ġ s|a t|e n|Ġ w|o r|Ġ c|i t|i s|a n|Ġ b|e s|Ġ f|in g|Ġ p|o u|Ġ o|l l|Ġ m|e d|Ġ in|a r|Ã ©|s t"
    "|s w|Ġs w|: Ġ|Ġa n|Ġan s|Ġans w|Ġansw er"
).split("|")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in plain else next(hidden) for byte in range(256)]


def tokenizer_json() -> str:
    merges = [tuple(merge.split()) for merge in MERGES]
    tokens = list(dict.fromkeys([*alphabet(), *("".join(merge) for merge in merges)]))
    vocab = {token: index for index, token in enumerate(tokens)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {
        "id": len(vocab),
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges], "ignore_merges": False}
    return json.dumps({"version": "1.0", "added_tokens": [special], "pre_tokenizer": level, "decoder": level, "model": model})


def vocab() -> int:
    return len(json.loads(tokenizer_json())["model"]["vocab"]) + 1


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter redrawn, norms too, under Hugging Face's names; logits have a standard deviation between 1 and 3."""
    random = np.random.default_rng(seed)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    dim, heads, kv, size, hidden = (CONFIG[name] for name in names)
    shapes = {"model.embed_tokens.weight": (vocab(), dim), "lm_head.weight": (vocab(), dim), "model.norm.weight": (dim,)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (heads * size, dim),
            f"{at}self_attn.k_proj.weight": (kv * size, dim),
            f"{at}self_attn.v_proj.weight": (kv * size, dim),
            f"{at}self_attn.o_proj.weight": (dim, heads * size),
            f"{at}mlp.gate_proj.weight": (hidden, dim),
            f"{at}mlp.up_proj.weight": (hidden, dim),
            f"{at}mlp.down_proj.weight": (dim, hidden),
            f"{at}input_layernorm.weight": (dim,),
            f"{at}post_attention_layernorm.weight": (dim,),
        }
    drawn = {}
    for name, shape in shapes.items():
        values = random.normal(size=shape)
        drawn[name] = (1 + 0.2 * values if len(shape) == 1 else values * (0.3 if name.startswith("lm_head") else 0.25)).astype(np.float32)
    return drawn


_WORDS = "the|answer|is|water|stone|fire|café|naïve|river|on|in|another|swing|red|seven|small|über|star|moon|forest".split("|")  # noqa: SIM905


def questions(count: int = 40, seed: int = 1) -> list[dict]:
    """Multiple choice of no sense: contexts and choices of unequal length, some beyond ASCII, three or four choices a row."""
    random = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(random.choice(_WORDS, random.integers(low, high)))

    rows = []
    for _ in range(count):
        choices: list[str] = []
        while len(choices) < 3 + len(rows) % 2:
            if (choice := words(1, 5)) not in choices:
                choices.append(choice)
        rows.append({"question": words(3, 9) + "?", "choices": choices, "answer": int(random.integers(0, len(choices)))})
    return rows


def texts(count: int = 12, seed: int = 2) -> list[dict]:
    random = np.random.default_rng(seed)
    return [{"text": " ".join(random.choice(_WORDS, random.integers(5, 40)))} for _ in range(count)]
