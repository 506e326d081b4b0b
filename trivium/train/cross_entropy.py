"""Cross-entropy of selected positions, loss and gradient in one pass over chunks of rows, in fp32.

Written as a plain expression, autograd keeps an fp32 copy of the logits, one of the log-probabilities and one of the gradient.
Here a chunk of about a million logits is upcast at a time and only the gradient is kept, in the logits' own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import native

CHUNK = 1 << 20  # logits upcast at a time: 4 MB, which stays in the cache


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The sum [] over rows of `F.cross_entropy` of `logits` [N, V] and `labels` [N], in fp32 (fp64 for fp64 logits)."""
    loss: Tensor = _CrossEntropySum.apply(logits, labels, label_smoothing)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if native.takes(logits):
            return _CrossEntropySum.native(ctx, logits.contiguous(), labels.contiguous(), smoothing)
        rows, vocab = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(logits) if wants_grad else None
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
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def native(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = native.cross_entropy(logits, labels, label_smoothing=smoothing, grad=grad)
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(scale), None, None  # in place: a second backward through it is an error, not a wrong gradient
