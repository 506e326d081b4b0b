"""A short causal convolution of each channel alone, then SiLU: the last few inputs mixed before a recurrence reads them.

Its state for decoding is the last `kernel - 1` inputs. As used by Mamba (arXiv:2312.00752) and Gated DeltaNet
(arXiv:2412.06464). Written as one product a tap, so no backend's convolution is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.seed import generator
from .keepers import Fixed, State
from .linear import OwnStart
from .recurrent import States, recur
from .step import Step
from .store import Handle


class ShortConv(OwnStart):
    """[B, T, C] -> [B, T, C]: silu(bias + sum over i of weight[:, 0, i] * x[t - kernel + 1 + i]), zero before a document's start.

    `weight` [C, 1, kernel] is laid out as torch's Conv1d has it. Sums are made in float32.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def state(self) -> State:
        return {"conv": Fixed((self.kernel - 1, len(self.weight)))}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        return F.silu(recur(self._scan, (x,), ("conv",), step, handle, mixer=None))

    def _scan(self, inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
        (x,) = inputs
        count = x.shape[1]
        past = x.new_zeros(len(x), self.kernel - 1, x.shape[2]) if states is None else states[0].to(x.dtype)
        wide = torch.cat([past, x], 1)
        first, *others = self.weight[:, 0].float().unbind(1)
        y = wide[:, :count] * first
        for i, tap in enumerate(others, 1):
            y = y + wide[:, i : i + count] * tap
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype), (wide[:, count:],)

    def reset(self) -> None:
        """Uniform within 1 / sqrt(kernel) as torch's Conv1d starts, the same draw whatever the seed; a bias is zero."""
        drawn = torch.rand(self.weight.shape, generator=generator(0, "short_conv"))
        with torch.no_grad():
            self.weight.copy_((2 * drawn - 1) * self.kernel**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
