"""Numbers in blocks: each is the nearest value of a small table times the largest magnitude of its block.

`nf4` is NormalFloat (arXiv:2305.14314, appendix E): 16 quantiles of a normal distribution. `dynamic` and `positive`
have 256 values, the closer together the smaller they are (arXiv:2110.02861). Tensors are taken flat, the last block being shorter; two
4-bit codes share a byte, the first one its high half. All as bitsandbytes has it.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import native

Table = Literal["nf4", "dynamic", "positive"]
PART = 1 << 22  # values that are coded at once, so that a large matrix needs no second one in float32
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def table(name: Table, device: torch.device) -> Tensor:
    """The values of a table in rising order, float32 [16 or 256]."""
    return torch.tensor(NF4 if name == "nf4" else _dynamic(signed=name == "dynamic"), device=device)


def _dynamic(*, signed: bool) -> list[float]:
    """Of each power of ten from 1e-6 to 1: the middles of 1, 2, 4, ... equal parts of its upper nine tenths (twice as many where no
    place is needed for a sign), then 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (0 if signed else 1)) + 1, device="cpu")
        middles = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += [*middles, *(-value for value in middles)] if signed else middles
    return sorted(found)


def encode(x: Tensor, name: Table, *, block: int) -> tuple[Tensor, Tensor]:
    """x, of any shape and n values -> their places in the table, uint8 [n], and each block's largest magnitude, float32."""
    flat, values = x.detach().reshape(-1), table(name, x.device)
    bounds = (values[1:] + values[:-1]) / 2
    codes, scales = flat.new_empty(len(flat), dtype=torch.uint8), flat.new_empty(-(-len(flat) // block), dtype=torch.float32)
    for start in range(0, len(flat), PART):
        part = flat[start : start + PART].float()
        blocks = F.pad(part, (0, -len(part) % block)).view(-1, block)
        largest = blocks.abs().amax(1)
        shares = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        codes[start : start + len(part)] = torch.bucketize(shares.view(-1)[: len(part)], bounds, out_int32=True)
        scales[start // block : start // block + len(largest)] = largest
    return codes, scales


def decode(codes: Tensor, scales: Tensor, name: Table, *, block: int) -> Tensor:
    """What `encode` gave, as float32 values [n]."""
    return _scaled(F.embedding(codes.reshape(-1).int(), table(name, codes.device)[:, None]).view(-1), scales, block)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes [n] -> uint8 [ceil(n / 2)]; what an odd number lacks is 0's code."""
    if len(codes) % 2:
        codes = F.pad(codes, (0, 1), value=NF4.index(0.0))
    return codes[::2] << 4 | codes[1::2]


def decode_packed(packed: Tensor, scales: Tensor, *, count: int, block: int, dtype: torch.dtype) -> Tensor:
    """The first `count` NormalFloat values of packed codes times their blocks' scales, rounded once to `dtype`."""
    out = packed.new_empty(count, dtype=dtype)
    if packed.is_meta:
        return out
    if native.takes(out):
        return native.nf4_(out, packed, table("nf4", packed.device), scales, block=block)
    values = F.embedding(packed.int(), _pairs(packed.device)).view(-1)[:count]
    return out.copy_(_scaled(values, scales, block))


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2]."""
    return torch.cartesian_prod(table("nf4", device), table("nf4", device))


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of `values` times its scale, in place."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if whole < len(scales):
        values[whole * block :].mul_(scales[whole])
    return values
