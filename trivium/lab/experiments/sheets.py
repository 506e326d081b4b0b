"""Reference sheets against what they speak of: parameters of every family at its published size against transformers' own count,
and bytes of cache of every preset against those that a cache holds after a run."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from ...core.errors import MissingExtra
from ...io.hf import families
from ...models import count
from ...models.ledger import Ledger
from ...models.model import BuiltModel, Model
from ...models.presets import assemblies, presets
from ...models.transformer import Transformer, build, initialize
from ...models.vision_language import VisionLanguage
from ...nn.inputs import Inputs
from ...nn.patches import Patches
from ...recipes.sheet import sheet, unloaded
from . import Result, experiment

LARGE = 30_000_000  # parameters of a preset that is run as it is
TOKENS = 40
UNSAID: dict[str, dict[str, Any]] = {  # what defaults leave open, as published
    "deepseek_v2": {"num_experts_per_tok": 6},
    "llava": {"text_config": {"model_type": "llama", "vocab_size": 32064}},
}


def counts(kind: str) -> tuple[int, int]:
    """Parameters of a family's published size (the defaults of transformers' config), of our sheet of its bare config.json and of
    their model, both on the meta device. What they store as a buffer, such as a router's correction, is a parameter of ours, and
    counts on both sides."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "demo", "comparing with transformers") from None
    made = getattr(transformers, families.get(kind).architecture)
    with torch.device("meta"), tempfile.TemporaryDirectory() as folder:
        theirs = made._from_config(made.config_class(**UNSAID.get(kind, {})), attn_implementation="eager")
        theirs.config.architectures = [made.__name__]
        theirs.config.save_pretrained(folder)
        model = unloaded(folder)
    assert model is not None
    stored = theirs.state_dict().keys()
    buffers = sum(buffer.numel() for name, buffer in theirs.named_buffers() if name in stored)
    return sheet(model, context=8)["parameters"], theirs.num_parameters() + buffers


def reduced(spec: Model) -> Model:
    """A large decoder at width 64, with 97 words and one layer of each kind: what a layer caches depends on none of them."""
    if isinstance(spec, Transformer) and count.parameters(build(spec)).total > LARGE:
        return spec.replace(dim=64, vocab=97, layers=tuple(spec.blocks))
    return spec


def memory(spec: Model) -> tuple[dict[str, Any], int]:
    """What a model of several stacks reads beside tokens, and how many vectors its crosses make of it."""
    if spec.kind == "encoder_decoder":
        return {"source": Inputs(torch.arange(TOKENS)[None])}, TOKENS
    if isinstance(spec, VisionLanguage) and spec.join == "memory":
        assert isinstance(spec.vision.embed, Patches)
        return {"images": torch.zeros(1, spec.vision.embed.channels, spec.vision.embed.image, spec.vision.embed.image)}, spec.vectors
    return {}, 0


@torch.no_grad()
def held(model: BuiltModel[Any]) -> tuple[int, int, int]:
    """After a run over 40 tokens in several pieces: bytes of state by the store's own count; and of all that lives on beside the
    weights, in fractions and in whole numbers, of which most are marks (which place is whose)."""
    tokens, beside = torch.arange(TOKENS)[None] % 97, memory(model.spec)[0]
    with Ledger(lambda tensor: "fractions" if tensor.is_floating_point() else "whole") as ledger:
        ledger.note((*model.parameters(), *model.buffers(), tokens), "given")
        cache = model.cache(1, TOKENS)
        for part in tokens.split(13, 1):
            model(Inputs(part, cache=cache, **beside), keep="none")
            beside = {}
        return cache.bytes, ledger.live["fractions"], ledger.live["whole"]


def predicted(found: dict[str, Any], vectors: int) -> int | None:
    """What a sheet says of a cache of 40 tokens and a memory of so many vectors; None for what does not decode."""
    for stack in found["stacks"].values():
        if "cache_bytes" in stack["at"]:
            return stack["at"]["cache_bytes"] + (vectors - TOKENS) * stack.get("memory_bytes_per_token", 0)
    return None


def per_layer(found: dict[str, Any]) -> list[tuple[int, int]]:
    """(bytes per token, per row) of each kind of layer."""
    return [(b["cache_bytes_per_token"], b["state_bytes_per_row"]) for stack in found["stacks"].values() for b in stack["blocks"]]


@experiment("sheets", "X.21", question="Do reference sheets say how many parameters a model has and how many bytes its cache holds?")
def sheets(effort: float) -> Result:
    """Every family (fewer with less effort) at its published size, against transformers; every preset and assembly with a cache, run."""
    kinds = families.names() if effort >= 1 else families.names()[:3]
    sizes = {kind: counts(kind) for kind in kinds}
    caches: dict[str, Any] = {}
    for shapes in (presets, assemblies):
        for name in shapes.names():
            spec = shapes.get(name)()
            small = reduced(spec)
            whole, said = sheet(build(spec), context=TOKENS), sheet(build(small), context=TOKENS)
            if (told := predicted(said, memory(spec)[1])) is None:
                continue
            counted, fractions, whole_numbers = held(initialize(build(small, device="cpu"), seed=0).eval())
            alike = per_layer(whole) == per_layer(said)
            caches[name] = {
                "run": "whole" if small is spec else "reduced",
                "sheet": told,
                "store": counted,
                "alive": fractions + whole_numbers,
                "right": alike and told == counted and fractions <= told <= fractions + whole_numbers,
            }
    wrong = {kind: pair for kind, pair in sizes.items() if pair[0] != pair[1]}
    off = [name for name, row in caches.items() if not row["right"]]
    found = {"parameters, sheet and transformers": sizes, f"bytes of cache at {TOKENS} tokens": caches}
    verdict = (
        f"{'Holds' if not wrong and not off else 'Does not hold in full'}: parameters equal for {len(sizes) - len(wrong)} of {len(sizes)} families, "
        f"bytes of cache equal for {len(caches) - len(off)} of {len(caches)} presets."
    )
    return Result(found, verdict, ())
