"""NEFTune (arXiv:2310.05914): in training, uniform noise on embeddings, of size alpha / sqrt(L C) for documents of L tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .step import Step


class EmbeddingNoise(nn.Module):
    """Adds its noise in training; otherwise nothing."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, C] -> [B, T, C]. L is the length of each token's own document."""
        if not self.training:
            return x
        lengths = x.new_full((1, 1, 1), x.shape[1])
        if step.segments is not None:
            flat = x.new_ones(x.shape[0] * x.shape[1])
            starts = torch.from_numpy(step.runs).to(x.device)
            document = torch.arange(len(starts), device=x.device).repeat_interleave(starts[:, 1])
            within = torch.arange(len(document), device=x.device) - (starts[:, 1].cumsum(0) - starts[:, 1])[document]
            lengths = flat.index_put((starts[document, 0] + within,), starts[document, 1].to(x.dtype)).view(*x.shape[:2], 1)
        return x + torch.empty_like(x).uniform_(-1, 1) * self.alpha / (lengths * x.shape[2]).sqrt()
