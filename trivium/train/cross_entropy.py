"""Cross-entropy of selected positions, loss and gradient in one pass over chunks of rows, in fp32.

Written as a plain expression, autograd keeps an fp32 copy of the logits, one of the log-probabilities and one of the gradient.
Here only the gradient is kept, in the logits' own dtype; and `linear_cross_entropy_sum`, which makes the logits itself, keeps
not even that: a chunk of logits becomes its gradient in place and is used up at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import native

CHUNK = 1 << 20  # logits upcast at a time: 4 MB, which stays in the cache
LOGITS = 1 << 24  # logits made at a time: 32 MB in bf16, rows enough for a good product
LOGITS_TRAINED = 1 << 26  # where each chunk also adds to the gradient of the whole table


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The sum [] over rows of `F.cross_entropy` of `logits` [N, V] and `labels` [N], in fp32 (fp64 for fp64 logits)."""
    loss: Tensor = _CrossEntropySum.apply(logits, labels, label_smoothing)
    return loss


def linear_cross_entropy_sum(hidden: Tensor, table: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy_sum(hidden @ table.T, labels)` for hidden [N, C] and table [V, C], without the logits of all rows at once."""
    loss: Tensor = _LinearCrossEntropySum.apply(hidden, table, labels, label_smoothing)
    return loss


def _loss(logits: Tensor, labels: Tensor, smoothing: float, grad: Tensor | None) -> Tensor:
    """The summed loss; `grad` [N, V], which may be `logits` itself, receives its gradient."""
    if native.takes(logits) and logits.is_contiguous():
        return native.cross_entropy(logits, labels.contiguous(), label_smoothing=smoothing, grad=grad).sum()
    rows, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    size = max(1, CHUNK // vocab)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        label = labels[part, None]
        logp = torch.log_softmax(logits[part], dim=-1, dtype=dtype)
        loss -= (1 - smoothing) * logp.gather(1, label).sum()
        if smoothing:
            loss -= smoothing / vocab * logp.sum()
        if grad is not None:
            # d loss / d logits = softmax - (1 - smoothing) * one_hot - smoothing / V
            logp.exp_().scatter_add_(1, label, torch.full_like(label, smoothing - 1, dtype=dtype))
            grad[part] = logp.sub_(smoothing / vocab) if smoothing else logp
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = _loss(logits, labels, smoothing, grad)
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(scale), None, None  # in place: a second backward through it is an error, not a wrong gradient


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        need_hidden, need_table = ctx.needs_input_grad[:2]
        size = max(1, (LOGITS_TRAINED if need_table else LOGITS) // len(table))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_table, losses = None, []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = hidden[part] @ table.t()
            losses.append(_loss(logits, labels[part], smoothing, logits if need_hidden or need_table else None))
            if grad_hidden is not None:
                grad_hidden[part] = logits @ table
            if need_table:
                share = logits.t() @ hidden[part]
                if len(hidden) > size:  # several: summed in fp32 at least
                    share = share.to(torch.promote_types(share.dtype, torch.float32))
                grad_table = share if grad_table is None else grad_table.add_(share)
            del logits  # before the next chunk's are made
        if need_table and grad_table is None:
            grad_table = torch.zeros_like(table)
        ctx.save_for_backward(grad_hidden, grad_table)
        ctx.dtype = table.dtype
        if not losses:
            return torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_table = ctx.saved_tensors  # scaled in place, as above
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_table is None else grad_table.mul_(scale).to(ctx.dtype),
            None,
            None,
        )
