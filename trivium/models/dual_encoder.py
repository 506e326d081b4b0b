"""Two encoders that put texts and images into one space, where those that belong together lie close (CLIP, arXiv:2103.00020).

Each is a `Transformer` whose head gives one vector of length one for each document or image; the similarity of two is their
product times a learned scale. The objective that trains them is not their business.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..nn.heads_task import Project
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.linear import OwnStart
from ..nn.patches import Patches
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer


class DualEncoder(Model):
    """What the model is. Both heads are of kind `project`, of one size, and normalize."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    text: Transformer = Field(description="what reads texts")
    vision: Transformer = Field(description="what reads images: its embed is of kind patches")
    scale: float = Field(2.6592, description="the logarithm of what similarities are multiplied by, where training starts")
    end: int | None = Field(
        None, ge=0, description="the token that ends a text, where batches do not say it; none given: the highest one of each row"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads = self.text.head, self.vision.head
        sizes = [(head.size or stack.dim) for head, stack in zip(heads, (self.text, self.vision), strict=True) if isinstance(head, Project)]
        if len(sizes) < 2 or sizes[0] != sizes[1] or not all(isinstance(head, Project) and head.normalize for head in heads):
            raise ValueError("the heads of text and vision are of kind project, of one size, with normalize: true")
        if not isinstance(self.vision.embed, Patches) or self.vision.causal or isinstance(self.text.embed, Patches):
            raise ValueError("vision has an embed of kind patches and causal: false, text has an embed of tokens")
        return self

    @property
    def vocab(self) -> int:
        return self.text.vocab

    @property
    def context(self) -> int | None:
        return self.text.context

    def build(self) -> DualEncoderModel:
        return DualEncoderModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(text=self.text.with_plain_names(), vision=self.vision.with_plain_names())


class Scale(OwnStart):
    """The learned logarithm of what similarities are multiplied by."""

    def __init__(self, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(()))

    def reset(self) -> None:
        nn.init.constant_(self.weight, self.start)


class DualEncoderModel(BuiltModel[DualEncoder]):
    """The built model: `model(Inputs(tokens, images=images)).logits` [N images, M documents], or either side alone."""

    def __init__(self, spec: DualEncoder):
        super().__init__(spec)
        self.text, self.vision = spec.text.build(), spec.vision.build()
        self.scale = Scale(spec.scale)

    def encode_text(self, inputs: Inputs | Tensor) -> Tensor:
        """[M, size], of length one: a row for each document, in the order of the batch."""
        logits = self._read(as_inputs(inputs)).logits
        assert logits is not None
        return logits

    def encode_images(self, images: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, size], of length one."""
        return self.vision(Inputs(images=images)).logits

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Of vectors [N, size] and [M, size]: [N, M]. Its transpose compares texts with images."""
        return self.scale.weight.exp() * images @ texts.T

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """`hidden` is the text's. `logits` hold each image's similarity to each document, whatever `keep` but none asks for."""
        inputs = as_inputs(inputs)
        if inputs.images is None or inputs.shape[1] == 0:
            raise ConfigError(
                "a dual encoder compares: give Inputs(tokens, images=...), or use encode_text or encode_images", field="images"
            )
        read = self._read(replace(inputs, images=None), weights=weights)
        if isinstance(keep, str) and keep == "none":
            return Output(read.hidden, None, read.aux)
        assert read.logits is not None
        return Output(read.hidden, self.similarity(self.encode_images(inputs.images), read.logits), read.aux)

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        raise ConfigError("a dual encoder writes no text: it has no cache", field="cache")

    def _read(self, inputs: Inputs, *, weights: bool = False) -> Output:
        """The text encoder's output. Where the batch says nothing of documents, each row is one, up to its end token."""
        if inputs.segments is None and inputs.tokens is not None:
            inputs = replace(inputs, segments=ended(inputs.tokens, self.spec.end))
        return self.text(inputs, weights=weights)


def ended(tokens: Tensor, end: int | None) -> Tensor:
    """Segments [B, T] of rows that hold one text each: 0 up to the first `end` (None: the row's highest token), then -1. A row
    without an end is all text."""
    found = tokens == (tokens.amax(1, keepdim=True) if end is None else end)
    return -(found.int().cumsum(1) - found.int()).clamp(max=1).long()
