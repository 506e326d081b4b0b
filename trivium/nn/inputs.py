"""What one forward takes and gives. Plain records: a model is a function from `Inputs` to `Output`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .store import Store

Keep = Literal["all", "last", "none"] | Tensor


@dataclass(frozen=True)
class Prefix:
    """A mask: in each row, the tokens at the first `lengths` [B] positions of each document see one another, whatever comes
    first; the rest is as the model's causality has it (prefix language models, arXiv:1910.10683)."""

    lengths: Tensor


@dataclass(frozen=True)
class Inputs:
    """One batch for one forward.

    `tokens` [B, T] int64, or `embeds` [B, T, C] in their place. `positions` [B, T], or None: counting on from what the
    cache holds, from 0 at each document. `segments` [B, T]: the document that each token belongs to, -1 for padding;
    None: one document a row and no padding, decided without reading tensors. A document is one contiguous run of its row.
    `mask`: None takes the model's causality; "full": all tokens of a document see one another; or a `Prefix`.
    `memory` [B, M, C']: what cross-attention reads, such as an encoder's output, and `memory_segments` [B, M]: -1 where
    that is padding; with a cache they are given once. `source`: what an encoder-decoder's encoder reads, whose output then is
    the memory. `types` [B, T]: which sentence of a pair a token belongs to (BERT); None: all the first. `images` [N, channels,
    H, W]: all that a vision encoder reads, or what stands beside the tokens, row after row in the order of their places; with a
    cache they are given once. `adapters` [B]: which of the loaded adapters a row uses, -1 for the base alone; None: the one
    adapter there is. `forks` [B, T]: how many of the first tokens of the row's document numbered one less are also the beginning
    of this token's document, where they are not repeated and from where its positions count on; 0: none.
    """

    tokens: Tensor | None = None
    embeds: Tensor | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None
    mask: Prefix | Literal["full"] | None = None
    memory: Tensor | None = None
    memory_segments: Tensor | None = None
    source: Inputs | None = None
    types: Tensor | None = None
    images: Tensor | None = None
    cache: Store | None = None
    adapters: Tensor | None = None
    forks: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.embeds is None) and (self.tokens is not None or self.images is None):
            raise ValueError("give tokens [B, T] or embeds [B, T, C], one of the two")
        if self.images is not None and self.images.dim() != 4:
            raise ValueError(f"images must be [N, channels, H, W], got {list(self.images.shape)}")
        if self.tokens is not None and (self.tokens.dim() != 2 or self.tokens.dtype != torch.int64):
            raise ValueError(f"tokens must be [B, T] int64, got {list(self.tokens.shape)} {self.tokens.dtype}")
        if self.embeds is not None and self.embeds.dim() != 3:
            raise ValueError(f"embeds must be [B, T, C], got {list(self.embeds.shape)}")
        for name in ("positions", "segments", "types", "forks"):
            value = getattr(self, name)
            if value is not None and value.shape != self.shape:
                raise ValueError(f"{name} must be {list(self.shape)} like the tokens, got {list(value.shape)}")
        for name, value in (("adapters", self.adapters), ("mask", self.mask.lengths if isinstance(self.mask, Prefix) else None)):
            if value is not None and value.shape != self.shape[:1]:
                raise ValueError(f"{name} must be [{self.shape[0]}], one a row, got {list(value.shape)}")
        if self.forks is not None and (
            self.segments is None or self.positions is not None or self.mask is not None or self.cache is not None
        ):
            raise ValueError("forks go with segments, and not with positions, a mask or a cache")
        if self.memory is not None and (self.memory.dim() != 3 or len(self.memory) != self.shape[0]):
            raise ValueError(f"memory must be [{self.shape[0]}, M, C], got {list(self.memory.shape)}")
        if self.memory_segments is not None and (self.memory is None or self.memory_segments.shape != self.memory.shape[:2]):
            raise ValueError("memory_segments must be [B, M] like the memory")
        if self.source is not None and (self.memory is not None or self.source.shape[0] != self.shape[0]):
            raise ValueError(f"give a source of {self.shape[0]} rows or a memory, one of the two")

    @property
    def shape(self) -> torch.Size:
        """[B, T]. Of images alone, T is 0: how many patches they make is the model's to say."""
        if self.tokens is not None:
            return self.tokens.shape
        if self.embeds is not None:
            return self.embeds.shape[:2]
        assert self.images is not None
        return torch.Size((len(self.images), 0))

    @property
    def device(self) -> torch.device:
        given = next((given for given in (self.tokens, self.embeds, self.images) if given is not None), None)
        assert given is not None
        return given.device


@dataclass
class Aux:
    """What a forward gives beside its result. `weights` and `cross`: by layer, attention weights [B, H, T, S] and those over
    the memory [B, H, T, M], where they were asked for. `terms`: by name and layer, sums over tokens that an objective may
    train on, such as a router's balance. `loads`: by layer, how many tokens chose each expert [E].
    `source`: the same of an encoder-decoder's encoder."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[int, Tensor] = field(default_factory=dict)
    terms: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    source: Aux | None = None

    def total(self, name: str) -> Tensor | None:
        """The sum of a term over the layers, those of the source too; None where no layer has it."""
        found = [value for (term, _), value in self.terms.items() if term == name]
        if self.source is not None and (theirs := self.source.total(name)) is not None:
            found.append(theirs)
        return torch.stack(found).sum() if found else None


@dataclass
class Output:
    """`hidden` [B, T, C] after the final norm. `logits` in the model's dtype, by `keep`: all [B, T, V]; last [B, V];
    a selector with N true places [N, V]; none: None. In place of V stands what the head gives; one that reads documents gives a
    row for each of the N documents, by any `keep` but none. What stands at padding is finite and means nothing."""

    hidden: Tensor
    logits: Tensor | None
    aux: Aux = field(default_factory=Aux)


def as_inputs(inputs: Inputs | Tensor) -> Inputs:
    """A plain tensor of tokens [B, T] is accepted wherever `Inputs` are."""
    return inputs if isinstance(inputs, Inputs) else Inputs(inputs)
