"""How likely a model finds each document of a packed batch: the one forward pass under preference learning.

Logits are made in chunks, and made again in the backward pass, so that neither they nor their gradients are ever held for all
positions at once. Sums are in fp32, or in fp64 for fp64 logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.transformer import TransformerModel
from ..nn.heads import LanguageHead
from ..nn.inputs import Inputs

if TYPE_CHECKING:
    from ..data.batch import Batch

CHUNK = 1 << 24  # logits made at a time


def document_logprobs(model: nn.Module, batch: Batch, *, adapters: Tensor | None = None) -> Tensor:
    """The summed log-probability [B, D] of the targets of each document; 0 where a row has fewer. `adapters`: see `Inputs`."""
    keep = torch.zeros_like(batch.targets)
    keep[:, :-1] = batch.targets[:, 1:]  # a position's logits speak of the token after it
    inputs, labels = Inputs(batch.tokens, segments=batch.segments, adapters=adapters), batch.tokens[batch.targets]
    table = model.head.table(model.embed) if isinstance(model, TransformerModel) and isinstance(model.head, LanguageHead) else None
    if table is None:
        logits = model(inputs, keep=keep).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = -F.cross_entropy(logits, labels, reduction="none")
    else:
        logprobs = linear_logprobs(model(inputs, keep="none").hidden[keep], table, labels)
    return per_document(logprobs, batch)


def per_document(values: Tensor, batch: Batch) -> Tensor:
    """What stands at each target, [N] in order, summed over documents: [B, D]."""
    documents = int(batch.segments.max()) + 1
    row, _ = batch.targets.nonzero(as_tuple=True)
    place = row * documents + batch.segments[batch.targets]
    return values.new_zeros(len(batch.tokens) * documents).index_add(0, place, values).view(len(batch.tokens), documents)


def lengths(batch: Batch) -> Tensor:
    """How many targets each document has, [B, D] fp32."""
    return per_document(torch.ones(int(batch.targets.sum()), device=batch.tokens.device), batch)


def pairs_of(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of numbers by document [B, D], those of the first and of the second documents of all pairs, [P] each."""
    found = batch.segments.amax(1).add(1).div(2, rounding_mode="floor")  # pairs by row
    there = torch.arange(int(found.max()), device=values.device) < found[:, None]
    sides = values[:, : 2 * there.shape[1]].unflatten(1, (-1, 2))[there]
    return sides[:, 0], sides[:, 1]


def linear_logprobs(hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    """The log-probability [N] of `labels` [N] under the logits `hidden` [N, C] times `table` [V, C] transposed."""
    found: Tensor = _LinearLogprobs.apply(hidden, table, labels)
    return found


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, table, labels)
        found = []
        for part in _parts(hidden, table):
            logits = _upcast(hidden[part] @ table.t())
            found.append(logits.gather(1, labels[part, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, table, labels = ctx.saved_tensors
        need_hidden, need_table = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_table = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32)) if need_table else None
        for part in _parts(hidden, table):
            # d logprob / d logits = one_hot - softmax
            grad = _upcast(hidden[part] @ table.t()).softmax(1).neg_()
            grad.scatter_add_(1, labels[part, None], torch.ones_like(grad[:, :1]))
            grad = (grad * scale[part, None]).to(table.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ table
            if grad_table is not None:
                grad_table += grad.t() @ hidden[part]
        return grad_hidden, None if grad_table is None else grad_table.to(table.dtype), None


def _parts(hidden: Tensor, table: Tensor) -> list[slice]:
    size = max(1, CHUNK // len(table))
    return [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
