"""A language model that reads images: a vision encoder, a connector, and a `Transformer` that takes what it gives.

An image's vectors stand in the place of tokens among the text's (LLaVA, arXiv:2304.08485); or they are the memory that gated
crosses of the text's blocks read, with a token where each image begins (Flamingo, arXiv:2204.14198). Images of one size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from ..core.errors import DataError
from ..nn.cross import CrossAttention
from ..nn.embeddings import TokenEmbedding, Tokens
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.patches import Patches
from ..nn.resampler import Connector
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer


class VisionLanguage(Model):
    """What the model is. Where `join` is `memory` and no token marks images, each row has as many of them, and reads all."""

    kind: Literal["vision_language"] = "vision_language"
    vision: Transformer = Field(description="what reads images: its embed is of kind patches")
    connector: SerializeAsAny[Connector] = Field(description="what makes of its patches what the text reads")
    text: Transformer = Field(description="what reads and writes text; causal")
    join: Literal["tokens", "memory"] = Field("tokens", description="an image is a stretch of tokens, or a part of what crosses read")
    image_token: int | None = Field(None, ge=0, description="the token in whose places its vectors stand; or that marks where each begins")
    depth: int | None = Field(
        None, ge=0, description="how many vision layers an image passes, and no norm; none given: all, and the final norm"
    )
    start: bool = Field(False, description="whether the vector that stands before the patches is passed on too")

    @model_validator(mode="after")
    def _check(self) -> Self:
        vision, text = self.vision, self.text
        if not isinstance(vision.embed, Patches) or vision.causal:
            raise ValueError("vision has an embed of kind patches, and causal: false")
        if self.start and not vision.embed.start:
            raise ValueError("start: nothing stands before the patches of this vision encoder")
        if self.depth is not None and self.depth > len(vision.layers):
            raise ValueError(f"depth ({self.depth}) is more than the {len(vision.layers)} layers of vision")
        if not text.causal or not isinstance(text.embed, Tokens):
            raise ValueError("text has an embed of kind tokens, and causal: true")
        crosses = [block.cross for block in text.blocks.values() if isinstance(block.cross, CrossAttention)]
        if self.join == "tokens" and (self.image_token is None or self.image_token >= text.vocab or crosses):
            raise ValueError("join: tokens needs an image_token of the text's vocabulary, and blocks without a cross")
        if self.join == "memory":
            widths = {cross.memory_dim or text.dim for cross in crosses}
            if len(widths) != 1:
                raise ValueError("join: memory needs blocks of text with a cross, all of one memory_dim")
            if odd := [cross.latest for cross in crosses if cross.latest not in (None, self.image_token)]:
                raise ValueError(f"crosses read the part of the latest token {odd[0]}, but image_token is {self.image_token}")
        return self

    @property
    def vocab(self) -> int:
        return self.text.vocab

    @property
    def context(self) -> int | None:
        return self.text.context

    @property
    def width(self) -> int:
        """Of the vectors that the text reads."""
        crosses = [block.cross for block in self.text.blocks.values() if isinstance(block.cross, CrossAttention)]
        return self.text.dim if self.join == "tokens" else crosses[0].memory_dim or self.text.dim

    @property
    def vectors(self) -> int:
        """How many vectors an image becomes."""
        assert isinstance(self.vision.embed, Patches)
        return self.connector.count(self.vision.embed.count + self.start)

    @property
    def places(self) -> int:
        """How many image tokens stand for an image."""
        return self.vectors if self.join == "tokens" else 1

    def build(self) -> VisionLanguageModel:
        return VisionLanguageModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(vision=self.vision.with_plain_names(), text=self.text.with_plain_names())


class VisionLanguageModel(BuiltModel[VisionLanguage]):
    """The built model: `model(Inputs(tokens, images=images)) -> Output`, of the text."""

    def __init__(self, spec: VisionLanguage):
        super().__init__(spec)
        self.vision, self.text = spec.vision.build(), spec.text.build()
        self.connector = spec.connector.build(spec.vision.dim, spec.width)

    def encode(self, images: Tensor, *, adapters: Tensor | None = None) -> Tensor:
        """[N, channels, H, W] -> [N, vectors, width]."""
        step = self.vision.begin(Inputs(images=images, adapters=adapters))
        x = self.vision.run(self.vision.embed(None, step), step, depth=self.spec.depth)
        if self.spec.depth is None:
            x = self.vision.final_norm(x)
        assert isinstance(self.spec.vision.embed, Patches)
        if self.spec.vision.embed.start and not self.spec.start:
            x = x[:, 1:]
        return self.connector(x, step)

    def see(self, inputs: Inputs) -> Inputs:
        """What the text is given: `inputs` with its images, if any, as embeds or as the memory. `DataError` where they do not fit."""
        if inputs.images is None:
            started = inputs.memory is not None or (inputs.cache is not None and inputs.cache.used)
            return inputs if self.spec.join == "tokens" or started else self._blind(inputs)
        if self.spec.join == "memory" and inputs.cache is not None and inputs.cache.used:
            raise DataError(
                "crosses keep the images that they were given in the first forward of a cache: give all of them there", field="images"
            )
        counts = self._counts(inputs, inputs.images)
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)  # [N]: the row of each image
        vectors = self.encode(inputs.images, adapters=None if inputs.adapters is None else inputs.adapters[rows])
        if self.spec.join == "tokens":
            assert inputs.tokens is not None and self.spec.image_token is not None and isinstance(self.text.embed, TokenEmbedding)
            at = torch.eq(inputs.tokens, self.spec.image_token)
            embeds = self.text.embed.rows(inputs.tokens)
            return replace(inputs, tokens=None, images=None, embeds=embeds.masked_scatter(at[..., None], vectors.to(embeds.dtype)))
        numbers = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        memory = vectors.new_zeros(len(counts), int(counts.max()), *vectors.shape[1:])
        segments = torch.full(memory.shape[:2], -1, device=rows.device)
        segments[rows, numbers] = numbers
        memory = memory.index_put((rows, numbers), vectors).flatten(1, 2)
        return replace(inputs, images=None, memory=memory, memory_segments=segments.repeat_interleave(vectors.shape[1], 1))

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """As of a `Transformer`. With a cache, images are given with the tokens that stand for them, once."""
        return self.text(self.see(as_inputs(inputs)), keep=keep, weights=weights)

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        """An empty store for the text's state, and what its crosses keep of the images."""
        return self.text.cache(rows, capacity, rollback=rollback)

    def _counts(self, inputs: Inputs, images: Tensor) -> Tensor:
        """[B]: how many images each row has."""
        batch, token = inputs.shape[0], self.spec.image_token
        if token is None:
            if len(images) % batch:
                raise DataError(f"{len(images)} images cannot be shared out among {batch} rows: each row has as many", field="images")
            return torch.full((batch,), len(images) // batch, device=inputs.device)
        if inputs.tokens is None:
            raise DataError(f"images stand where token {token} does: give tokens, not embeds", field="images")
        each, places = self.spec.places, torch.eq(inputs.tokens, token).sum(1)
        if bool((places % each).any()) or int(places.sum()) != each * len(images):
            raise DataError(
                f"{len(images)} images were given, of {each} image tokens (token {token}) each, but the rows have {places.tolist()} of them",
                field="images",
            )
        return places // each

    def _blind(self, inputs: Inputs) -> Inputs:
        """A memory in which there is nothing to read."""
        memory = torch.zeros(inputs.shape[0], 1, self.spec.width, dtype=self.dtype, device=inputs.device)
        return replace(inputs, memory=memory, memory_segments=torch.full(memory.shape[:2], -1, device=inputs.device))
