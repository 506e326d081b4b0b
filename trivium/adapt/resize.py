"""More rows for a model's vocabulary: the embedding and, where it is not tied to it, the head.

New rows begin as the mean of old ones, so that a new token starts as an average token and no old logit moves: rows at random
would take probability from every token that was trained. Not a pass: the spec's `vocab` says it all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..core.errors import ConfigError
from ..models.transformer import TransformerModel
from ..nn.embeddings import TokenEmbedding
from ..nn.heads import LanguageHead
from ..nn.linear import Linear


@torch.no_grad()
def resize(model: TransformerModel, sources: Sequence[Sequence[int]], *, used: int, multiple: int = 1) -> TransformerModel:
    """Give the ids from `used` on the mean of the rows `sources[i]`, in place; the tables grow where they end before that.

    Rows beyond the last new id are kept; `multiple` rounds a table that grows up. Raises `ConfigError` where the embedding
    or the head is not a plain table (adapted ones are merged first).
    """
    if not isinstance(model.embed, TokenEmbedding) or not isinstance(model.head, LanguageHead):
        raise ConfigError("adding tokens needs an embedding of tokens and a language head")
    tables: list[TokenEmbedding | Linear] = [model.embed]
    if not model.spec.head.tied:  # type: ignore[attr-defined]
        if type(model.head.out) is not Linear:
            raise ConfigError("the head is adapted or quantized: add tokens to the plain model first")
        tables.append(model.head.out)
    rows = model.spec.vocab
    needed = used + len(sources)
    if needed > rows:
        rows = -(-needed // multiple) * multiple
    for table in tables:
        old = table.weight
        means = torch.stack([old[list(ids)].float().mean(0) for ids in sources]).to(old.dtype)
        new = torch.cat([old, old[:used].float().mean(0).to(old.dtype).expand(rows - len(old), -1)])
        new[used:needed] = means
        table.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    model.spec = model.spec.replace(vocab=rows)
    return model
