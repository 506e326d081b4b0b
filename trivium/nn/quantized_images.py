"""Vector quantization: vectors become the numbers of the nearest rows of a learned table (VQ-VAE, arXiv:1711.00937).

The gradient passes straight through to what was quantized; the table learns from a term of its own. What gives the vectors and
reads the rows is a model's business (`models/image_tokens.py`); tables that move as running means are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """`values` [..., D]: rows of the table, whose gradient is given to x as it is. `numbers` [...]: which rows. `pull` and
    `commitment`, sums over all vectors of the mean squared distance: what moves rows to vectors, and vectors to rows."""

    values: Tensor
    numbers: Tensor
    pull: Tensor
    commitment: Tensor


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """x [..., D], table [K, D] -> [...]: the row at the least distance, by one product of matrices; the first of equals."""
    return torch.argmin(table.square().sum(1) - 2 * x @ table.T, -1)


def quantize(x: Tensor, table: Tensor) -> Quantized:
    """x [..., D] by the rows of `table` [K, D]."""
    with torch.no_grad():
        numbers = nearest(x, table)
    rows = F.embedding(numbers, table)
    pull = (rows - x.detach()).square().mean(-1).sum()
    commitment = (x - rows.detach()).square().mean(-1).sum()
    return Quantized(x + (rows - x).detach(), numbers, pull, commitment)


def signal_to_noise(images: Tensor, others: Tensor, *, peak: float = 1.0) -> Tensor:
    """PSNR in decibels, of each image [N, channels, H, W] in values up to `peak`: 10 log10(peak^2 / mean squared difference)."""
    return 10 * torch.log10(peak**2 / (images - others).square().flatten(1).mean(1))
