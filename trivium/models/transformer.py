"""A stack of blocks between an embedding and a head: decoder or encoder, by `causal`.

The spec says which block stands at each layer; the module builds them, and is the one model that trains, samples,
evaluates and serves. It carries its spec and the passes applied to it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar, overload

import torch
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError, unknown
from ..core.seed import generator
from ..nn.adapted_inputs import VirtualTokens
from ..nn.attention import Place
from ..nn.embeddings import Embed, Tokens
from ..nn.heads import Head, LMHead
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.linear import OwnStart
from ..nn.norms import RMS, Norm
from ..nn.patches import PatchEmbedding
from ..nn.step import Step
from ..nn.store import Store
from .block import Block
from .checkpointing import Recompute, recomputed
from .initialization import Matrix, starts
from .model import BuiltModel, Model

B = TypeVar("B", bound=BuiltModel[Any])


class Transformer(Model):
    """What a model is. `layers` names a block for each layer; shorthand such as "8*(3*linear full)" is stored expanded."""

    kind: Literal["transformer"] = "transformer"
    dim: int = Field(gt=0, description="width of the residual stream")
    vocab: int = Field(gt=0, description="rows of the embedding table")
    layers: tuple[str, ...] = Field(min_length=1, description="the name of each layer's block, from the first to the last")
    blocks: dict[str, Block] = Field(description="the blocks, by name")
    shared: tuple[str, ...] = Field((), description="blocks of which all layers have the same weights: the stack runs through them again")
    embed: SerializeAsAny[Embed] = Field(Tokens(), description="how tokens become vectors")
    head: SerializeAsAny[Head] = Field(LMHead(), description="what is read off the last hidden state")
    final_norm: SerializeAsAny[Norm] = Field(RMS(), description="the norm before the head")
    causal: bool = Field(True, description="whether positions see only what came before")
    context: int | None = Field(None, gt=0, description="the length that the model was made for, in tokens")

    @field_validator("layers", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return expand_layers(value)
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            name for item in value for name in (expand_layers(item) if isinstance(item, str) and set(item) & set("* (") else (item,))
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, name in enumerate(self.layers):
            if name not in self.blocks:
                raise ValueError(unknown("block", name, self.blocks, field=f"layers[{index}]"))
        for name in self.blocks:
            if name not in self.layers:
                raise ValueError(f"block {name!r} is defined but no layer uses it")
        for name in self.shared:
            if self.layers.count(name) < 2:
                raise ValueError(f"shared: block {name!r} is not that of several layers")
        if len(widths := {block.residual.width for block in self.blocks.values()}) > 1:
            raise ValueError(f"all blocks must carry as many residual streams, not {', '.join(map(str, sorted(widths)))}")
        return self

    def to_dict(self, *, defaults: bool = False) -> dict[str, Any]:
        """As for any spec; `kind` is left out too where it is the default, as it is for whole models."""
        data = super().to_dict(defaults=defaults)
        return data if defaults else {name: value for name, value in data.items() if name != "kind"}

    def build(self) -> TransformerModel:
        return TransformerModel(self)

    def with_plain_names(self) -> Self:
        names = list(dict.fromkeys(self.layers))
        new = {name: "layer" if len(names) == 1 else f"layer{k}" for k, name in enumerate(names)}
        return self.replace(
            layers=tuple(new[name] for name in self.layers),
            blocks={new[name]: self.blocks[name] for name in names},
            shared=tuple(sorted(new[name] for name in self.shared)),
        )


def expand_layers(text: str) -> tuple[str, ...]:
    """ "2*(3*a b)" -> a a a b a a a b. Names, N*name, N*( ... ); anything else is an error."""
    tokens = re.findall(r"\d+\s*\*|[()]|[A-Za-z_][\w-]*|\S", text)
    position = 0

    def sequence(depth: int) -> list[str]:
        nonlocal position
        names: list[str] = []
        while position < len(tokens) and tokens[position] != ")":
            token, times = tokens[position], 1
            if token.endswith("*"):
                times, position = int(token[:-1]), position + 1
                token = tokens[position] if position < len(tokens) else ""
            position += 1
            if token == "(":
                inner = sequence(depth + 1)
                if position >= len(tokens):
                    raise ValueError(f"layers: a bracket is not closed in {text!r}")
                position += 1
            elif re.fullmatch(r"[A-Za-z_][\w-]*", token):
                inner = [token]
            else:
                raise ValueError(f"layers: cannot read {token!r} in {text!r}; write names, N*name or N*(...)")
            if len(names) + times * len(inner) > 10_000:
                raise ValueError(f"layers: {text!r} names more than 10,000 layers")
            names += times * inner
        if position < len(tokens) and depth == 0:
            raise ValueError(f"layers: a bracket too many in {text!r}")
        return names

    return tuple(sequence(0))


class TransformerModel(BuiltModel[Transformer]):
    """The built model: `model(tokens_or_inputs) -> Output`. `passes` lists what was done to it since it was built."""

    def __init__(self, spec: Transformer):
        super().__init__(spec)
        self.recompute: Recompute | None = None
        self.virtual: VirtualTokens | None = None  # an adapter's
        self.embed = spec.embed.build(spec.vocab, spec.dim)
        self.layers = nn.ModuleList(
            spec.blocks[name].build(spec.dim, Place(index, spec.layers[: index + 1])) for index, name in enumerate(spec.layers)
        )
        for index, name in enumerate(spec.layers):
            if name in spec.shared and (first := spec.layers.index(name)) < index:
                share(self.layers[first], self.layers[index])
        for layer in self.layers:
            for mixer in layer.mixers().values():  # type: ignore[operator]
                if (lender := mixer.lender()) is not None:
                    self.layers[lender].mixer.lends = True  # type: ignore[union-attr]
        self.final_norm = spec.final_norm.build(spec.dim)
        self.head = spec.head.build(spec.vocab, spec.dim)

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """See `Inputs` and `Output`. With a cache, the tokens are appended to it once all layers have run. `weights`: attention
        is computed naively and its weights are in `aux`."""
        inputs = as_inputs(inputs)
        if inputs.source is not None:
            raise ConfigError("this model has no encoder that could read a source: leave out Inputs(source=...)", field="source")
        inserted = None if self.virtual is None else self.virtual.insert(inputs, self.embed.rows)  # type: ignore[arg-type]
        step = self.begin(inputs if inserted is None else inserted.inputs, weights=weights)
        step.virtual = inserted
        x = self.run(self.embed(step.inputs.tokens, step), step)
        output = self.finish(x if inserted is None else inserted.outer(x), step.outer(), keep)
        step.commit()
        return output

    def begin(self, inputs: Inputs, *, weights: bool = False) -> Step:
        """What a forward on `inputs` shares. Images are cut into patches, where that is what this model embeds."""
        if inputs.images is not None:
            if not isinstance(self.embed, PatchEmbedding):
                raise ConfigError("this model reads no images: leave out Inputs(images=...)", field="images")
            inputs = replace(inputs, images=None, embeds=self.embed.cut(inputs.images))
        return Step.begin(inputs, causal=self.spec.causal, weights=weights)

    def run(self, x: Tensor, step: Step, *, depth: int | None = None) -> Tensor:
        """All layers this module holds, or the first `depth` of them, [B, T, C] -> [B, T, C]."""
        residual = self.spec.blocks[self.spec.layers[0]].residual
        layers = self.layers if depth is None else self.layers[:depth]
        x = residual.open(x)
        if self.recompute is not None and torch.is_grad_enabled() and step.inputs.cache is None:
            x = recomputed(layers, x, step, self.recompute)
        else:
            for layer in layers:
                x = layer(x, step)
        return residual.close(x)

    def finish(self, x: Tensor, step: Step, keep: Keep) -> Output:
        """Final norm, and logits at the positions that `keep` asks for; of a head that reads documents, those of every one."""
        hidden, reads = self.final_norm(x), self.spec.head.reads
        if reads == "nothing" or (isinstance(keep, str) and keep == "none"):
            return Output(hidden, None, step.aux)
        if reads == "documents":
            return Output(hidden, self.head(hidden, step, self.embed), step.aux)
        chosen = hidden
        if isinstance(keep, Tensor):
            chosen = hidden[keep]
        elif keep == "last":
            chosen = last_of(hidden, step.segments)
        else:
            assert keep == "all", f"keep must be all, last, none or a selector, not {keep!r}"
        return Output(hidden, self.head(chosen, step, self.embed), step.aux)

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        """An empty store for `rows` rows of up to `capacity` tokens, for this model as it stands after its passes. `rollback`: how
        many tokens can be dropped again where layers have state of a fixed size."""
        states = [layer.state() for layer in self.layers]  # type: ignore[operator]
        capacity += 0 if self.virtual is None else self.virtual.longest
        return Store(states, rows=rows, capacity=capacity, dtype=self.dtype, device=self.device, rollback=rollback)


def share(owner: nn.Module, user: nn.Module) -> None:
    """Let `user` have the parameters of `owner`, a module of the same make: what is named alike is one tensor."""
    for name, module in user.named_modules():
        for leaf in dict(module.named_parameters(recurse=False)):
            setattr(module, leaf, owner.get_submodule(name).get_parameter(leaf))


def last_of(hidden: Tensor, segments: Tensor | None) -> Tensor:
    """Each row's last position that is not padding: [B, T, C] -> [B, C]."""
    if segments is None:
        return hidden[:, -1]
    last = segments.shape[1] - 1 - (segments >= 0).flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


@overload
def build(spec: Transformer, *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> TransformerModel: ...


@overload
def build(spec: Model, *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> BuiltModel[Any]: ...


def build(spec: Model, *, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> BuiltModel[Any]:
    """The model that `spec` says, with parameters that hold nothing yet (on the meta device: no memory either)."""
    with torch.device(device):
        return spec.build().to(dtype)


@torch.no_grad()
def initialize(model: B, *, seed: int, std: float = 0.02, start: str = "gpt2", within: str = "") -> B:
    """Draw all parameters, or those of the module named `within`: matrices normal, with the deviation that the formula `start` gives
    (`std` is its base: see `initialization`), biases zero, norms one. Each parameter's draw depends on the seed and its name alone."""
    formula = starts.get(start, field="start")
    stacks = {name: len(module.layers) for name, module in model.named_modules() if isinstance(module, TransformerModel)}
    for prefix, module in model.named_modules():
        if within and not f"{prefix}.".startswith(f"{within}."):
            continue
        if isinstance(module, OwnStart):
            module.reset()
            continue
        stack = max((name for name in stacks if f"{prefix}.".startswith(f"{name}." if name else "")), key=len, default=None)
        local = prefix if not stack else prefix.removeprefix(f"{stack}.")
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
                continue
            outputs, inputs = parameter.shape
            place = Matrix(
                inputs=inputs,
                outputs=outputs,
                layers=1 if stack is None else stacks[stack],
                table=local.startswith("embed"),
                activated=".ffn." in local and ".inp." in local,
                writes=local.endswith((".mixer.out", ".cross.out")) or (".ffn." in local and local.endswith(".out")),
            )
            drawn = torch.randn(parameter.shape, generator=generator(seed, f"{prefix}.{name}"))
            parameter.copy_(drawn * formula(place, std))
    return model


def with_head(model: TransformerModel, head: Head, *, seed: int, std: float = 0.02) -> TransformerModel:
    """Give `model` another head, drawn anew: a pretrained model becomes a classifier. Refused once passes were applied to it."""
    if model.passes:
        kinds = ", ".join(step.kind for step in model.passes)
        raise ConfigError(f"a head is changed before passes are applied; this model has {kinds}", field="head", value=head.kind)
    spec = model.spec.replace(head=head)
    with torch.device(model.device):
        model.head = head.build(spec.vocab, spec.dim).to(model.dtype).train(model.training)
    model.spec = spec
    return initialize(model, seed=seed, std=std, within="head")
