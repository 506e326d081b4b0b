"""Presets: every part of the field is in one, or in an ablation that the documentation shows; each builds, starts, runs, learns,
and decodes with a cache as it reads the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trivium.core.spec import Part, parts
from trivium.io.hf import families
from trivium.lab.ablate import Ablate
from trivium.models import count
from trivium.models.dual_encoder import DualEncoder
from trivium.models.encoder_decoder import EncoderDecoder
from trivium.models.image_tokens import ImageTokens
from trivium.models.looped import LatentReasoning
from trivium.models.model import Model
from trivium.models.presets import assemblies, presets
from trivium.models.transformer import Transformer, build, initialize
from trivium.models.vision_language import VisionLanguage
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.patches import Patches
from trivium.recipes.pretrain import Pretrain

DOCS = Path(__file__).parents[2] / "docs"
ABLATIONS = "rooms/models.md"  # the page with ablations to try
ABLATED = {  # kinds that no preset has, and the page with an ablation or a command that uses them
    ("residual", "none"): ABLATIONS,
    ("feature map", "identity"): ABLATIONS,
    ("rope scaling", "linear"): ABLATIONS,
    ("rope scaling", "ntk"): ABLATIONS,
    ("rope scaling", "dynamic"): "tutorials/longer-context.md",
}
ALL = {**dict(presets.items()), **dict(assemblies.items())}
VOCAB, LENGTH = 97, 420  # longer than every window, and than the memories of what reads in segments


def registered() -> Iterator[tuple[str, str]]:
    """(what, kind) of all parts of models that the tree itself registers."""
    roots = [root for root in descendants(Part) if "registry" in root.__dict__ and root.registry.home in ("trivium.nn", "trivium.models")]
    for root in roots:
        for kind, member in root.registry.items():
            if member.__module__.startswith("trivium."):
                yield root.registry.what, kind


def descendants(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from descendants(child)


def test_every_part_is_in_a_preset_or_in_an_ablation_of_the_documentation():
    used = {(part.registry.what, part.kind) for shape in ALL.values() for part in parts(shape())}
    missing = set(registered()) - used
    assert missing == set(ABLATED), (
        f"neither in a preset nor in the table: {missing - set(ABLATED)}; no longer missing: {set(ABLATED) - missing}"
    )
    for (_, kind), page in ABLATED.items():
        assert re.search(rf"(`|=|,|: ){kind}\b", (DOCS / page).read_text(encoding="utf-8")), (kind, page)


def ablations() -> list[tuple[str, str]]:
    """(preset, what is varied) of the page's table."""
    return re.findall(r"^\| `([\w-]+)` \| `([^`]+=[^`]+)` \|", (DOCS / ABLATIONS).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_ablations_that_the_documentation_names_are_there():
    assert len(ablations()) >= 5


@pytest.mark.parametrize(("preset", "vary"), ablations())
def test_ablations_of_the_documentation(preset, vary):
    """Every value that the page names makes another model, which builds."""
    from trivium.lab.ablate import _axis

    base = Pretrain(tokenizer="none", data=("none",), preset=None, model=presets.get(preset)())
    made = [choice.apply(base).model for choice in _axis(base, vary)]
    assert len({spec.digest() for spec in made if spec is not None}) == len(made) > 1
    for spec in made:
        assert spec is not None and build(spec)
    assert Ablate(base=preset, vary=(vary,), validation=("none",), amount=1, tokenizer="none", data=("none",))


def test_names_are_unique_and_documented():
    assert not set(presets.names()) & set(assemblies.names())
    for name, shape in ALL.items():
        assert shape.__doc__, name
    assert all(name.endswith("-mini") for name in assemblies)
    for name, shape in presets.items():
        spec = shape()
        assert spec.causal and isinstance(spec.head, LMHead), f"{name} is for pretrain, which trains decoders"


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("-mini")])
def test_mini_presets_are_small(name):
    assert 3e6 < count.parameters(build(ALL[name]())).total < 12e6


WRITTEN = {  # presets after a family of models, which can write them: what is trained of these, others load
    "bert-mini": "bert", "deepseek-v3-mini": "deepseek_v3", "deepseek-v32-mini": "deepseek_v32", "gemma2-mini": "gemma2",
    "gemma3-mini": "gemma3_text", "gpt-oss-mini": "gpt_oss", "gpt2": "gpt2", "llama3-mini": "llama", "mamba-mini": "mamba",
    "mamba2-mini": "mamba2", "mistral-mini": "mistral", "mixtral-mini": "mixtral", "olmo2-mini": "olmo2", "phi3-mini": "phi3",
    "qwen3-mini": "qwen3", "qwen3-next-mini": "qwen3_next", "smollm3-mini": "smollm3", "t5-mini": "t5",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_presets_after_a_family_are_what_the_family_says(name):
    family, spec = families.get(WRITTEN[name]), ALL[name]()
    assert family.to_spec(family.to_hf(spec, {}))[0] == spec.with_plain_names()


def small(spec: Any) -> Any:
    """`spec` with its parts as they are, but narrow, with few tokens, and each kind of layer once."""
    if isinstance(spec, Transformer):
        dim, names = min(spec.dim, 64), tuple(dict.fromkeys(spec.layers))
        return spec.replace(dim=dim, vocab=1 if isinstance(spec.embed, Patches) else VOCAB, layers=names)
    if isinstance(spec, LatentReasoning):
        return spec.replace(body=small(spec.body), token=VOCAB - 1)
    changes: dict[str, Any] = {
        name: small(value) for name in type(spec).model_fields if isinstance(value := getattr(spec, name), Transformer)
    }
    if isinstance(spec, VisionLanguage) and spec.image_token is not None:
        changes["image_token"] = VOCAB - 1
    return spec.replace(**changes)


def given(spec: Model, length: int) -> Inputs:
    """Two rows of what a model of this kind reads."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB - 1, (2, length), generator=generator)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    if isinstance(spec, ImageTokens) or (isinstance(spec, Transformer) and isinstance(spec.embed, Patches)):
        return Inputs(images=images)
    if isinstance(spec, EncoderDecoder):
        return Inputs(tokens, source=Inputs(tokens[:, :7]))
    if isinstance(spec, DualEncoder):
        return Inputs(tokens, images=images)
    if isinstance(spec, VisionLanguage):
        marks = torch.full((2, spec.vectors), VOCAB - 1) if spec.join == "tokens" else tokens[:, :0]
        return Inputs(torch.cat([marks, tokens], 1), images=images)
    if isinstance(spec, LatentReasoning):
        tokens[:, 10:12] = spec.token
    return Inputs(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_preset_builds_starts_runs_and_has_gradients(name):
    assert next(build(ALL[name]()).parameters()).is_meta
    spec = small(ALL[name]())
    model, inputs = initialize(build(spec, device="cpu"), seed=0), given(spec, LENGTH if name.endswith("-mini") else 24)
    output = model(inputs)
    result = output.hidden if output.logits is None else output.logits
    assert bool(result.isfinite().all()) and result.std() > 0
    if isinstance(spec, Transformer) and isinstance(spec.head, LMHead):
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs.tokens[:, 1:].flatten()).backward()
    else:
        (result.square().sum() + sum(output.aux.terms.values())).backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert grads and all(bool(grad.isfinite().all()) for grad in grads.values())
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(".experts." in key or ".indexer." in key for key in without), without  # no token came, or they train on a term of their own


DECODING = [*presets.names(), "t5-mini", "coconut-mini", "llava-mini", "flamingo-mini"]


@pytest.mark.parametrize("name", DECODING)
def test_cached_decoding_is_the_full_forward(name):
    spec = small(ALL[name]())
    model, inputs = initialize(build(spec, device="cpu"), seed=0).eval(), given(spec, LENGTH if name.endswith("-mini") else 24)
    tokens = inputs.tokens
    assert tokens is not None
    first = tokens.shape[1] - 4
    with torch.inference_mode():
        whole = model(inputs).logits
        cache = model.cache(rows=2, capacity=tokens.shape[1])
        out = [model(Inputs(tokens[:, :first], images=inputs.images, source=inputs.source, cache=cache)).logits]
        out += [model(Inputs(tokens[:, i : i + 1], cache=cache)).logits for i in range(first, tokens.shape[1])]
    assert (torch.cat(out, 1) - whole).abs().max() < 1e-4 * whole.std()


def test_presets_that_rooms_of_the_documentation_name_are_there():
    """And the table of mixers holds every kind that is the tree's own."""
    page = (DOCS / "rooms" / "nn.md").read_text(encoding="utf-8")
    table = [line.split("|")[2:4] for line in page.splitlines() if line.startswith("| ") and "-mini`" in line]
    kinds, names = ({word for row in table for word in re.findall(r"`([\w-]+)`", row[i])} for i in (0, 1))
    assert kinds == {kind for what, kind in registered() if what == "mixer"} and names <= set(ALL)
