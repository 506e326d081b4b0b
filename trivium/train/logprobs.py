"""How likely a model finds each document of a packed batch: the one forward pass under preference learning.

Logits are made in chunks, and turned into gradients in place, so that neither are ever held for all positions at once. Sums are in
fp32, or in fp64 for fp64 logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..kernels import native
from ..models.transformer import TransformerModel
from ..nn.attention import Attention
from ..nn.embeddings import TokenEmbedding
from ..nn.heads import LanguageHead
from ..nn.inputs import Inputs

CHUNK = 1 << 24  # logits made at a time


def document_logprobs(model: nn.Module, batch: Batch, *, adapters: Tensor | None = None, pairs: bool = False) -> Tensor:
    """The summed log-probability [B, D] of the targets of each document; 0 where a row has fewer. `adapters`: see `Inputs`.
    `pairs`: documents stand in pairs, and what both of a pair begin with is computed once where the model can do so."""
    forks = None
    if pairs and can_fork(model):
        batch, forks = forked(batch)
    keep = torch.zeros_like(batch.targets)
    keep[:, :-1] = batch.targets[:, 1:]  # a position's logits speak of the token after it
    inputs = Inputs(batch.tokens, segments=batch.segments, adapters=adapters, forks=forks)
    labels = batch.tokens[batch.targets]
    table = model.head.table(model.embed) if isinstance(model, TransformerModel) and isinstance(model.head, LanguageHead) else None
    if table is None:
        logits = model(inputs, keep=keep).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = -F.cross_entropy(logits, labels, reduction="none")
    else:
        logprobs = linear_logprobs(model(inputs, keep="none").hidden[keep], table, labels)
    return per_document(logprobs, batch)


def can_fork(model: nn.Module) -> bool:
    """Whether each layer lets a document begin with tokens that stand in another one: attention alone, without virtual tokens, and
    without noise, whose size goes by a document's own tokens."""
    if not isinstance(model, TransformerModel) or not model.spec.causal or model.virtual is not None:
        return False
    if not isinstance(model.embed, TokenEmbedding) or model.embed.noise is not None:
        return False
    blocks = [model.spec.blocks[name] for name in model.spec.layers]
    return all(type(block.mixer) is Attention and block.cross is None and block.mixer.pattern.places is None for block in blocks)


def forked(batch: Batch) -> tuple[Batch, Tensor]:
    """`batch`, of pairs, without the tokens that a second document has in common with the first up to where the prompt of either
    ends, and how many those are, [B, T] (see `Inputs.forks`). The last token of a prompt stays, since the first target is read
    off it. Documents keep their numbers and their targets."""
    tokens, segments, targets = (x.cpu().numpy() for x in (batch.tokens, batch.segments, batch.targets))
    rows: list[list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]] = []
    for ids, names, wanted in zip(tokens, segments, targets, strict=True):
        documents = [(ids[names == document], wanted[names == document]) for document in range(int(names.max()) + 1)]
        made = []
        for document, (own, predicted) in enumerate(documents):
            shared = max(0, _common(documents[document - 1], documents[document]) - 1) if document % 2 else 0
            made.append((own[shared:], predicted[shared:], np.full(len(own) - shared, document), shared))
        rows.append(made)
    width = max(sum(len(ids) for ids, *_ in made) for made in rows)
    found = {name: np.full((len(rows), width), empty) for name, empty in (("tokens", 0), ("segments", -1), ("targets", 0), ("forks", 0))}
    for row, made in enumerate(rows):
        at = 0
        for ids, wanted, names, shared in made:
            span = slice(at, at + len(ids))
            for name, value in (("tokens", ids), ("segments", names), ("targets", wanted), ("forks", shared)):
                found[name][row, span] = value
            at += len(ids)
    there = {name: torch.from_numpy(value).to(batch.tokens.device) for name, value in found.items()}
    return Batch(there["tokens"], there["segments"], there["targets"].bool(), batch.values), there["forks"]


def _common(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> int:
    """How many tokens two documents (ids, targets) begin with alike, before a target of either."""
    size = min(len(one[0]), len(other[0]))
    apart = (one[0][:size] != other[0][:size]) | one[1][:size] | other[1][:size]
    return int(apart.argmax()) if apart.any() else size


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
    """Where the table is frozen, a row's gradient is made with its logits, up to the row's scale, which only the backward knows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
        need_hidden, need_table = ctx.needs_input_grad[:2]
        ctx.early = early = need_hidden and not need_table
        grad_hidden = torch.empty_like(hidden) if early else None
        losses = []
        for part in _parts(hidden, table):
            logits = hidden[part] @ table.t()
            losses.append(_losses(logits, labels[part], grad=logits if early else None))
            if grad_hidden is not None:
                grad_hidden[part] = logits @ table
        ctx.save_for_backward(*((grad_hidden,) if early else (hidden, table, labels)))
        return torch.cat(losses).neg_()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.early:
            (grad_hidden,) = ctx.saved_tensors
            return (grad_hidden * -scale[:, None]).to(grad_hidden.dtype), None, None
        hidden, table, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_table = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32))
        for part in _parts(hidden, table):
            grad = hidden[part] @ table.t()
            _losses(grad, labels[part], grad=grad)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ table) * -scale[part, None]
            grad_table += grad.t() @ (hidden[part] * -scale[part, None]).to(hidden.dtype)
        return grad_hidden, grad_table.to(table.dtype), None


def _losses(logits: Tensor, labels: Tensor, *, grad: Tensor | None) -> Tensor:
    """The cross-entropy [N] of each row; `grad` [N, V], which may be `logits` itself, receives the gradient of their sum."""
    if native.takes(logits) and logits.is_contiguous():
        return native.cross_entropy(logits, labels.contiguous(), label_smoothing=0.0, grad=grad)
    logp = logits.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -logp.gather(1, labels[:, None])[:, 0]
    if grad is not None:
        grad.copy_(logp.exp_().scatter_add_(1, labels[:, None], torch.full_like(logp[:, :1], -1.0)))  # softmax - one_hot
    return losses


def _parts(hidden: Tensor, table: Tensor) -> list[slice]:
    size = max(1, CHUNK // len(table))
    return [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]
