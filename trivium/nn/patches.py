"""Images as a sequence: square patches, each mapped like a token, behind a learned vector that stands for the whole.

A convolution whose stride is its width is one linear map of unfolded patches (ViT, arXiv:2010.11929). Positions that a table
learned are those of its own grid: images of another size, for which others interpolate it, are refused.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.errors import DataError
from .embeddings import Embed
from .linear import Linear
from .norms import Norm
from .positions_absolute import Absolute
from .step import Step


class Patches(Embed):
    """A linear map of each patch, plus what `positions` says of its place; then the norm. Patches run along the rows of the
    image. There is no table, so the model's `vocab` says nothing; by custom it is 1."""

    kind: Literal["patches"] = "patches"
    image: int = Field(gt=0, description="height and width of an image, in pixels")
    patch: int = Field(gt=0, description="height and width of a patch, in pixels")
    channels: int = Field(3, gt=0, description="colors of a pixel")
    bias: bool = Field(True, description="whether the map has a bias")
    start: bool = Field(True, description="a learned vector stands before the patches, in whose place the image is summed up")
    positions: SerializeAsAny[Absolute] | None = Field(None, description="the absolute positions that are added, if any")
    norm: SerializeAsAny[Norm] | None = Field(None, description="the norm of the sum, if any (CLIP)")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of the sum to be dropped, in training")

    @classmethod
    def tiny(cls) -> Patches:
        return cls(image=8, patch=4)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image % self.patch:
            raise ValueError(f"image ({self.image}) must be a multiple of patch ({self.patch})")
        return self

    @property
    def count(self) -> int:
        """How many patches an image has."""
        return (self.image // self.patch) ** 2

    def build(self, vocab: int, dim: int) -> PatchEmbedding:
        return PatchEmbedding(self, dim)


class PatchEmbedding(nn.Module):
    def __init__(self, spec: Patches, dim: int):
        super().__init__()
        self.spec = spec
        self.project = Linear(spec.channels * spec.patch**2, dim, bias=spec.bias)
        self.start = StartVector(dim) if spec.start else None
        self.positions = spec.positions.build(dim) if spec.positions is not None else None
        self.norm = spec.norm.build(dim) if spec.norm is not None else None

    def cut(self, images: Tensor) -> Tensor:
        """images [N, channels, H, W] -> [N, T, channels * patch * patch], in the model's dtype; where there is a start, its place
        comes first and holds zeros. `DataError` for images of another shape."""
        spec = self.spec
        if images.dim() != 4 or images.shape[1:] != (spec.channels, spec.image, spec.image):
            wanted = f"[N, {spec.channels}, {spec.image}, {spec.image}]"
            raise DataError(f"images must be {wanted}, as this model was made for; got {list(images.shape)}: resize them", field="images")
        return F.pad(unfold(images, spec.patch), (0, 0, int(spec.start), 0)).to(self.project.weight.dtype)

    def forward(self, tokens: Tensor | None, step: Step) -> Tensor:
        """What `cut` gave, as the step's embeds, -> [N, T, C]."""
        patches = step.inputs.embeds
        if tokens is not None or patches is None:
            raise DataError("this model reads images: give Inputs(images=...) [N, channels, H, W], not tokens", field="images")
        x = self.project(patches, step)
        if self.start is not None:
            x = torch.cat([self.start.weight.expand(len(x), -1, -1), x[:, 1:]], 1)
        if self.positions is not None:
            x = x + self.positions(step, x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.spec.dropout, self.training) if self.spec.dropout else x


class StartVector(nn.Module):
    """One vector, [1, C]."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))


def unfold(images: Tensor, patch: int) -> Tensor:
    """[N, channels, H, W] -> [N, patches, channels * patch * patch], patches along the rows, each as a convolution's weight has it."""
    rows = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [N, channels, H/p, p, W/p, p]
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def fold(patches: Tensor, *, patch: int, width: int) -> Tensor:
    """Undoes `unfold`, for images of `width` pixels."""
    grid = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (-1, width // patch))  # [N, H/p, W/p, channels, p, p]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
