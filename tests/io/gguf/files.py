"""GGUF files for tests: small ones written by the gguf package, and the bytes of odd ones written by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    """One metadata entry from its parts."""
    return text(key) + struct.pack("<I", kind) + value


def row(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One row of the tensor table; `shape` rows first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(*, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def small(path: Path) -> Path:
    """A file with every kind of metadata and three tensors, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**63 + 1)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 1e-5)
    writer.add_float64("a.f64", 1e-5)
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_string("a.text", "grüße 🙂")
    writer.add_array("l.text", ["", "a", "grüße", "🙂" * 50])
    writer.add_array("l.int", [1, -2, 3])
    writer.add_array("l.float", [0.5, 1.5])
    writer.add_array("l.bool", [True, False, True])
    generator = np.random.default_rng(0)
    writer.add_tensor("one", generator.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("two", generator.normal(size=(2, 3, 4)).astype(np.float16))
    packed = gguf.quantize(generator.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("three", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama of transformers with every parameter redrawn."""
    sizes = dict(vocab_size=48, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3)
    config = LlamaConfig(**{**sizes, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **changes})
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim == 1 else 0.2))
    return model


def write_llama(path: Path, model: LlamaForCausalLM, *, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """`model` as llama.cpp's converter writes it. `metadata` and `tensors` add, replace, or, where None, remove."""
    config, arch = model.config, "llama"
    values = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
        **metadata,
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored[names.get_name(name, try_suffixes=(".weight", ".bias"))] = _as_stored(name, tensor, config).numpy()
    for name, tensor in {**stored, **tensors}.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    return finish(writer, path)


def _as_stored(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """q and k with the rows of each head as llama.cpp wants them: the two halves interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor.contiguous()
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
