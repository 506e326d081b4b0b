"""An encoder and a decoder that reads what it gives: each a `Transformer`, joined by cross-attention (arXiv:1706.03762).

The source is read once: its encoding is the memory of the decoder's blocks, which keep keys and values of it in the cache.
T5 (arXiv:1910.10683) and BART (arXiv:1910.13461) are two such specs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from ..nn.cross import CrossAttention
from ..nn.embeddings import Tokens
from ..nn.heads import NoHead
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer


class EncoderDecoder(Model):
    """What the model is. `shared` says that both stacks look tokens up in one table; a tied head of the decoder uses it too."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    encoder: Transformer = Field(description="what reads the source; not causal, without a head")
    decoder: Transformer = Field(description="what writes; its blocks have a cross")
    shared: bool = Field(True, description="one table of token embeddings for both")

    @model_validator(mode="after")
    def _check(self) -> Self:
        encoder, decoder = self.encoder, self.decoder
        if encoder.causal or not isinstance(encoder.head, NoHead):
            raise ValueError("the encoder has causal: false and head: none")
        crosses = [block.cross for block in decoder.blocks.values() if block.cross is not None]
        if not decoder.causal or not crosses:
            raise ValueError("the decoder has causal: true, and at least one of its blocks has a cross")
        for cross in crosses:
            if isinstance(cross, CrossAttention) and (cross.memory_dim or decoder.dim) != encoder.dim:
                raise ValueError(
                    f"a cross of the decoder has memory_dim {cross.memory_dim or decoder.dim}, the encoder's dim is {encoder.dim}"
                )
        tables = [isinstance(stack.embed, Tokens) and (stack.vocab, stack.dim) for stack in (encoder, decoder)]
        if self.shared and (not tables[0] or tables[0] != tables[1]):
            raise ValueError("a shared table needs embeddings of kind tokens, and one vocab and dim for both")
        return self

    @property
    def vocab(self) -> int:
        return self.decoder.vocab

    @property
    def context(self) -> int | None:
        return self.decoder.context

    def build(self) -> EncoderDecoderModel:
        return EncoderDecoderModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(encoder=self.encoder.with_plain_names(), decoder=self.decoder.with_plain_names())


class EncoderDecoderModel(BuiltModel[EncoderDecoder]):
    """The built model: `model(Inputs(tokens, source=Inputs(source_tokens))) -> Output`, of the decoder."""

    def __init__(self, spec: EncoderDecoder):
        super().__init__(spec)
        self.encoder, self.decoder = spec.encoder.build(), spec.decoder.build()
        if spec.shared:
            self.decoder.embed.weight = self.encoder.embed.weight

    def encode(self, source: Inputs | Tensor) -> Tensor:
        """The memory [B, M, C] that a source [B, M] makes."""
        return self.encoder(source, keep="none").hidden

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """As of a `Transformer`. The source, or in its place a memory, is given in the first forward of a cache."""
        inputs = as_inputs(inputs)
        if inputs.source is None:
            return self.decoder(inputs, keep=keep, weights=weights)
        source = inputs.source if inputs.source.adapters is not None else replace(inputs.source, adapters=inputs.adapters)
        read = self.encoder(source, keep="none", weights=weights)
        inputs = replace(inputs, source=None, memory=read.hidden, memory_segments=source.segments)
        output = self.decoder(inputs, keep=keep, weights=weights)
        output.aux.source = read.aux
        return output

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        """An empty store for the decoder's state, and what its crosses keep of the memory."""
        return self.decoder.cache(rows, capacity, rollback=rollback)
