"""A LoRA adapter as a GGUF file, which llama.cpp and what builds on it put on a model of the same base (`--lora`).

Factors stand under their base tensor's name with `.lora_a` [R, in] and `.lora_b` [out, R]. The file has one alpha, divided by each
map's own rank: scales that it cannot say (rsLoRA, alphas by map) are multiplied into B. Rows of B for queries and keys are
interleaved as those of the base. What starts from the base's own weights is written as its plain form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapt.adapter import adapters, linear_updates
from ...core.errors import ConfigError, unknown
from ...models.transformer import TransformerModel
from ...nn.adapted import LowRank
from ..hf import families
from ..peft_format import sites_of
from ..rules import some
from ..tensors import Lazy
from .export import ARCH, FILE_TYPES, NAMES, QUANTIZATION_VERSION, STORED, Written, as_stored, interleaved
from .family import ARCHITECTURES
from .writer import write_gguf


@torch.no_grad()
def write_adapter(
    path: Path | str,
    model: TransformerModel,
    *,
    name: str = "default",
    dtype: str | None = None,
    rest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Written:
    """Write adapter `name` of `model` to the GGUF file `path`, whole or not at all.

    `dtype`: f32, f16 or bf16; None is f32, as llama.cpp's own converter has it. `rest`: what the base's config says beyond the spec.
    Raises `ConfigError` for what the format cannot say: another method than LoRA, maps trained whole, another architecture.
    """
    path, step = Path(path), adapters(model).get(name)
    kind = NAMES.get((dtype or "f32").lower(), (dtype or "f32").lower()).upper()
    if kind not in STORED:
        raise ConfigError(unknown("type of GGUF tensors", str(dtype), [known.lower() for known in STORED]), field="dtype", value=dtype)
    found = {mine: update for mine, (_, update) in linear_updates(model, name).items()}
    assert step is not None
    if odd := [mine for mine, update in found.items() if not isinstance(update, LowRank)]:
        raise ConfigError(
            f"{path}: GGUF holds plain LoRA, and {some(odd)} of adapter {name!r} ({step.kind}) are not; for other methods that can be "
            "merged, say --kind lora, and --rank where they have none"
        )
    try:
        config = families.get(ARCH).to_hf(model.spec, rest or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: GGUF's architecture {ARCH!r} cannot hold this base: {error}", field=error.field) from None
    pairs = {place: _pair(found[site.ours[0]]) for place, site in sites_of(model, ARCH).items() if site.ours[0] in found}
    alpha = Counter(round(scale * len(A), 6) for A, _, scale in pairs.values()).most_common(1)[0][0]
    tensors = {}
    for place, (A, B, scale) in pairs.items():
        base, rotary = _named(place)
        if abs(scale * len(A) - alpha) > 1e-6:
            B = B * (scale * len(A) / alpha)
        if rotary is not None:
            B = interleaved(B, heads=config[rotary])
        tensors |= {f"{base}.lora_{side}": as_stored(base, Lazy.of(factor), kind) for side, factor in (("a", A), ("b", B))}
    metadata = {
        "general.architecture": ARCH,
        "general.type": "adapter",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    return Written(path, kind, write_gguf(path, metadata, tensors, overwrite=overwrite), ())


def _pair(update: Any) -> tuple[Tensor, Tensor, float]:
    """A [R, in], B [out, R] and what their product is multiplied by, float32."""
    A, B = (torch.cat([block[side].float() for block in update.blocks()], side) for side in (0, 1))
    return A, B, update.scale


def _named(place: str) -> tuple[str, str | None]:
    """The GGUF name of the weight of the linear map that Hugging Face calls `place`, and the config field that counts the heads
    whose rows llama.cpp interleaves in it."""
    layer = next((part for part in place.split(".") if part.isdigit()), "")
    known = {name.hf.format(layer): name for name in ARCHITECTURES[ARCH].names}
    name = known[f"{place}.weight"]
    return name.gguf.format(layer), name.rotary
