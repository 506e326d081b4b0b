"""Images as tokens of a vocabulary: an encoder, a table of codes, a decoder, so that one language model reads and writes both
(early fusion, arXiv:2312.11805; the codes of arXiv:1711.00937).

Both stacks are plain `Transformer`s; the decoder's embedding is the table. The numbers of codes stand behind the text's tokens, from
`offset` on. Adversarial and perceptual losses, which sharpen what is decoded, are left out.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..core.seed import generator
from ..nn.embeddings import TokenEmbedding, Tokens
from ..nn.heads import NoHead
from ..nn.heads_task import Tagger
from ..nn.inputs import Inputs, Keep, Output, as_inputs
from ..nn.patches import Patches, fold
from ..nn.quantized_images import nearest, quantize
from ..nn.store import Store
from .model import BuiltModel, Model
from .transformer import Transformer


class ImageTokens(Model):
    """What the model is. The decoder's `vocab` is the number of codes, and the labels of its head are the pixels of a patch."""

    kind: Literal["image_tokens"] = "image_tokens"
    encoder: Transformer = Field(description="what reads images: its embed is of kind patches without a start, its head none")
    decoder: Transformer = Field(description="what reads codes and gives pixels: its embed is of kind tokens, its head of kind tagger")
    offset: int = Field(0, ge=0, description="the token that the first code is, in the vocabulary of a language model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        encoder, decoder = self.encoder, self.decoder
        if not isinstance(encoder.embed, Patches) or encoder.embed.start or not isinstance(encoder.head, NoHead) or encoder.causal:
            raise ValueError("the encoder has an embed of kind patches with start: false, head: none and causal: false")
        pixels = encoder.embed.channels * encoder.embed.patch**2
        if not isinstance(decoder.head, Tagger) or decoder.head.labels != pixels or decoder.causal:
            raise ValueError(f"the decoder has a head of kind tagger with labels: {pixels}, the values of a patch, and causal: false")
        if not isinstance(decoder.embed, Tokens) or decoder.embed.scale is not None or decoder.dim != encoder.dim:
            raise ValueError("the decoder has an embed of kind tokens without a scale, and the encoder's dim: its table holds the codes")
        return self

    @property
    def vocab(self) -> int:
        """Of a language model's tokens, as many as there must be at least."""
        return self.offset + self.decoder.vocab

    @property
    def context(self) -> int:
        """How many tokens an image is."""
        assert isinstance(self.encoder.embed, Patches)
        return self.encoder.embed.count

    def build(self) -> ImageTokensModel:
        return ImageTokensModel(self)

    def with_plain_names(self) -> Self:
        return self.replace(encoder=self.encoder.with_plain_names(), decoder=self.decoder.with_plain_names())


class ImageTokensModel(BuiltModel[ImageTokens]):
    """The built model: `encode` and `decode`; as a forward, both, with what trains them."""

    def __init__(self, spec: ImageTokens):
        super().__init__(spec)
        self.encoder, self.decoder = spec.encoder.build(), spec.decoder.build()

    @property
    def codes(self) -> Tensor:
        """[K, C]."""
        assert isinstance(self.decoder.embed, TokenEmbedding)
        return self.decoder.embed.weight

    def encode(self, images: Tensor) -> Tensor:
        """[N, channels, H, W] -> tokens [N, T] of the language model's vocabulary, patches along the rows."""
        return nearest(self._hidden(images), self.codes) + self.spec.offset

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T] -> images [N, channels, H, W]. `DataError` for tokens that are no codes, or too few or many for an image."""
        numbers = tokens - self.spec.offset
        if tokens.shape[1] != self.spec.context:
            raise DataError(f"an image is {self.spec.context} tokens, not {tokens.shape[1]}", field="tokens")
        if bool(((numbers < 0) | (numbers >= len(self.codes))).any()):
            last = self.spec.vocab - 1
            raise DataError(f"tokens {self.spec.offset} to {last} are of images, and others were given", field="tokens")
        return self.pictures(self.decoder(numbers).logits)

    def pictures(self, patches: Tensor) -> Tensor:
        """What a forward gives as logits [N, T, values], as images."""
        embed = self.spec.encoder.embed
        assert isinstance(embed, Patches)
        return fold(patches, patch=embed.patch, width=embed.image)

    def forward(self, inputs: Inputs | Tensor, *, keep: Keep = "all", weights: bool = False) -> Output:
        """`Inputs(images=...)` -> the values of all patches [N, T, values] as logits, and the codes' vectors as hidden. In `aux`,
        sums over the codes: `pull`, which trains the table, and `commitment`, which holds the encoder to it."""
        images = as_inputs(inputs).images
        if images is None or not isinstance(keep, str) or keep == "last":
            raise ConfigError("this model reads whole images: give Inputs(images=...), and keep all or none", field="images")
        found = quantize(self._hidden(images), self.codes)
        output = self.decoder(Inputs(embeds=found.values), keep=keep, weights=weights)
        output.aux.terms |= {("pull", 0): found.pull, ("commitment", 0): found.commitment}
        return Output(found.values, output.logits, output.aux)

    def cache(self, rows: int, capacity: int, *, rollback: int = 0) -> Store:
        raise ConfigError("a model of image tokens reads whole images: it has no cache", field="cache")

    @torch.no_grad()
    def draw_codes(self, images: Tensor, *, seed: int) -> None:
        """Start the table at what the encoder makes of patches of these images, so that codes lie where they are needed."""
        found = self._hidden(images).flatten(0, 1)
        chosen = torch.randint(len(found), (len(self.codes),), generator=generator(seed, "codes")).to(found.device)
        self.codes.copy_(found[chosen])

    def _hidden(self, images: Tensor) -> Tensor:
        return self.encoder(Inputs(images=images), keep="none").hidden
