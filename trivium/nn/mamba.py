"""Mamba: a state space model of each channel, whose step, input and output maps depend on the token (selective).

h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t + D x_t, with a state of `states` numbers a channel. In training each chunk
of time is one scan by doubling, so no ratio of decays is ever formed; decoding takes one step at a time.
The states of all times are kept for the backward: where that is too much, compute the layer again (models/checkpointing).
arXiv:2312.00752.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .attention import Mixer, MixerModule
from .chunks import spread_dt
from .keepers import Fixed, State
from .linear import Linear, OwnStart, Projections
from .linear_attention import extents
from .matmul_free import linear_scan
from .products import Product
from .recurrent import States, recur
from .short_conv import ShortConv
from .step import Step
from .store import Handle

SIZE = 32  # times of one chunk: a scan takes log2 of it rounds, each over states of the whole chunk


class Mamba(Mixer):
    """Maps in to x and a gate, a short convolution of x, the selective scan, SiLU of the gate multiplied in, a map out. It
    reads left to right, in a causal model or not."""

    kind: Literal["mamba"] = "mamba"
    inner: int = Field(gt=0, description="channels inside, each a state space model of its own")
    states: int = Field(16, gt=0, description="state of one channel")
    dt_rank: int = Field(gt=0, description="width from which the channels' steps dt are mapped")
    kernel: int = Field(4, gt=0, description="inputs that the short convolution sees, the token's own included")
    conv_bias: bool = Field(True, description="whether the convolution has a bias")
    bias: bool = Field(False, description="whether the maps in and out have biases")

    @classmethod
    def tiny(cls) -> Mamba:
        return cls(inner=30, states=4, dt_rank=3, kernel=3)

    def build(self, dim: int) -> MixerModule:
        return MambaMixer(self, dim)


class MambaMixer(MixerModule):
    def __init__(self, spec: Mamba, dim: int):
        super().__init__()
        self.spec = spec
        self.inp = Projections(**{name: Linear(dim, spec.inner, bias=spec.bias) for name in ("x", "gate")})
        self.conv = ShortConv(spec.inner, spec.kernel, bias=spec.conv_bias)
        widths = {"dt": spec.dt_rank, "B": spec.states, "C": spec.states}
        self.select = Projections(**{name: Linear(spec.inner, width) for name, width in widths.items()})
        self.steps = Linear(spec.dt_rank, spec.inner)
        self.channels = Channels(spec.inner, spec.states)
        self.out = Linear(spec.inner, dim, bias=spec.bias)

    def state(self) -> State:
        return {**self.conv.state(), "memory": Fixed((self.spec.inner, self.spec.states), torch.float32)}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        given, gate = self.inp(x, step)
        given = self.conv(given, step, handle)
        low, b, c = self.select(given, step)
        dt = F.softplus(self.steps(low, step).float() + self.channels.dt_bias.float())
        y = recur(self._scan, (given, dt, b, c), ("memory",), step, handle, mixer=self.spec.kind)
        y = y + self.channels.D.float() * given.float()
        return self.out((y * F.silu(gate.float())).to(x.dtype), step)

    def _scan(self, inputs: tuple[Tensor, ...], states: States | None) -> tuple[Tensor, States]:
        x, dt, b, c = inputs
        form = recurrent_scan if x.shape[1] == 1 else chunked_scan
        y, memory = form(x, dt, b, c, -self.channels.A_log.float().exp(), None if states is None else states[0])
        return y, (memory,)

    def products(self, step: Step, flows: Mapping[str, bool]) -> list[Product]:
        read = 2 * sum(rows * length for rows, length in extents(step)) * self.spec.inner * self.spec.states
        own = (parameter.requires_grad for module in (self.conv, self.steps, self.channels) for parameter in module.parameters())
        return [Product(read, flows["x"] or flows["dt"] or flows["B"] or any(own), flows["C"])]


class Channels(OwnStart):
    """What each channel has of its own: A = -exp(A_log) [inner, states], the bias of its step, and D.

    Starts as in the paper: A at -1, -2, ... -states, D at one, and dt_bias such that steps go from 0.001 to 0.1, evenly spaced
    in their logarithms over the channels, where the paper draws them. A_log is a matrix by its shape alone: an optimizer that is
    not to decay it must be told so by name.
    """

    def __init__(self, inner: int, states: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.D = nn.Parameter(torch.empty(inner))

    def reset(self) -> None:
        inner, states = self.A_log.shape
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, states + 1).log().expand(inner, -1))
            self.dt_bias.copy_(spread_dt(inner))
            self.D.fill_(1.0)


def recurrent_scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The selective scan, one token after the other: x and dt [N, L, I], b and c [N, L, S], a [I, S] (negative), memory
    [N, I, S], None: zero. Returns y [N, L, I] (without D x) and the memory after the last token, in float32."""
    x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    if memory is None:
        memory = x.new_zeros(len(x), *a.shape)
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        memory = (step * a).exp() * memory + step * x[:, t, :, None] * b[:, t, None]
        outputs.append((memory @ c[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), memory


def chunked_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, memory: Tensor | None = None, *, size: int = SIZE
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens, each an associative scan from the state that the one before it left."""
    memory = x.new_zeros(len(x), *a.shape, dtype=torch.float32) if memory is None else memory.float()
    outputs = []
    for x_, dt_, b_, c_ in zip(*(part.float().split(size, 1) for part in (x, dt, b, c)), strict=True):
        states = linear_scan((dt_[..., None] * a).exp(), (dt_ * x_)[..., None] * b_[:, :, None], memory)
        outputs.append((states @ c_[..., None]).squeeze(-1))
        memory = states[:, -1]
    return torch.cat(outputs, 1), memory
