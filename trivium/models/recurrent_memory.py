"""A model that reads text in segments and hands a few vectors on from each to the next (Recurrent Memory Transformer,
arXiv:2207.06881): memory tokens stand before and after each segment; what the later ones become is the next segment's memory.

The body is any causal `Transformer`. State is `memory` x dim numbers a row, however long the text; gradients pass through the
last `horizon` segments. Rows hold one document each, padding anywhere; decoding with a cache is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..nn.embeddings import TokenEmbedding, Tokens
from ..nn.inputs import Aux, Inputs, Keep, Output, as_inputs
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer, last_of


class RecurrentMemory(Model):
    """What the model is: a body, and how it is led through a text."""

    kind: Literal["recurrent_memory"] = "recurrent_memory"
    body: Transformer = Field(description="what reads a segment; causal")
    memory: int = Field(gt=0, description="vectors that a segment hands on")
    size: int = Field(gt=0, description="tokens in a segment")
    horizon: int | None = Field(None, gt=0, description="segments that gradients pass through; none given: all")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.body.causal or not isinstance(self.body.embed, Tokens) or self.body.embed.types:
            raise ValueError("the body is causal, and its embed is of kind tokens, without types")
        return self

    @property
    def vocab(self) -> int:
        return self.body.vocab

    @property
    def context(self) -> None:
        """There is no length that it was made for."""
        return None

    def build(self) -> RecurrentMemoryModel:
        return RecurrentMemoryModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(body=self.body.with_plain_names())


class MemoryTokens(nn.Module):
    """What the memory is before the first segment, [count, C]."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))


class RecurrentMemoryModel(BuiltModel[RecurrentMemory]):
    """The built model. `model(inputs)` reads a whole text from the first memory on; `read` one segment from any."""

    def __init__(self, spec: RecurrentMemory):
        super().__init__(spec)
        self.body = spec.body.build()
        self.memory = MemoryTokens(spec.memory, spec.body.dim)

    def start(self, rows: int) -> Tensor:
        """The memory [B, M, C] before the first segment."""
        return self.memory.weight.expand(rows, -1, -1)

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """As of a `Transformer`, but without a cache."""
        inputs = as_inputs(inputs)
        self._check(inputs)
        memory, outputs = self.start(inputs.shape[0]), []
        pieces = -(-inputs.shape[1] // self.spec.size)
        for number in range(pieces):
            if self.spec.horizon is not None and number and number == pieces - self.spec.horizon:
                memory = memory.detach()
            place = slice(number * self.spec.size, (number + 1) * self.spec.size)
            tokens, embeds, segments = (None if x is None else x[:, place] for x in (inputs.tokens, inputs.embeds, inputs.segments))
            output, memory = self.read(replace(inputs, tokens=tokens, embeds=embeds, segments=segments), memory, weights=weights)
            outputs.append(output)
        hidden = torch.cat([output.hidden for output in outputs], 1)
        logits = torch.cat([output.logits for output in outputs if output.logits is not None], 1)
        aux = outputs[0].aux if pieces == 1 else _summed([output.aux for output in outputs])
        if isinstance(keep, Tensor):
            return Output(hidden, logits[keep], aux)
        if keep == "last":
            return Output(hidden, last_of(logits, inputs.segments), aux)
        return Output(hidden, logits if keep == "all" else None, aux)

    def read(self, inputs: Inputs, memory: Tensor, *, weights: bool = False) -> tuple[Output, Tensor]:
        """One segment [B, T], and the memory [B, M, C] before and after it. A row of padding alone keeps its memory."""
        batch, count = inputs.shape
        held = memory.shape[1]
        x = torch.cat([memory, self._embedded(inputs), memory], 1)
        if inputs.segments is None:
            output = self.body(replace(inputs, tokens=None, embeds=x), weights=weights)
            hidden = output.hidden
            return self._tokens(output, slice(held, held + count)), hidden[:, held + count :]
        ends = inputs.segments.new_zeros(batch, held)
        real = torch.cat([ends, inputs.segments, ends], 1) >= 0
        order = torch.argsort((~real).int(), dim=1, stable=True)  # padding last, so that the memory follows the tokens
        places = torch.argsort(order, 1)[..., None]
        given = x.gather(1, order[..., None].expand(x.shape))
        segments = torch.where(real.gather(1, order), 0, -1)
        output = self.body(replace(inputs, tokens=None, embeds=given, segments=segments), weights=weights)
        assert output.logits is not None
        hidden, logits = (y.gather(1, places.expand(*places.shape[:2], y.shape[-1])) for y in (output.hidden, output.logits))
        some = (inputs.segments >= 0).any(1)[:, None, None]
        kept = torch.where(some, hidden[:, held + count :], memory)
        return self._tokens(Output(hidden, logits, output.aux), slice(held, held + count)), kept

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        raise ConfigError(
            f"a {self.spec.kind!r} model reads whole texts in segments and has no cache for decoding: use `read` and hand its memory on",
            field="cache",
        )

    def _tokens(self, output: Output, place: slice) -> Output:
        assert output.logits is not None
        return Output(output.hidden[:, place], output.logits[:, place], output.aux)

    def _embedded(self, inputs: Inputs) -> Tensor:
        """Rows of the body's table; absolute positions are added by the body."""
        if inputs.embeds is not None:
            return inputs.embeds
        assert inputs.tokens is not None and isinstance(self.body.embed, TokenEmbedding)
        x = F.embedding(inputs.tokens, self.body.embed.weight)
        scale = self.body.embed.spec.scale
        return x if scale is None else x * scale

    def _check(self, inputs: Inputs) -> None:
        if inputs.cache is not None or inputs.positions is not None or inputs.mask is not None or inputs.source is not None:
            raise ConfigError(
                f"a {self.spec.kind!r} model takes tokens and segments alone: no cache, positions, mask or source", field="inputs"
            )
        if inputs.segments is not None:
            last = inputs.segments.amax(1, keepdim=True)
            if bool(((inputs.segments >= 0) & (inputs.segments != last)).any()):
                raise ConfigError(f"a {self.spec.kind!r} model takes one document a row", field="segments")


def _summed(parts: list[Aux]) -> Aux:
    """Terms are sums over tokens, so those of the segments add up; attention weights stay each segment's own, and are left out."""
    total = Aux()
    for part in parts:
        for key, value in part.terms.items():
            total.terms[key] = total.terms[key] + value if key in total.terms else value
    return total
