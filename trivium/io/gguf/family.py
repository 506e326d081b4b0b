"""GGUF's metadata and tensors as Hugging Face would name them, so that a GGUF file passes through the same door.

Names stand in two tables of values, readable in both directions. llama.cpp stores q and k with rotary pairs interleaved;
the rows are put back while still packed. Numbers stored as float32 become the shortest decimal that reads back as the same
float32. Every metadata key and every tensor is read, known to say nothing new, or refused by name. Architecture `llama`
(SmolLM2, Llama 2 and 3, Mistral in GGUF form) is read here, and written by `export`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...core.errors import ConfigError, unknown
from ..tensors import Lazy
from .dequantize import chunks
from .reader import GGUFFile


@dataclass(frozen=True)
class Key:
    """A metadata key, without the architecture before it, and the config field that says the same (dots go inside)."""

    gguf: str
    hf: str
    type: type[int] | type[float] = int
    default: float | None = None  # what llama.cpp takes where the key is absent; None: required
    default_from: str | None = None  # or the field whose value it takes


@dataclass(frozen=True)
class Name:
    """A tensor's two names; `{}` stands for the layer. `group` names the optional set it belongs to."""

    gguf: str
    hf: str
    group: str | None = None
    rotary: str | None = None  # the config field that counts the heads whose rows llama.cpp interleaves


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`, as values."""

    config: Mapping[str, Any]  # fields that metadata does not say
    keys: tuple[Key, ...]
    names: tuple[Name, ...]


_LLAMA_KEYS = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", default_from="num_attention_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Key("rope.freq_base", "rope_parameters.rope_theta", float, default=10000.0),
)
_LAYER, _HF_LAYER = "blk.{}.", "model.layers.{}."
_LLAMA_NAMES = (
    Name("token_embd.weight", "model.embed_tokens.weight"),
    Name(_LAYER + "attn_norm.weight", _HF_LAYER + "input_layernorm.weight"),
    Name(_LAYER + "attn_q.weight", _HF_LAYER + "self_attn.q_proj.weight", rotary="num_attention_heads"),
    Name(_LAYER + "attn_k.weight", _HF_LAYER + "self_attn.k_proj.weight", rotary="num_key_value_heads"),
    Name(_LAYER + "attn_v.weight", _HF_LAYER + "self_attn.v_proj.weight"),
    Name(_LAYER + "attn_output.weight", _HF_LAYER + "self_attn.o_proj.weight"),
    Name(_LAYER + "attn_q.bias", _HF_LAYER + "self_attn.q_proj.bias", "attention_bias", rotary="num_attention_heads"),
    Name(_LAYER + "attn_k.bias", _HF_LAYER + "self_attn.k_proj.bias", "attention_bias", rotary="num_key_value_heads"),
    Name(_LAYER + "attn_v.bias", _HF_LAYER + "self_attn.v_proj.bias", "attention_bias"),
    Name(_LAYER + "attn_output.bias", _HF_LAYER + "self_attn.o_proj.bias", "attention_bias"),
    Name(_LAYER + "ffn_norm.weight", _HF_LAYER + "post_attention_layernorm.weight"),
    Name(_LAYER + "ffn_gate.weight", _HF_LAYER + "mlp.gate_proj.weight"),
    Name(_LAYER + "ffn_up.weight", _HF_LAYER + "mlp.up_proj.weight"),
    Name(_LAYER + "ffn_down.weight", _HF_LAYER + "mlp.down_proj.weight"),
    Name(_LAYER + "ffn_gate.bias", _HF_LAYER + "mlp.gate_proj.bias", "mlp_bias"),
    Name(_LAYER + "ffn_up.bias", _HF_LAYER + "mlp.up_proj.bias", "mlp_bias"),
    Name(_LAYER + "ffn_down.bias", _HF_LAYER + "mlp.down_proj.bias", "mlp_bias"),
    Name("output_norm.weight", "model.norm.weight"),
    Name("output.weight", "lm_head.weight", "untied"),
)
ARCHITECTURES = {
    "llama": Architecture({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}, _LLAMA_KEYS, _LLAMA_NAMES),
}

CARRIED = ("general.", "tokenizer.", "quantize.", "split.")  # keys about the file, its making and its vocabulary
SAYS_NOTHING = ("rope.scaling.finetuned", "tensor_data_layout")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as every release has them
_EOS = ("eos", "eot", "eom")  # the tokens that end a text, a turn, a message
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}  # all other types come as float32


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file in Hugging Face's terms. `notes` are sentences for the user: what was rounded, inferred, passed over."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer: Mapping[str, Any]  # the keys `tokenizer.ggml.*`, decoded when asked for
    chat_template: str | None
    tensors: dict[str, Lazy]
    notes: list[str]


def to_hf(file: GGUFFile, *, allow: Iterable[str] = (), dtype: torch.dtype | None = None) -> GGUFModel:
    """What `file` holds, as a config and tensors under Hugging Face's names; nothing is decoded yet.

    `allow` lists metadata keys and tensors to pass over although they are not understood. Tensors come in `dtype`, or, when
    None, as they are stored (packed ones as float32). A `ConfigError` names what cannot be expressed or is not accounted for.
    """
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(f"{file.path}: {unknown('GGUF architecture', str(arch), ARCHITECTURES)}", value=arch, choices=ARCHITECTURES)
    reading = _Reading(file, arch, set(allow))
    config = _config(reading)
    tensors = _tensors(reading, config, dtype)
    reading.finish()
    tokenizer = file.metadata.under("tokenizer.ggml.")
    generation_config = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    template = reading.optional("tokenizer.chat_template", str)
    for key in sorted(key for key in file.metadata if key.startswith("tokenizer.chat_template.")):
        reading.notes.append(f"{key}: a second chat template, not taken over")
    return GGUFModel(config, generation_config, tokenizer, template, tensors, reading.notes)


class _Reading:
    """One pass over a file's keys and tensors, which remembers what was accounted for."""

    def __init__(self, file: GGUFFile, arch: str, allow: set[str]):
        self.file = file
        self.arch = arch
        self.allow = allow
        self.read: set[str] = set()
        self.notes: list[str] = []

    def fail(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: {problem}")

    def optional(self, key: str, kind: type) -> Any:
        """The value of `key` as `kind` (int, float, str), or None. Counts stand once for all layers and are positive."""
        self.read.add(key)
        if key not in self.file.metadata:
            return None
        value = self.file.metadata[key]
        if kind is float and type(value) in (int, float) and math.isfinite(value):
            return self.rounded(key, float(value))
        if type(value) is not kind or kind is float:
            listed = "; a value for each layer is not supported" if isinstance(value, np.ndarray) else ""
            raise self.fail(f"{key} must be one {kind.__name__}, not {value!r:.60}{listed}")
        return value

    def rounded(self, key: str, value: float) -> float:
        """The shortest decimal that is the same float32; what is no float32 stays."""
        with np.errstate(over="ignore"):
            narrow = np.float32(value)
        if float(narrow) != value or (short := float(str(narrow))) == value:
            return value
        self.notes.append(f"{key}: {value!r}, stored as float32, is read as {short!r}")
        return short

    def under(self, key: str) -> str:
        return f"{self.arch}.{key}"

    def finish(self) -> None:
        """Refuse every key and tensor that was neither read nor allowed."""
        keys = [key for key in self.file.metadata if key not in self.read and not key.startswith(CARRIED)]
        odd = keys + [name for name in self.file.tensors if name not in self.read]
        self.notes += [f"{name}: not understood, passed over as allowed" for name in odd if name in self.allow]
        if left := [name for name in odd if name not in self.allow]:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            raise self.fail(f"not understood: {', '.join(left[:8])}{more}; a model that ignores them may compute something else. "
                            "Allow them by name to go on without them")  # fmt: skip


def _config(reading: _Reading) -> dict[str, Any]:
    """The config's fields, from metadata and, where metadata does not say, from which tensors there are."""
    architecture = ARCHITECTURES[reading.arch]
    fields: dict[str, Any] = {}
    for key in architecture.keys:
        name = reading.under(key.gguf)
        value = reading.optional(name, key.type)
        if value is None:
            value = fields[key.default_from] if key.default_from else key.default
        if value is None or value <= 0:
            raise reading.fail(f"{name} is {'missing' if value is None else f'{value}, but must be positive'}")
        fields[key.hf] = value
    head_dim = _head_dim(reading, fields)
    config: dict[str, Any] = {
        **architecture.config,
        **{name: value for name, value in fields.items() if "." not in name},
        "head_dim": head_dim,
        "vocab_size": _vocab_size(reading),
        "rope_parameters": _rope(reading, theta=fields["rope_parameters.rope_theta"], head_dim=head_dim),
        "tie_word_embeddings": not _present(reading, "untied"),
        "attention_bias": _present(reading, "attention_bias"),
        "mlp_bias": _present(reading, "mlp_bias"),
    }
    return config | _special_tokens(reading, vocab_size=config["vocab_size"])


def _present(reading: _Reading, group: str) -> bool:
    """Whether the file holds tensors of an optional group; the first layer speaks for all."""
    return any(name.gguf.format(0) in reading.file.tensors for name in ARCHITECTURES[reading.arch].names if name.group == group)


def _head_dim(reading: _Reading, fields: dict[str, Any]) -> int:
    """The width of a head. Keys that could say something else must say the same: whole heads are rotated, nothing is routed."""
    name = reading.under("attention.key_length")
    head_dim = reading.optional(name, int)
    if head_dim is None:
        head_dim, rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
        if rest:
            raise reading.fail(f"{name} is missing, and {fields['hidden_size']} is no multiple of {fields['num_attention_heads']} heads")
    fixed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim, "expert_count": 0, "expert_used_count": 0}
    for key, expected in fixed.items():
        value = reading.optional(reading.under(key), int)
        if value is not None and value != expected:
            raise reading.fail(f"{reading.under(key)} is {value}; only {expected} is supported here")
    if reading.optional(reading.under("attention.causal"), bool) is False:
        raise reading.fail(f"{reading.under('attention.causal')} is false; only causal models are supported")
    reading.read.update(reading.under(key) for key in SAYS_NOTHING)
    return head_dim


def _vocab_size(reading: _Reading) -> int:
    """Rows of the embedding, which metadata must not contradict."""
    shape = reading.file.info("token_embd.weight").shape
    if len(shape) != 2:
        raise reading.fail(f"token_embd.weight has the shape {shape}, not two dimensions")
    tokens = reading.optional(reading.under("vocab_size"), int)
    if tokens not in (None, shape[0]):
        raise reading.fail(f"{reading.under('vocab_size')} is {tokens}, but token_embd.weight has {shape[0]} rows")
    return shape[0]


def _special_tokens(reading: _Reading, *, vocab_size: int) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad; several that end become a list."""
    ids: dict[str, int | None] = {}
    for name in ("bos", "padding", *_EOS):
        key = f"tokenizer.ggml.{name}_token_id"
        found = reading.optional(key, int)
        ids[name] = found if found is not None and 0 <= found < vocab_size else None
        if found != ids[name]:
            reading.notes.append(f"{key}: {found} is no token of the {vocab_size}, so there is none")
    ends = list(dict.fromkeys(ids[name] for name in _EOS if ids[name] is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": ids["padding"],
    }


def _rope(reading: _Reading, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Rotary parameters. llama.cpp takes a factor without a type as linear; Llama 3's scaling comes as a tensor of factors."""
    kind = reading.optional(reading.under("rope.scaling.type"), str) or "linear"
    factor = reading.optional(reading.under("rope.scaling.factor"), float) or 1.0
    context = reading.optional(reading.under("rope.scaling.original_context_length"), int)
    if kind not in ("none", "linear"):
        raise reading.fail(f"{reading.under('rope.scaling.type')} is {kind!r}; none, linear and Llama 3's ({ROPE_FACTORS}) are supported")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    linear = kind == "linear" and factor != 1
    if linear:
        rope |= {"rope_type": "linear", "factor": factor}
    if ROPE_FACTORS not in reading.file.tensors:
        return rope
    reading.read.add(ROPE_FACTORS)
    factors = reading.file.array(ROPE_FACTORS)
    if factors.shape == (head_dim // 2,) and not linear:
        if (factors == 1).all():
            return rope
        llama3 = LLAMA3 | {"factor": float(str(factors.max()))} | ({"original_max_position_embeddings": context} if context else {})
        if np.allclose(factors, llama3_factors(llama3, theta=theta, head_dim=head_dim), rtol=2e-5, atol=0):
            reading.notes.append(f"{ROPE_FACTORS}: equals Llama 3's scaling with {_listed(llama3)}")
            return rope | {"rope_type": "llama3"} | llama3
    raise reading.fail(f"{ROPE_FACTORS} does not hold Llama 3's factors ({_listed(LLAMA3)}), so no config can say what it does")


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def llama3_factors(scaling: Mapping[str, float], *, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each rotary frequency by, float64 [head_dim / 2]."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = ((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clip(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _tensors(reading: _Reading, config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """All tensors of the architecture, in its order, under Hugging Face's names; a missing one is an error."""
    groups = {None: True, "untied": not config["tie_word_embeddings"]} | {name: config[name] for name in ("attention_bias", "mlp_bias")}
    layers, found, missing = config["num_hidden_layers"], {}, []
    if layers > len(reading.file.tensors):
        raise reading.fail(f"claims {layers} layers, but holds {len(reading.file.tensors)} tensors")
    for name in ARCHITECTURES[reading.arch].names:
        if not groups[name.group]:
            continue
        for layer in range(layers) if "{}" in name.gguf else (0,):
            stored = name.gguf.format(layer)
            if stored not in reading.file.tensors:
                missing.append(stored)
                continue
            reading.read.add(stored)
            heads = config[name.rotary] if name.rotary else None
            found[name.hf.format(layer)] = _lazy(reading, stored, heads=heads, head_dim=config["head_dim"], dtype=dtype)
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise reading.fail(f"tensors are missing: {', '.join(missing[:8])}{more}")
    return found


def _lazy(reading: _Reading, name: str, *, heads: int | None, head_dim: int, dtype: torch.dtype | None) -> Lazy:
    file, info = reading.file, reading.file.info(name)
    dtype = dtype or _STORED.get(info.type, torch.float32)
    if heads is not None and (head_dim % 2 or not info.shape or info.shape[0] != heads * head_dim):
        raise reading.fail(f"{name} has the shape {info.shape}, which is not {heads} heads of {head_dim}")

    def load() -> torch.Tensor:
        raw = file.raw(name) if heads is None else _halves(file.raw(name), heads=heads, head_dim=head_dim)
        out = torch.empty(info.shape, dtype=dtype)
        flat, start = out.view(-1), 0
        for chunk in chunks(info.type, raw):
            flat[start : start + len(chunk)] = torch.from_numpy(chunk)
            start += len(chunk)
        return out

    return Lazy(info.shape, dtype, load)


def _halves(raw: np.ndarray, *, heads: int, head_dim: int) -> np.ndarray:
    """Rows of q or k, still packed, from llama.cpp's order (pairs side by side) to Hugging Face's (first halves, then second)."""
    return raw.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(-1)
